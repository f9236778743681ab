"""What processes do that were given other values, for tests/distributed: functions of (rank, n)
that return what was said.
"""

import torch
from devices import mesh_of
from torch.func import grad, vmap

import funcattn as fa
from funcattn import sharding
from funcattn.sharding import P, shard_map, tensor_parallel


def differing(rank, n):
    """What each verb says on this process where one value of rank 1 is another, or None where it
    goes on.
    """
    mesh, config = (
        mesh_of(tensor=n),
        fa.Config(
            vocabulary=48, width=16, layers=1, heads=4, kv_heads=2, head_size=4, feed_forward=24
        ),
    )
    model, params = fa.decoder(config), fa.decoder(config).init(fa.key(0))
    on, rules = shard_map(model, mesh), tensor_parallel(config, size=n)
    stored, cuts = fa.shard(mesh, rules)(params), sharding.specs(params, mesh, rules)
    held, key, tokens, draws = (
        sharding.to_local(stored),
        fa.key(1),
        fa.random.randint(fa.key(2), (9,), 0, 48),
        fa.sampling.temperature(1.0),
    )
    other = lambda x: x.roll(1) if rank == 1 else x
    longer = tokens[rank:]
    text = fa.random.randint(fa.key(3), (40,), 0, 48)
    lookup = fa.drafters.prompt_lookup()
    slots = lambda: fa.serving.idle(model, held, model.cache(16), 2)
    fit = lambda key, text: fa.training.fit(
        key,
        model,
        held,
        text,
        optimizer=fa.training.sgd(1e-2),
        steps=1,
        rows=2,
        context=8,
        specs=cuts,
        progress=False,
    )
    cold = fa.sampling.temperature(0.7 if rank else 1.0)
    drafter = lambda: fa.drafters.model(model, held, length=2)  # made inside, where held is a part
    inside = {
        "alike, drafted by parts of weights": lambda: fa.speculate(
            key, model, held, drafter(), tokens, steps=2, sampler=draws
        ),
        "generate sampler": lambda: fa.generate(key, model, held, tokens, steps=2, sampler=cold),
        "stream sampler": lambda: list(fa.stream(key, model, held, tokens, steps=2, sampler=cold)),
        "speculate sampler": lambda: fa.speculate(
            key, model, held, lookup, tokens, steps=2, sampler=cold
        ),
        "speculate drafter": lambda: fa.speculate(
            key, model, held, fa.drafters.prompt_lookup(length=2 + rank), tokens, steps=2
        ),
        "best_of sampler": lambda: fa.search.best_of(
            key, model, held, tokens, n=2, steps=2, sampler=cold
        ),
        "enter sampler": lambda: fa.serving.enter(
            key, model, held, tokens, slots(), 0, steps=2, sampler=cold
        ),
        "alike": lambda: fa.generate(key, model, held, tokens, steps=2, sampler=draws),
        "generate prompt": lambda: fa.generate(key, model, held, other(tokens), steps=2),
        "generate prompt of another size": lambda: fa.generate(key, model, held, longer, steps=2),
        "generate key": lambda: fa.generate(
            other(key), model, held, tokens, steps=2, sampler=draws
        ),
        "generate steps": lambda: fa.generate(key, model, held, tokens, steps=2 + rank),
        "generate in a batch": lambda: vmap(
            lambda k: fa.generate(k, model, held, tokens, steps=1)[0]
        )(fa.split(other(key), 2)),
        "stream prompt": lambda: list(fa.stream(key, model, held, other(tokens), steps=2)),
        "speculate prompt": lambda: fa.speculate(key, model, held, lookup, other(tokens), steps=2),
        "speculate key": lambda: fa.speculate(
            other(key), model, held, lookup, tokens, steps=2, sampler=draws
        ),
        "beam_search prompt": lambda: fa.search.beam_search(model, held, other(tokens), steps=2),
        "best_of key": lambda: fa.search.best_of(
            other(key), model, held, tokens, n=2, steps=2, sampler=draws
        ),
        "enter prompt": lambda: fa.serving.enter(
            key, model, held, other(tokens), slots(), 0, steps=2
        ),
        "score tokens": lambda: fa.score(model, held, other(tokens)),
        "loss tokens": lambda: fa.loss(model, held, other(tokens)),
        "loss under grad": lambda: grad(lambda p: fa.loss(model, p, other(tokens)))(held),
        "fit tokens": lambda: fit(key, other(text)),
        "fit key": lambda: fit(other(key), text),
        "another call": lambda: (
            fa.score(model, held, tokens) if rank else fa.loss(model, held, tokens)
        ),
    }
    outside = {
        "shard": lambda: fa.shard(mesh, rules)(model.init(other(fa.key(5)))),
        "shard a large leaf": lambda: fa.shard(mesh, [("w", P("tensor", None))])(
            {"w": other(torch.arange(40000.0).reshape(200, 200))}
        ),
        "shard another tree": lambda: fa.shard(mesh, [(".*", P("tensor"))])(
            {"w": torch.ones(4), **({"v": torch.ones(4)} if rank else {})}
        ),
        "shard_map arguments": lambda: shard_map(torch.sin, mesh, (P("tensor"),), P("tensor"))(
            other(torch.arange(4.0))
        ),
        "model generate prompt": lambda: fa.generate(key, on, stored, other(tokens), steps=2),
        "model generate key": lambda: fa.generate(
            other(key), on, stored, tokens, steps=2, sampler=draws
        ),
        "model hidden": lambda: on.hidden(stored, other(tokens)),
        "model alike": lambda: fa.generate(key, on, stored, tokens, steps=2, sampler=draws),
    }
    with sharding.inside(mesh):
        found = {name: message(call) for name, call in inside.items()}
    return found | {name: message(call) for name, call in outside.items()}


def rows_differ(rank, n):
    """Over "data" each process has a text of its own; over "tensor" not, and then all are told."""
    mesh, found = mesh_of(data=2, tensor=2), {}
    config = fa.Config(
        vocabulary=48, width=16, layers=1, heads=4, kv_heads=2, head_size=4, feed_forward=24
    )
    model = fa.decoder(config)
    held = sharding.to_local(fa.shard(mesh, tensor_parallel(config, size=2))(model.init(fa.key(0))))
    with sharding.inside(mesh):
        for name, own in (("by data", rank // 2), ("one of four", rank == 1)):
            tokens = torch.arange(6) + int(own)
            found[name] = message(
                lambda tokens=tokens: fa.generate(fa.key(0), model, held, tokens, steps=2)
            )
    return found


def message(call):
    """What an error of a call says, or None."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return None
