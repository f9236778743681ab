"""Several adaptations in one tree: each row of a batch chooses one."""

import pytest
import torch
from torch.func import grad, vmap

import funcattn as fa
from funcattn.low_rank import Lora, LoraStack

CONFIG = fa.Config(
    vocabulary=12, width=8, layers=2, heads=2, kv_heads=1, head_size=4, feed_forward=12, context=32
)
MODEL = fa.decoder(CONFIG)
ROWS = fa.random.randint(fa.key(2), (4, 5), 0, CONFIG.vocabulary)
PARAMS = fa.tree.map(lambda x: x.double() * 5, MODEL.init(fa.key(0)))


def adapted(seed, rank, where=None, gain=False):
    """An adaptation away from its base."""

    def away(path, x):
        key = fa.fold_in(fa.key(seed), len(path))
        return fa.random.normal(key, x.shape, x.dtype) if path.endswith((".a", ".b")) else x

    found = fa.tree.map_with_path(away, fa.lora(rank, where)(fa.key(seed), PARAMS))
    if not gain:
        return found
    return fa.tree.map(
        lambda x: x._replace(gain=torch.rand_like(x.b[:, 0])) if isinstance(x, Lora) else x,
        found,
        is_leaf=lambda x: isinstance(x, Lora),
    )


def logits(params, tokens):
    return MODEL.logits(params, MODEL.hidden(params, tokens)[0])


def test_each_row_of_a_batch_chooses_its_adaptation():
    torch.manual_seed(0)
    trees = [
        PARAMS,
        adapted(1, 2),
        adapted(2, 3, r"layers\.\d+\.[qv]|embedding"),
        adapted(3, 1, gain=True),
    ]
    stack = fa.stack_lora(trees)
    index = torch.tensor([2, 0, 3, 1])
    together = vmap(lambda n, row: logits(fa.choose_lora(stack, n), row))(index, ROWS)
    for row, n, found in zip(ROWS, index.tolist(), together, strict=True):
        torch.testing.assert_close(found, logits(trees[n], row), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            logits(fa.choose_lora(stack, n), row), logits(trees[n], row), rtol=1e-10, atol=1e-10
        )
    assert stack.layers[0].q.base is PARAMS.layers[0].q


def test_a_stack_is_over_quantized_weights_too_and_has_gradients():
    base = fa.quantize(fa.int8)(fa.cast(torch.float32)(PARAMS))
    trees = [base, fa.lora(2)(fa.key(1), base)]
    stack = fa.stack_lora(trees)
    trained, frozen = fa.tree.partition(stack, fa.low_rank.is_trained)

    def loss(trained):
        one = lambda n, row: logits(fa.choose_lora(fa.tree.combine(trained, frozen), n), row)
        return vmap(one)(torch.tensor([1, 0]), ROWS[:2]).square().sum()

    slope = grad(loss)(trained).layers[0].q.b
    assert slope[1].abs().sum() > 0
    alone, rest = fa.tree.partition(trees[1], fa.low_rank.is_trained)
    want = grad(lambda p: logits(fa.tree.combine(p, rest), ROWS[0]).square().sum())(alone)
    torch.testing.assert_close(slope[1], want.layers[0].q.b, rtol=1e-4, atol=1e-4)


BAD = [
    (lambda: fa.stack_lora([]), ValueError, "stack_lora: trees should be a list of trees"),
    (
        lambda: fa.stack_lora([PARAMS, fa.tree.map(torch.clone, PARAMS)]),
        ValueError,
        "stack_lora: trees should be of one base",
    ),
    (
        lambda: fa.stack_lora([PARAMS, PARAMS._replace(head=PARAMS.embedding)]),
        ValueError,
        "stack_lora: trees should be of one structure",
    ),
    (
        lambda: fa.choose_lora(fa.stack_lora([PARAMS, adapted(1, 2)]), 2),
        ValueError,
        "choose_lora: index should be from 0 to 1, got 2",
    ),
    (
        lambda: vmap(lambda n: fa.choose_lora(fa.stack_lora([PARAMS, adapted(1, 2)]), n).norm)(
            torch.tensor([0, -1])
        ),
        ValueError,
        "choose_lora: index should be from 0 to 1",
    ),
    (
        lambda: fa.choose_lora(PARAMS, torch.tensor([0, 1])),
        TypeError,
        "choose_lora: index should be an integer, of shape ()",
    ),
    (lambda: fa.choose_lora(PARAMS, 1.5), TypeError, "choose_lora: index should be an integer"),
    (
        lambda: logits(fa.stack_lora([PARAMS, adapted(1, 2)]), ROWS[0]),
        TypeError,
        "linear: weight should be one adaptation, got a stack of 2",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_mistake_is_one_clear_error(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_a_stack_is_sharded_as_its_weights_are():
    stack = fa.stack_lora([PARAMS, adapted(1, 2, gain=True)])
    specs = fa.sharding.specs(
        stack, fa.sharding.Grid(tensor=2), fa.sharding.tensor_parallel(CONFIG, size=2)
    )
    assert isinstance(specs.layers[0].down, LoraStack)
    P = fa.sharding.P
    assert specs.layers[0].down.a == P(None, None, "tensor")
    assert specs.layers[0].up.b == P(None, "tensor", None)
    assert specs.layers[0].up.gain == P(None, "tensor")
