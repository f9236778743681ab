"""The context itself: its two names, its threads, and what it leaves behind."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp
from torch.utils.checkpoint import checkpoint

import funcattn as fa
from funcattn.interop import closed, override_sdpa
from funcattn.interop.closing import active

X = torch.linspace(-2, 2, 5, dtype=torch.float64)


def hvp(f):
    return jvp(grad(lambda x: f(x).sum()), (X,), (X,))[1]


@pytest.mark.parametrize("context", [closed, override_sdpa])
def test_both_names_replace_the_same(context):
    with context():
        found = hvp(F.hardsigmoid), hvp(lambda x: checkpoint(torch.sin, x, use_reentrant=False))
    assert not found[0].any()
    torch.testing.assert_close(found[1], -X.sin() * X)
    assert active() is None


@pytest.mark.parametrize("context", [closed, override_sdpa])
def test_an_error_names_the_context_that_was_entered(context):
    q = torch.ones(2, 3, 4)
    dropped = lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    with context(), pytest.raises(ValueError, match=rf"Say {context.__name__}\(key=fa.key\(0\)\)"):
        dropped()
    with pytest.raises(ValueError, match=f"{context.__name__}: key should be one key"):
        context(key=3).__enter__()
    with context(key=fa.key(0)):
        assert dropped().shape == q.shape


def test_nothing_is_replaced_outside():
    refused = RuntimeError  # NotImplementedError is one
    with pytest.raises(refused):
        hvp(F.hardsigmoid)
    with closed(), closed():
        hvp(F.hardsigmoid)
    with pytest.raises(refused):
        hvp(F.hardsigmoid)
    with pytest.raises(refused):
        hvp(lambda x: checkpoint(torch.sin, x, use_reentrant=False))


def test_another_thread_keeps_torchs_checkpoint():
    found = []

    def other():
        x = X.clone().requires_grad_()
        y = checkpoint(torch.sin, x, use_reentrant=True)
        found.append(y.grad_fn.name())

    with closed():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == ["CheckpointFunctionBackward"]
