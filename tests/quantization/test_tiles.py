"""Matrices in tiles: the bits of their records, products as near as those of floats, every
transform, every instruction set.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jvp, vjp, vmap

import funcattn as fa
from funcattn.layers import linear, linears
from funcattn.quantization import Int4, Int8, Int8Affine, expand, packed, packing, tiles
from funcattn.quantization.tiles import expand_tiles, products
from funcattn.quantization.tiling import tile_affine, tile_floats, tile_int4, tile_int8, tile_narrow
from funcattn.testing import strategies

needs_operator = pytest.mark.skipif(bool(tiles.missing()), reason=tiles.missing())
pytestmark = [needs_operator, pytest.mark.cpu("tiles are for an operator of the CPU")]
EPS = 2.0**-24  # what rounding to float32 changes, of the number

SCHEMES = {
    "int4": fa.int4,
    "int4, groups of 64": fa.int4(group=64),
    "int4 symmetric": fa.int4(symmetric=True),
    "int4, float32 scales": lambda w: fa.tree.cast(torch.float32)(fa.int4.encode(w)),
    "int8": fa.int8,
    "int8, groups of 32": fa.int8(group=32),
    "int8, groups of 16": lambda w: fa.tree.cast(torch.float32)(fa.int8(group=16).encode(w)),
    "int8 with zeros": lambda w: affine(w),
    "int8, float32 scales": lambda w: fa.tree.cast(torch.float32)(fa.int8(group=64).encode(w)),
}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
each_instruction = pytest.mark.parametrize("instructions", [1, 2], ids=["AVX2", "AVX-512"])


def matrix(seed, *sizes):
    return fa.random.normal(fa.key(seed), sizes)


def encode(scheme, w):
    return scheme.encode(w) if hasattr(scheme, "encode") else scheme(w)


def affine(w):
    """8-bit codes with zeros, whose products with scales are exact."""
    codes, scale, zero = packing.affine(w, 32, 256)
    return Int8Affine(codes, scale.half().float(), zero.half().float())


def tile(record):
    if isinstance(record, Int4):
        return tile_int4(*record)
    if isinstance(record, Int8Affine):
        return tile_affine(*record)
    if record.codes.shape[-1] == 16 * record.scale.shape[-1]:
        return tile_narrow(*record)
    return tile_int8(*record)


def whole(weight, K):
    return expand_tiles(*weight, weight.rows, K)


@pytest.fixture
def with_instructions():
    """Sets what the operator may use; skips where the processor has less."""

    def choose(wanted):
        if torch.ops.funcattn.instructions(wanted) != wanted:
            pytest.skip("the processor has no such instructions")

    yield choose
    torch.ops.funcattn.instructions(-1)


def allowed(record, x):
    """How far a product may be from the exact one, for each output.

    A number of x is off by at most 2^-23 of the largest of its block (half a step of 1 / 8355708,
    and two roundings). For each block there are then a handful of roundings in float32, of terms no
    larger than 15 |scale| and |zero| (with 8 bits, than
    |w|: their integers are exact) times |x|, and one more of the sum so far.
    """
    wide, K = x.double().abs(), x.shape[-1]
    blocks = torch.nn.functional.pad(wide, (0, -K % 32)).unflatten(-1, (-1, 32))
    coarse = (wide * 0 + 1) * blocks.amax(-1, keepdim=True).expand(*blocks.shape).flatten(-2)[
        ..., :K
    ]
    dense = expand(record).double().abs()
    scale = fa.quantization.packing.spread(record.scale.double().abs(), K)
    parts = (
        (15 if isinstance(record, Int4) else 255) * scale
        + fa.quantization.packing.spread(record.zero.double().abs(), K)
        if isinstance(record, (Int4, Int8Affine))
        else dense
    )
    return 2 * EPS * coarse @ dense.mT + (8 + K / 32) * EPS * (wide @ parts.mT) + 2.0**-149


@each_scheme
def test_tiles_hold_the_matrix_bit_for_bit(scheme):
    for N, K in ((16, 64), (33, 64), (7, 128), (40, 192)):
        record = encode(scheme, matrix(1, N, K))
        assert torch.equal(whole(tile(record), K), expand(record))


def test_tiles_of_floats_hold_the_matrix():
    for N, K in ((16, 64), (33, 7), (5, 1)):
        weight = matrix(1, N, K)
        assert torch.equal(whole(tile_floats(weight), K), weight)
    assert tile_floats(weight.double()) is None
    assert tile_floats(weight, rows=tiles.MOST_FLOATS + 1) is None


@each_instruction
def test_products_of_floats_are_as_near_as_a_sum_is(instructions, with_instructions):
    """By the bound of a sum in any order, K eps |x| |w|; every number of vectors in one pass."""
    with_instructions(instructions)
    for N, K in ((33, 65), (16, 3), (7, 576)):
        weight = matrix(1, N, K)
        for T in range(1, 17):
            x = matrix(2, T, K)
            found, exact = linear(tile_floats(weight), x), x.double() @ weight.double().mT
            allowed = K * EPS * (x.double().abs() @ weight.double().abs().mT)
            assert ((found - exact).abs() <= allowed).all()


def test_rows_of_any_length_have_one_scale():
    record = fa.int8.encode(matrix(1, 5, 50))
    assert torch.equal(whole(tile_int8(*record), 50), expand(record))


@each_instruction
@each_scheme
def test_a_product_is_as_near_as_that_of_floats(scheme, instructions, with_instructions):
    with_instructions(instructions)
    for (N, K), T in zip(
        ((16, 64), (33, 64), (7, 576), (100, 1536), (16, 64)), (1, 2, 5, 16, 31), strict=True
    ):
        record, x = encode(scheme, matrix(1, N, K)), matrix(2, T, K)
        found, exact = linear(tile(record), x), x.double() @ expand(record).double().mT
        assert ((found - exact).abs() <= allowed(record, x)).all()
        # chance: the errors of hundreds of terms partly cancel
        assert (found - exact).norm() <= 6 * EPS * exact.norm()


@given(
    strategies.keys(),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(-30, 30),
    st.booleans(),
)
def test_a_product_of_any_size_is_that_of_the_matrix(key, N, B, T, power, symmetric):
    of_w, of_x = fa.split(key, 2)
    record = fa.int4(symmetric=symmetric).encode(fa.random.normal(of_w, (N, 32 * B)))
    x = fa.random.normal(of_x, (T, 32 * B)) * 2.0**power
    x[0, : 16 * B] *= 1e-4
    assert (
        (linear(tile(record), x) - x.double() @ expand(record).double().mT).abs()
        <= allowed(record, x)
    ).all()


@each_instruction
@each_scheme
def test_a_product_of_any_scale_is_as_near_as_that_of_floats(
    scheme, instructions, with_instructions
):
    """Of denormal numbers, of such that overflow in the sum of integers, of blocks of both beside
    usual ones, and of zeros.
    """
    with_instructions(instructions)
    for N, K in ((33, 64), (20, 192)):
        record, dense = (
            encode(scheme, matrix(1, N, K)),
            expand(encode(scheme, matrix(1, N, K))).double(),
        )
        tiled = tile(record)
        exponents = [-149, -140, -126, -110, -96, -70, -64, -63, 0, 62, 63, 65, 100, 120, 123]
        x = matrix(2, len(exponents) + 3, K)
        for row, exponent in enumerate(exponents):
            x[row] = torch.ldexp(x[row].clamp(-4, 4).double(), torch.tensor(exponent)).float()
        x[-3, :32], x[-3, 32:] = x[1, :32], x[-4, 32:] * 1e-6  # one block of each in one vector
        x[-2, :32], x[-2, 32:] = 0, x[0, 32:]
        x[-1, 0] = 1e-44
        exact = x.double() @ dense.mT
        assert ((linear(tiled, x) - exact).abs() <= allowed(record, x)).all()
        alone = torch.cat([linear(tiled, row[None]) for row in x])
        assert torch.equal(alone, linear(tiled, x)), "a vector beside others is one alone"
        several = torch.cat([linear(tiled, x)] * 2, -1)
        assert torch.equal(torch.cat(linears([tiled, tiled], x), -1), several)


@each_instruction
def test_scales_of_any_size_lose_no_digits(instructions, with_instructions):
    with_instructions(instructions)
    codes = torch.randint(
        -127, 127, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    for groups in (1, 2):
        for scale, size in (
            (1e-35, 1.0),
            (1e-38, 1e10),
            (1e-30, 1e-5),
            (1e30, 1e-30),
            (1e-20, 1e38),
            (1e36, 1e-38),
        ):
            record, x = Int8(codes, torch.full((16, groups), scale)), matrix(3, 2, 64) * size
            exact = x.double() @ expand(record).double().mT
            assert (
                (linear(tile(record), x) - exact).abs()
                <= 1e-6 * (x.double().abs() @ expand(record).double().abs().mT)
            ).all()


def test_tensors_of_several_devices_are_an_error():
    blocks, scale, x = torch.zeros(1, 2, 512, dtype=torch.uint8), torch.ones(16), torch.ones(1, 64)
    far = lambda *tensors: tuple(tensor.to("meta") for tensor in tensors)
    for one, two, three in (
        (*far(blocks), scale, x),
        (blocks, *far(scale), x),
        (blocks, scale, *far(x)),
        (*far(blocks, scale), x),
    ):
        with pytest.raises((ValueError, NotImplementedError), match="on one device"):
            torch.ops.funcattn.products([one], [two], [16], three)
        with (
            pytest.raises((ValueError, NotImplementedError), match="on one device"),
            torch.no_grad(),
        ):
            torch.ops.funcattn.products([one], [two], [16], three)
    assert (
        torch.ops.funcattn.products([*far(blocks)], [*far(scale)], [16], *far(x)).device.type
        == "meta"
    )
    q = torch.zeros(1, 2, 4)
    w, expert = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long)
    for call in (
        lambda: torch.ops.funcattn.attend([q, *far(q), q], 1.0, 0, False, "flash"),
        lambda: torch.ops.funcattn.grouped(q[0], *far(w), expert),
        lambda: torch.ops.funcattn.outer_by_group(q[0], *far(q[0]), expert, 2),
    ):
        with pytest.raises(ValueError, match="on one device"):
            call()


@each_instruction
@pytest.mark.parametrize("extreme", [-128, 127])
def test_the_largest_codes_do_not_overflow(extreme, instructions, with_instructions):
    with_instructions(instructions)
    record = Int8(torch.full((16, 64), extreme, dtype=torch.int8), torch.ones(16, 1))
    for sign in (1.0, -1.0):
        assert torch.equal(
            linear(tile(record), torch.full((3, 64), sign)).round(),
            torch.full((3, 16), 64.0 * extreme * sign),
        )


@each_instruction
def test_what_is_not_finite_is_loud_and_zero_is_zero(instructions, with_instructions):
    with_instructions(instructions)
    weight = tile(fa.int4.encode(matrix(1, 33, 64)))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = matrix(2, 2, 64)
        x[1, 40] = bad
        found = linear(weight, x)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()
    assert (linear(weight, torch.zeros(2, 64)) == 0).all()
    assert (linear(weight, torch.full((2, 64), 1e-40)).abs() < 1e-28).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_shape_of_vectors(dtype):
    record = fa.int4.encode(matrix(1, 24, 64))
    for lead in ((), (1,), (2, 3)):
        x = matrix(2, *lead, 64).to(dtype)
        found = linear(tile(record), x)
        assert found.dtype == dtype
        assert found.shape == (*lead, 24)
        torch.testing.assert_close(
            found.double(), x.double() @ expand(record).double().mT, rtol=1e-2, atol=1e-2
        )
    strided = matrix(3, 64, 5).mT
    assert torch.equal(linear(tile(record), strided), linear(tile(record), strided.contiguous()))
    assert linear(tile(record), matrix(1, 0, 64)).shape == (0, 24)


def test_several_matrices_at_once_are_each_of_them():
    several = [
        tile(encode(scheme, matrix(n, 10 + 7 * n, 64))) for n, scheme in enumerate(SCHEMES.values())
    ]
    x = matrix(9, 3, 64)
    for found, weight in zip(linears(several, x), several, strict=True):
        assert torch.equal(found, linear(weight, x))
    mixed = [several[0], matrix(1, 4, 64)]
    assert torch.equal(linears(mixed, x)[1], x @ mixed[1].mT)


def test_threads_change_no_bit():
    record, x = fa.int8.encode(matrix(1, 4000, 128)), matrix(2, 3, 128)
    one = linear(tile(record), x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(tile(record), x), one)
    finally:
        torch.set_num_threads(1)


@each_scheme
def test_every_derivative_is_that_of_the_matrix(scheme):
    """torch's own integer kernels give zeros here; both the operator and the product that is routed
    to it do not.
    """
    record = encode(scheme, matrix(1, 24, 64))
    dense, (x, v) = expand(record), matrix(2, 2, 64)
    for weight in (tile(record), record):
        f = lambda x, weight=weight: (linear(weight, x) ** 3).sum()
        theirs = lambda x: ((x @ dense.mT) ** 3).sum()
        for of in (
            grad,
            hessian,
            lambda f: lambda x: jvp(f, (x,), (v,))[1],
            lambda f: lambda x: jvp(grad(f), (x,), (v,))[1],
            lambda f: lambda x: jvp(lambda y: jvp(f, (y,), (v,))[1], (x,), (v,))[1],
            lambda f: lambda x: vmap(grad(f))(torch.stack([x, v])),
            lambda f: lambda x: vjp(grad(f), x)[1](v)[0],
            lambda f: lambda x: vmap(f)(torch.stack([x, v, x])),
        ):
            found, wanted = of(f)(x), of(theirs)(x)
            assert wanted.abs().max() > 0.1
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
            )
    y = x.clone().requires_grad_()
    linear(tile(record), y).sum().backward()
    torch.testing.assert_close(y.grad, dense.sum(0), rtol=1e-5, atol=1e-4)


def test_matrices_that_are_mapped_are_each_their_own():
    records = [fa.int4.encode(matrix(n, 20, 64)) for n in range(3)]
    stacked, x = fa.tree.stack([tile(r) for r in records]), matrix(5, 64)
    found = vmap(lambda weight: linear(weight, x))(stacked)
    torch.testing.assert_close(found, torch.stack([expand(r) @ x for r in records]))


@pytest.mark.parametrize("T", [1, 5])
def test_the_compiler_keeps_it_as_one_node(T):
    weight, x = tile(fa.int4.encode(matrix(1, 24, 64))), matrix(2, T, 64)
    fast = torch.compile(lambda x: linear(weight, x * 2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), linear(weight, x * 2) + 1)
    y = x.clone().requires_grad_()
    fast(y).sum().backward()
    torch.testing.assert_close(
        y.grad, 2 * whole(weight, 64).sum(0).expand(T, 64), rtol=1e-5, atol=1e-4
    )
    torch.library.opcheck(
        torch.ops.funcattn.products.default,
        ([weight.blocks], [], [24], x),
        test_utils="test_schema",
    )
    torch.library.opcheck(
        torch.ops.funcattn.products.default,
        ([weight.blocks], [], [24], x),
        test_utils="test_faketensor",
    )


def test_sizes_and_places_that_it_does_not_take():
    assert tile(fa.int4(group=16).encode(matrix(0, 32, 64))) is None
    assert tile(fa.int8(group=8).encode(matrix(0, 32, 64))) is None
    assert tile(fa.tree.to("meta")(fa.int8.encode(matrix(0, 32, 64)))) is None
    many = tiles.most_rows(4)
    assert tile_int4(*fa.int4.encode(matrix(0, 32, 64)), rows=many) is not None
    assert tile_int4(*fa.int4.encode(matrix(0, 32, 64)), rows=many + 1) is None


BAD = {
    "blocks": (lambda w, x: ([w.blocks[..., 1:].contiguous()], [], [24], x), "are of no kind"),
    "columns": (
        lambda w, x: ([w.blocks], [], [24], x[:, :32].contiguous()),
        "blocks should be contiguous uint8",
    ),
    "rows": (lambda w, x: ([w.blocks], [], [16], x), "as many as the tiles have"),
    "no scale": (
        lambda w, x: ([w.blocks.new_zeros(2, 2, 512)], [], [24], x),
        "a scale for each row",
    ),
    "a short scale": (
        lambda w, x: ([w.blocks.new_zeros(2, 2, 512)], [x[0, :23].clone()], [24], x),
        "one for each row",
    ),
    "dtype": (lambda w, x: ([w.blocks], [], [24], x.double()), "x should be contiguous float32"),
    "strides": (lambda w, x: ([w.blocks], [], [24], x.mT), "x should be contiguous float32"),
    "count": (lambda w, x: ([w.blocks], [], [], x), "as many rows as blocks"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error(wrong, message):
    weight = tile(fa.int4.encode(matrix(1, 24, 64)))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.funcattn.products(*wrong(weight, matrix(2, 64, 64)))


def test_nothing_times_nothing():
    assert products([tile(fa.int4.encode(matrix(1, 24, 64)))], matrix(2, 0, 64)).shape == (0, 24)
    no_columns = torch.zeros(2, 0, 320, dtype=torch.uint8)
    assert torch.ops.funcattn.products([no_columns], [], [32], torch.ones(3, 0)).equal(
        torch.zeros(3, 32)
    )


def test_vectors_may_be_mapped_along_any_axis():
    """Also where each is contiguous, and all together are not."""
    tiles, x = tile_floats(matrix(0, 20, 64)), matrix(1, 3, 5, 64)
    wanted = linear(tiles, x)
    assert torch.equal(vmap(lambda row: linear(tiles, row), 1, 1)(x), wanted)
    assert torch.equal(vmap(lambda row: linear(tiles, row))(x[:, :1]), wanted[:, :1])


@pytest.mark.parametrize("group", [32, 64, None])
def test_tiles_of_8_bit_activations_multiply_what_these_are_rounded_to(group):
    """Several at once too, of one size of group and of two; under every transform of what is
    prepared.
    """
    K = 128
    weights = [
        tile_dynamic(fa.w8a8(group=size).encode(matrix(n, 20, K)))
        for n, size in enumerate((group, group, 64))
    ]
    x = matrix(5, 3, K)
    near = [packed.rounded(x, weight.scale.shape[-1]).double() for weight in weights]
    for found, weight, y in zip(linears(weights, x), weights, near, strict=True):
        exact = y @ whole(weight.tiles, K).double().mT
        bound = K * 4 * EPS * (y.abs() @ whole(weight.tiles, K).double().abs().mT)
        assert ((found - exact).abs() <= bound).all()
        assert torch.equal(linear(weight, x), found)
    assert linears(weights[:2], x.bfloat16())[1].dtype == torch.bfloat16
    torch.testing.assert_close(vmap(lambda row: linear(weights[0], row))(x), linear(weights[0], x))
    dense = whole(weights[0].tiles, K)
    torch.testing.assert_close(
        jvp(lambda x: linear(weights[0], x), (x,), (x,))[1], x @ dense.mT, rtol=1e-5, atol=1e-5
    )
    slope = vmap(grad(lambda row: sum(y.sum() for y in linears(weights[:2], row))))(x)
    each = dense.sum(0) + whole(weights[1].tiles, K).sum(0)
    torch.testing.assert_close(slope, each.expand(3, K), rtol=1e-5, atol=1e-5)


def tile_dynamic(record):
    return tiles.DynamicTiles(tile_int8(*record), record.scale)


@pytest.mark.parametrize("scheme", [fa.int8, fa.int4, fa.w8a8], ids=["int8", "int4", "w8a8"])
@pytest.mark.filterwarnings("ignore")  # torch.jit's, of every shape that becomes a constant
def test_a_traced_matrix_is_expanded_by_plain_operations(scheme):
    """Whichever comes first in a process: the answer about the operator is not asked in a trace."""
    weight = fa.quantize(scheme, "w")({"w": fa.random.normal(fa.key(0), (8, 64))})["w"]
    f = lambda x: fa.layers.linear(weight, x)
    x, other = fa.random.normal(fa.key(1), (2, 3, 64))
    traced = torch.jit.trace(f, x, check_trace=False)
    assert not [node for node in traced.graph.nodes() if node.kind().startswith("funcattn")]
    torch.testing.assert_close(traced(other), f(other), atol=1e-5, rtol=1e-5)
