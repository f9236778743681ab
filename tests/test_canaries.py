"""Traps in torch that this library works around.

Each test shows the trap as it is; one that goes red means that torch has mended it, and that the
work-around it names can go.
"""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.autograd import Function
from torch.func import grad, jvp, vmap

pytestmark = pytest.mark.cpu("what torch does there")


class Cube(Function):
    """x^3 with a jvp in plain operations, as the documentation has it."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] ** 2 * t

    @staticmethod
    def vmap(info, in_dims, x):
        return Cube.apply(x), in_dims[0]


def test_an_outer_jvp_of_a_functions_jvp_is_silently_zero():
    """pytorch/pytorch#197867; worked around by autograd.closed_jvp."""
    x = torch.tensor(2.0, dtype=torch.float64)
    second = jvp(
        lambda x: jvp(Cube.apply, (x,), (torch.ones_like(x),))[1], (x,), (torch.ones_like(x),)
    )[1]
    assert second == 0  # 12 would be right


def test_a_custom_op_under_jvp_has_silently_zero_tangents():
    """Worked around by keeping our operations behind Functions with a jvp
    (kernels.closed.operators).
    """

    @torch.library.custom_op("funcattn_canary::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert jvp(double, (torch.tensor(1.0),), (torch.tensor(1.0),))[1] == 0  # 2 would be right


def test_torchs_fused_attention_has_no_jvp_and_no_second_derivative():
    """The gap that the closed family fills; if torch fills it, `sdpa` may be chosen where a
    derivative is asked.
    """
    q = torch.ones(1, 1, 4, 8)
    attention = lambda q: F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(attention, (q,), (q,))
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(attention(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(first.sum(), leaf)


def test_vmap_expands_an_operand_that_is_not_mapped():
    """Worked around by kernels.products and kernels.backends.layout, which fold the mapped axis
    into rows.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.append(tuple(out.shape))
            return out

    x, w = torch.ones(6, 2, 3, 4), torch.ones(2, 4, 5)
    with Watch():
        vmap(lambda x: x @ w)(x)
    assert any(s[:1] in ((6,), (12,)) and s[-2:] == (4, 5) for s in shapes)


def test_checkpoint_does_not_nest_under_torch_func():
    """Worked around by fa.remat."""
    from torch.utils.checkpoint import checkpoint

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum())(torch.ones(2))


def test_the_private_names_that_closed_jvp_rests_on_are_there():
    assert callable(forward_ad._set_fwd_grad_enabled)
    assert callable(torch._VF._unpack_dual)
    assert hasattr(torch._dynamo, "nonstrict_trace")
    assert forward_ad._current_level == -1


def test_exp_is_slower_than_exp2_is_no_test_but_both_agree():
    """kernels.backends.torch_blocks takes powers of two because torch's exp is the slower of the
    two on CPU; their values agree.
    """
    x = torch.linspace(-80, 0, 97, dtype=torch.float64)
    assert torch.allclose(torch.exp2(x * 1.4426950408889634), x.exp(), rtol=1e-13, atol=0)


def test_an_integer_product_has_silently_zero_derivatives():
    """Worked around by quantization.fast.routed, which keeps the kernel for the value alone."""
    codes = torch.ones(4, 8, dtype=torch.int8)
    product = lambda x: torch._int_mm(x.to(torch.int8), codes).float() + 0 * x.sum()
    x = torch.full((4, 4), 3.0)
    assert jvp(product, (x,), (x,))[1].abs().max() == 0
    assert grad(lambda x: product(x).sum())(x).abs().max() == 0


def test_the_packed_int4_product_has_no_derivative():
    """So routed has to give one."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.ones(16, 32, dtype=torch.int32), 1
    )
    grid = torch.ones(1, 16, 2, dtype=torch.bfloat16)
    product = lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, 32, grid)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(product, (x,), (x,))
    with pytest.raises((NotImplementedError, RuntimeError)):
        grad(lambda x: product(x).sum())(x)


def test_the_packed_int8_product_has_no_derivative():
    """So routed has to give one."""
    codes, scale = torch.ones(16, 32, dtype=torch.int8), torch.ones(16, dtype=torch.bfloat16)
    product = lambda x: torch._weight_int8pack_mm(x, codes, scale)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(product, (x,), (x,))
    with pytest.raises((NotImplementedError, RuntimeError)):
        grad(lambda x: product(x).sum())(x)


def test_torchs_fused_attention_reads_overlapping_rows_wrongly():
    """Worked around by kernels.backends.layout.in_rows: the output is laid out by the strides of q,
    and written otherwise.
    """
    rows = torch.randn(2, 2, 65).unfold(-1, 64, 1)  # (2, 2, 2, 64), row stride 1
    heads = torch.randn(2, 129).unfold(-1, 128, 1).unflatten(-1, (2, 64))  # head stride 1
    for q in (rows, heads):
        k, v = torch.randn(2, 2, 2, 2, 64)
        wanted = F.scaled_dot_product_attention(q.contiguous(), k, v)
        for _ in range(2):
            # what is not written is not right by chance
            [torch.full((2**n,), torch.nan) for n in range(4, 18) for _ in range(4)]
        assert not torch.allclose(F.scaled_dot_product_attention(q, k, v), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        "torch.jit._script",
        "transformers.masking_utils",
        "triton.runtime.interpreter",
        "funcattnlike",
    ],
)
def test_a_warning_about_a_line_of_a_peer_fails_no_test(module):
    """What a peer deprecates on some day is told at the end of a run."""
    warnings.warn_explicit("deprecated", FutureWarning, "peer.py", 1, module=module)
    warnings.warn_explicit("deprecated", DeprecationWarning, "peer.py", 2, module=module)


@pytest.mark.parametrize("module", ["funcattn", "funcattn.kernels.api"])
@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning, UserWarning])
def test_a_warning_about_a_line_of_the_library_fails_its_test(module, kind):
    with pytest.raises(kind, match="deprecated"):
        warnings.warn_explicit("deprecated", kind, "here.py", 1, module=module)


FIRST = """
import torch, funcattn as fa
q = torch.ones(1, 2, 4)
torch.func.jvp(lambda q: fa.attention(q, q, q), (q,), (q,))
"""


def test_the_first_jvp_of_a_process_warns_of_nothing():
    """torch 2.14's forward-mode rules warn of their torch.jit.script when they are imported, which
    autograd does in silence.
    """
    done = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
