"""What each process does in tests/distributed: functions of (rank, n, ...) that compare with one
device and return numbers.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.func import grad, jvp, vmap

import funcattn as fa
from funcattn import collectives, sharding, tree
from funcattn.sharding import P, fsdp, shard_map, specs, tensor_parallel
from funcattn.sharding.mesh import is_spec
from funcattn.sharding.storing import spec_of

CONFIG = fa.Config(
    vocabulary=48,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    feed_forward=24,
    qkv_bias=True,
)


def params_of(config=CONFIG, seed=0):
    params = fa.decoder(config).init(fa.key(seed))
    return tree.map(lambda x: (x if x.dim() == 1 else 10 * x).double(), params)


def mesh_of(**axes):
    return dist.init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def error(a, b):
    """The greatest difference of two trees, of which DTensors are made whole."""
    pairs = zip(tree.leaves(fa.gather(a)), tree.leaves(fa.gather(b)), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


def transforms(rank, n, axes, sharded):
    """Errors of everything against one device, by name; collectives of a layer; whether gradients
    lie as their parameters do.
    """
    mesh, model, params = mesh_of(**axes), fa.decoder(CONFIG), params_of()
    tokens, tangent = fa.random.randint(fa.key(1), (4, 9), 0, 48), params_of(seed=1)
    size = axes.get("tensor", 1)
    rules = fsdp(CONFIG, size=size) if sharded else tensor_parallel(CONFIG, size=size)
    cuts, rows = specs(params, mesh, rules), P("data") if "data" in axes else P()
    held, moved = fa.shard(mesh, rules)(params), fa.shard(mesh, rules)(tangent)
    loss = lambda params, tokens: fa.loss(model, params, tokens)
    each = vmap(grad(loss), (None, 0))
    functions = {
        "logits": (lambda p, x: model.logits(p, model.hidden(p, x)[0]), rows),
        "loss": (loss, P()),
        "grad": (grad(loss), cuts),
    }
    found = {}
    for name, (f, out) in functions.items():
        found[name] = error(shard_map(f, mesh, (cuts, rows), out)(held, tokens), f(params, tokens))
    tangents = {
        "jvp": (lambda p, x, t: jvp(lambda p: loss(p, x), (p,), (t,))[1], P()),
        "hvp": (lambda p, x, t: jvp(lambda p: grad(loss)(p, x), (p,), (t,))[1], cuts),
        "grad of jvp": (
            lambda p, x, t: grad(lambda p: jvp(lambda p: loss(p, x), (p,), (t,))[1])(p),
            cuts,
        ),
    }
    for name, (f, out) in tangents.items():
        found[name] = error(
            shard_map(f, mesh, (cuts, rows, cuts), out)(held, tokens, moved),
            f(params, tokens, tangent),
        )
    if not sharded:
        front = tree.map(
            lambda spec: P("data" if "data" in axes else None, *spec), cuts, is_leaf=is_spec
        )
        on = shard_map(each, mesh, (cuts, rows), front, axes=("tensor",))
        found["vmap(grad)"] = error(on(held, tokens), each(params, tokens))
    gradient = shard_map(grad(loss), mesh, None, cuts)(held, tokens)
    placed = all(
        isinstance(g, DTensor)
        and spec_of(g) == spec_of(p)
        and g.to_local().shape == p.to_local().shape
        for g, p in zip(tree.leaves(gradient), tree.leaves(held), strict=True)
    )
    optimizer = fa.training.chain(fa.training.clip(0.1, specs=cuts), fa.training.adamw(1e-2))
    step, state = fa.training.step(model, optimizer, specs=cuts), optimizer.init(params)
    of_state = sharding.specs_like(state, params, cuts)
    on = shard_map(
        step, mesh, (cuts, of_state, rows), (cuts, of_state, fa.training.Metrics(P(), P()))
    )
    once = on(held, state, tokens)
    found["step"] = error(on(*once[:2], tokens), step(*step(params, state, tokens)[:2], tokens))
    return found, placed


def decoding(rank, n):
    """Decoding with a cache of this process's heads; what it writes is what one device writes."""
    mesh, model, params = mesh_of(tensor=n), fa.decoder(CONFIG), params_of()
    held = fa.shard(mesh, tensor_parallel(CONFIG, size=n))(params)
    on, tokens = shard_map(model, mesh), fa.random.randint(fa.key(1), (4, 9), 0, 48)
    past = on.cache(20, dtype=torch.float64)
    logits, past = on.apply(held, tokens[0], past)
    found = {"heads": past.k.shape[1]}
    found["prefill"] = error(
        logits, model.apply(params, tokens[0], model.cache(20, dtype=torch.float64))[0]
    )
    logits, past = on.apply(held, tokens[1, :3], past)
    both = torch.cat([tokens[0], tokens[1, :3]])
    found["step"] = error(
        logits, model.apply(params, both, model.cache(20, dtype=torch.float64))[0][-3:]
    )
    write = lambda model, params, **options: fa.generate(
        fa.key(2), model, params, tokens[0], steps=8, **options
    )[0].tolist()
    found["greedy"] = write(on, held) == write(model, params)
    if n > CONFIG.kv_heads:  # where compiled decoding leaves the layers to the model
        found["compiled"] = write(
            shard_map(fa.compile(model, backend="eager"), mesh), held
        ) == write(model, params)
    sampler = fa.sampling.chain(fa.sampling.temperature(0.9), fa.sampling.top_k(5))
    few = shard_map(sharding.candidates(model, 5), mesh)
    found["sampled"] = write(few, held, sampler=sampler) == write(model, params, sampler=sampler)
    each = lambda params, x: vmap(lambda x: fa.generate(fa.key(2), model, params, x, steps=5)[0])(x)
    found["batch"] = bool(
        (shard_map(each, mesh, None, P())(held, tokens).to_local() == each(params, tokens)).all()
    )
    few = fa.quantize(fa.int8)(params)
    stored = fa.shard(mesh, tensor_parallel(CONFIG, size=n))(few)
    found["quantized"] = error(on.hidden(stored, tokens)[0], model.hidden(few, tokens)[0])
    found["gathered"] = all(
        torch.equal(a, b)
        for a, b in zip(tree.leaves(fa.gather(stored)), tree.leaves(few), strict=True)
    )
    eight = fa.quantize(fa.fp8)(params)
    again = fa.gather(fa.shard(mesh, tensor_parallel(CONFIG, size=n))(eight))
    bits = lambda tree_: [
        x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in tree.leaves(tree_)
    ]
    found["gathered fp8"] = all(
        torch.equal(a, b) for a, b in zip(bits(again), bits(eight), strict=True)
    )
    return found


def counted(rank, n):
    """all_reduce calls of one more layer: forward, and forward with backward."""
    mesh, tokens, told = mesh_of(tensor=n), fa.random.randint(fa.key(1), (4, 9), 0, 48), []
    for layers in (1, 2):
        config = fa.Config(
            vocabulary=48,
            width=16,
            layers=layers,
            heads=4,
            kv_heads=2,
            head_size=4,
            feed_forward=24,
        )
        model, params = fa.decoder(config), params_of(config)
        held = fa.shard(mesh, tensor_parallel(config))(params)
        cuts = specs(params, mesh, tensor_parallel(config))
        forward = lambda params, model=model: model.hidden(params, tokens)[0]
        for f, out in (
            (forward, P()),
            (grad(lambda params, forward=forward: forward(params).sum()), cuts),
        ):
            collectives.reset()
            shard_map(f, mesh, (cuts,), out, check_alike=False)(held)
            told.append(collectives.counts())
    calls = [seen["all_reduce"]["calls"] for seen in told]
    return calls[2] - calls[0], calls[3] - calls[1], sorted(name for seen in told for name in seen)


def said(rank, n, axes, sharded):
    """Calls of one more layer in a gradient, by kind, and the bytes given to them."""
    mesh, tokens, told = mesh_of(**axes), fa.random.randint(fa.key(1), (4, 9), 0, 48), []
    for layers in (1, 2):
        config = fa.Config(
            vocabulary=48,
            width=16,
            layers=layers,
            heads=4,
            kv_heads=2,
            head_size=4,
            feed_forward=24,
        )
        model, rules = fa.decoder(config), (fsdp if sharded else tensor_parallel)(config)
        params = params_of(config)
        cuts, rows = specs(params, mesh, rules), P("data") if "data" in axes else P()
        held, gradient = (
            fa.shard(mesh, rules)(params),
            grad(lambda p, x, model=model: fa.loss(model, p, x)),
        )
        collectives.reset()
        shard_map(gradient, mesh, (cuts, rows), cuts, check_alike=False)(held, tokens)
        told.append(collectives.counts())
    less = lambda kind, what: told[1][kind][what] - told[0].get(kind, {what: 0})[what]
    return {kind: (less(kind, "calls"), less(kind, "bytes")) for kind in told[1]}


def compiled(rank, n):
    """A compiled step of training is one graph and the same step; compiled decoding writes the same
    tokens.
    """
    config = fa.Config(
        vocabulary=48, width=16, layers=1, heads=4, kv_heads=2, head_size=4, feed_forward=24
    )
    mesh, params, model = mesh_of(tensor=n), params_of(config), fa.decoder(config)
    rules = tensor_parallel(config)
    cuts, held = specs(params, mesh, rules), fa.shard(mesh, rules)(params)
    tokens = fa.random.randint(fa.key(1), (4, 9), 0, 48)
    optimizer = fa.training.chain(fa.training.clip(0.1, specs=cuts), fa.training.adamw(1e-2))
    step, state = fa.training.step(model, optimizer, specs=cuts), optimizer.init(params)
    of_state = sharding.specs_like(state, params, cuts)
    specs_of = (cuts, of_state, P()), (cuts, of_state, fa.training.Metrics(P(), P()))
    once = shard_map(torch.compile(step, fullgraph=True, backend="aot_eager"), mesh, *specs_of)(
        held, state, tokens
    )
    difference = error(once, step(params, state, tokens))
    with torch.no_grad():
        fast = shard_map(fa.compile(model, backend="eager"), mesh)
        collectives.reset()
        ours = fa.generate(fa.key(2), fast, held, tokens[0], steps=6)[0].tolist()
        calls = collectives.counts()["all_reduce"]["calls"]
        theirs = fa.generate(fa.key(2), model, params, tokens[0], steps=6)[0].tolist()
    refused = ""
    try:
        tangent = lambda x: jvp(lambda x: collectives.psum(x, "tensor"), (x,), (x,))[1]
        shard_map(torch.compile(tangent, fullgraph=True, backend="eager"), mesh, P(), P())(
            torch.ones(2)
        )
    except Exception as problem:
        refused = f"{problem}"
    return difference, ours == theirs, calls, refused


def saved(rank, n, folder):
    """Save on dp 2 x tp 2."""
    mesh, params = mesh_of(data=2, tensor=2), params_of()
    fa.checkpoints.save_parts(
        folder, fa.shard(mesh, fsdp(CONFIG))(fa.quantize(fa.int8, "embedding")(params))
    )
    return True


def restored(rank, n, folder):
    """Load on tp 2, by other rules."""
    mesh, expected = mesh_of(tensor=n), fa.quantize(fa.int8, "embedding")(params_of())
    like = fa.shard(mesh, tensor_parallel(CONFIG))(tree.map(torch.zeros_like, expected))
    found = fa.checkpoints.load_parts(folder, like)
    untouched = all(not bool(x.to_local().any()) for x in tree.leaves(like))
    placed = all(
        spec_of(a) == spec_of(b) for a, b in zip(tree.leaves(found), tree.leaves(like), strict=True)
    )
    same = all(
        torch.equal(a, b)
        for a, b in zip(tree.leaves(fa.gather(found)), tree.leaves(expected), strict=True)
    )
    return untouched, placed, same


def sliced(rank, n, folder):
    """Each process reads its own part of a folder: the same as sharding the whole, and no byte of
    the others.
    """
    from funcattn.checkpoints.hf import weights

    read = []
    original = weights.Contents.read

    def counted(self, name, rows=None):
        found = original(self, name, rows)
        read.append(found.nbytes)
        return found

    weights.Contents.read = counted
    mesh = mesh_of(tensor=n)
    config, held, tokenizer = fa.checkpoints.load_sharded(folder, mesh)
    total, mine = sum(read), tree.nbytes(sharding.to_local(held))
    weights.Contents.read = original
    params = fa.load(folder).params
    whole = fa.shard(mesh, tensor_parallel(config, size=n))(params)
    same = all(
        spec_of(a) == spec_of(b) and torch.equal(a.to_local(), b.to_local())
        for a, b in zip(tree.leaves(held), tree.leaves(whole), strict=True)
    )
    return same, total, mine, tree.nbytes(params)


def verbs(rank, n):
    """Each collective under each transform, against the same over simulated devices."""
    ring = [(i, (i + 1) % n) for i in range(n)]
    kinds = {
        "psum": lambda x: collectives.copy_to_region(collectives.psum(x, "t"), "t"),
        "all_gather": lambda x: collectives.all_gather(x, "t", dim=1),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x, "t"),
        "ppermute": lambda x: collectives.ppermute(x, "t", ring),
        "a partial ppermute": lambda x: collectives.ppermute(x, "t", [(0, 1)]),
    }
    mesh, grid = mesh_of(t=n), sharding.Grid(t=n)
    x, t = (fa.random.normal(fa.key(i), (n, 4, 2 * n, 3), torch.float64) for i in range(2))
    found = {}
    for name, verb in kinds.items():
        scalar = lambda x, verb=verb: collectives.psum(
            (verb(x * x).sin() * (1.0 + collectives.axis_index("t"))).sum(), "t"
        )
        functions = {
            "value": (verb, 1),
            "grad": (grad(scalar), 1),
            "jvp": (lambda x, t, f=scalar: jvp(f, (x,), (t,))[1].reshape(1, 1), 2),
            "jvp of grad": (lambda x, t, f=scalar: jvp(grad(f), (x,), (t,))[1], 2),
            "grad of grad": (
                grad(lambda x, f=scalar: collectives.psum((grad(f)(x) ** 2).sum(), "t")),
                1,
            ),
            "vmap of grad": (lambda x, f=scalar: vmap(grad(f))(torch.stack([x, 2 * x])).sum(0), 1),
            "vmap": (lambda x, f=verb: vmap(f)(torch.stack([x, 2 * x])).sum(0), 1),
        }
        for kind, (f, count) in functions.items():
            run = lambda *args, f=f: f(*[a[0] for a in args]).unsqueeze(0)
            given = (x[:, 0], t[:, 0])[:count]
            theirs = shard_map(run, grid, (P("t"),) * count, P("t"))(*given)
            found[f"{kind} of {name}"] = error(
                shard_map(run, mesh, (P("t"),) * count, P("t"))(*given), theirs
            )
    return found


def refusals(rank, n):
    """The errors of what cannot be, by name."""
    mesh, model, params = mesh_of(tensor=n), fa.decoder(CONFIG), params_of()
    held = fa.shard(mesh)(params)
    tokens = fa.random.randint(fa.key(1), (9,), 0, 48)
    on = shard_map(model, mesh)
    x = torch.ones(4)
    attempts = {
        "grad outside": lambda: grad(
            lambda x: shard_map(torch.sin, mesh, P(), P())(x).to_local().sum()
        )(x),
        "vmap outside": lambda: vmap(shard_map(torch.sin, mesh, P(), P()))(x),
        "grad of a model": lambda: grad(
            lambda x: x * on.logits(held, torch.ones(16, dtype=torch.float64)).sum()
        )(x.sum()),
        "gather inside": lambda: vmap(lambda x: fa.gather(x))(x),
        "shard inside": lambda: vmap(lambda x: fa.shard(mesh, sharding.replicated())(x))(x),
        "sharded otherwise": lambda: fa.shard(mesh, sharding.replicated())(held),
        "specs of another cut": lambda: shard_map(lambda p: p, mesh, (P(),), P())(held.layers[0].q),
        "autograd follows": lambda: shard_map(torch.sin, mesh, None, P())(
            held.layers[0].q.detach().requires_grad_()
        ),
        "heads that are cut": lambda: shard_map(
            fa.decoder(fa.Config(heads=3, kv_heads=3)), mesh
        ).cache(4),
        "quantize in parts": lambda: fa.quantize(fa.int4)(held),
        "results that differ": lambda: shard_map(
            lambda: collectives.axis_index("tensor"), mesh, (), P()
        )(),
        "dequantize in parts": lambda: fa.dequantize(fa.shard(mesh)(fa.quantize(fa.int8)(params))),
        "save in parts": lambda: fa.save("nowhere", CONFIG, held),
        "no names": lambda: fa.shard(dist.init_device_mesh("cpu", (n,)))(params),
        "a whole tree on a mesh": lambda: on.hidden(params, tokens),
    }
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            told[name] = "nothing was raised"
        except (ValueError, TypeError, RuntimeError) as problem:
            told[name] = f"{type(problem).__name__}: {problem}"
    return told


def greedy(rank, n, folder, prompt, steps):
    """Greedy ids of the model in a folder, of which each process reads its part."""
    mesh = mesh_of(tensor=n)
    config, held, _ = fa.checkpoints.load_sharded(folder, mesh)
    model = shard_map(sharding.candidates(fa.decoder(config), 1), mesh)
    with torch.no_grad():
        collectives.reset()
        tokens = fa.generate(fa.key(0), model, held, prompt, steps=steps)[0].tolist()
    return tokens, collectives.counts(), tree.nbytes(tree.map(lambda x: x.to_local(), held))


def command(rank, n, port, arguments, dies_at=""):
    """The command line as torchrun starts it: stdout, stderr, exit code. The last one ends when a
    file is there.
    """
    import contextlib
    import io
    import os
    import threading
    import time

    from funcattn import cli

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def watch():
        while not os.path.exists(dies_at):
            time.sleep(0.02)
        os._exit(3)

    if dies_at and rank == n - 1:
        threading.Thread(target=watch, daemon=True).start()
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    return out.getvalue(), err.getvalue(), code


def dies(rank, n):
    """The last rank ends in the middle; the others should be told, and not wait."""
    import os

    mesh = mesh_of(tensor=n)
    f = shard_map(lambda x: collectives.psum(x, "tensor"), mesh, P("tensor"), P())
    f(torch.ones(n))
    if rank == n - 1:
        os._exit(3)
    try:
        f(torch.ones(n))
    except RuntimeError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was raised"
