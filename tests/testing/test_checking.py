"""`check`: each law of each kind is named where it is broken, with a small input as code that runs;
what cannot be tried is told and is no mistake.
"""

import itertools
import json
import re
import sys
import time

import gallery
import pytest
import torch
from hypothesis import strategies as st
from places import TESTS

import funcattn as fa
from funcattn import caches, sampling, speculation
from funcattn.testing import agreement, dense, laws, signatures, snippets, subjects
from funcattn.testing.checking import Options, check, examine, plan
from funcattn.testing.findings import Finding, Findings, table_lines
from funcattn.testing.signatures import NotOffered

pytestmark = pytest.mark.cpu("inputs are on the device of the options, and not on torch's default")

GALLERY = f"{TESTS / 'gallery.py'}:"
# laws that tell the three fast mistakes, and one that holds of each
FEW = ("agrees_with_the_reference", "future_cannot_change_the_past", "commutes_with_vmap")
OTHERS = tuple(law.__name__ for law in laws.kernel if law.__name__ not in FEW)


def options_of(line):
    words = line.split()
    return {"signature": words[1]} if words else {}


def assert_pasted_code_fails(finding, match):
    with pytest.raises(AssertionError, match=match):
        exec(finding.code, {})


@pytest.mark.parametrize(
    ("kernel", "law", "numbers"),
    [
        ("wrong_scale", "agrees_with_the_reference", 5),
        ("sees_the_next_key", "future_cannot_change_the_past", 5),
        ("examples_mixed", "commutes_with_vmap", 5),
    ],
)
def test_a_wrong_kernel_is_named_by_its_law_with_a_tiny_input(kernel, law, numbers):
    line, named = gallery.WRONG[kernel]
    found = check(
        GALLERY + kernel, laws=("kernel",), without=OTHERS, examples=10, **options_of(line)
    )
    (row,) = [row for row in found.broken if row.law == named == law]
    assert not found.ok
    assert row.told.startswith(law)
    values = re.findall(r"^[qkv] = torch.tensor\((.*), dtype", row.code, re.MULTILINE)
    assert len(values) == 3
    assert sum(len(re.findall(r"[\d.]+", value)) for value in values) <= numbers
    assert_pasted_code_fails(row, law)


@pytest.mark.parametrize("kernel", ["by_blocks", "as_flash"])
def test_a_right_kernel_passes(kernel):
    line = gallery.RIGHT[kernel]
    found = check(GALLERY + kernel, depth=1, examples=2, **options_of(line))
    assert found.ok
    assert {row.status for row in found.rows} == {"passed", "not offered"}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [*gallery.RIGHT, *gallery.WRONG])
def test_the_whole_gallery_is_told_apart_by_the_laws_within_a_minute(kernel):
    line, law = gallery.WRONG.get(kernel, (gallery.RIGHT.get(kernel), None))
    begun = time.process_time()
    found = check(GALLERY + kernel, **options_of(line))
    assert time.process_time() - begun < 60  # of one core; `seconds` bounds the wall's clock
    assert found.ok == (law is None)
    assert not [row for row in found.rows if row.status in ("raises", "out of time")]
    if law is not None:
        (row,) = [row for row in found.broken if row.law == law]
        assert_pasted_code_fails(row, law)


def test_a_broken_nesting_is_told_by_the_smallest_of_a_few_inputs():
    found = check(GALLERY + "tangent_is_zero", laws=("transforms",), signature="dense", depth=1)
    row = found.told()[0]
    assert row.law == "jvp(f)"
    assert {row.law: row.status for row in found.rows[:3]} == {
        "grad(f)": "passed",
        "jvp(f)": "broken",
        "vmap(f)": "passed",
    }
    assert "(1, 1, 2), (1, 1, 2), (1, 1, 2)" in row.code
    assert_pasted_code_fails(row, re.escape("jvp(f)"))


@pytest.mark.parametrize(
    ("subject", "given", "law"),
    [
        (sampling.top_p(0.9), {}, None),
        (
            sampling.stateless(lambda logits: logits.clamp(min=-2)),
            {"without": tuple(law.__name__ for law in laws.sampler[2:])},
            "no_hidden_token_comes_back",
        ),
        (fa.int4, {}, None),
        (lambda tree: {"model": tree}, {}, "keeps_paths"),
        (speculation.tokenwise, {}, None),
        (
            speculation.tokenwise._replace(count=lambda h, u: (u <= h).cumprod(-1).sum(-1)),
            {},
            "regions_have_the_volume_of_the_pmf",
        ),
        (caches.Cache, {"without": ("every_verb_writes_what_a_loop_over_apply_writes",)}, None),
        (
            caches.quantized(bits=4, block=2, recent=0, sinks=0),
            {"without": tuple(law.__name__ for law in laws.cache[2:])},
            "remembers_what_was_committed",
        ),
    ],
    ids=["sampler", "hiding", "scheme", "path", "rule", "closed end", "cache", "rounding cache"],
)
def test_other_kinds_are_held_to_their_own_laws(subject, given, law, monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "SUBJECT", subject, raising=False)
    found = check(subject, "here:SUBJECT", examples=6, **given)
    monkeypatch.setitem(sys.modules, "here", module)
    assert found.ok == (law is None), found
    if law is not None:
        (row,) = [row for row in found.broken if row.law == law]
        assert_pasted_code_fails(row, law)


def test_what_raises_is_no_mistake_and_is_told_in_one_line():
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found = check(sdpa, depth=1, examples=3, without=OTHERS[:-2], laws=("kernel", "transforms"))
    rows = {row.law: row for row in found.rows}
    assert found.ok
    assert rows["jvp(f)"].status == "raises"
    assert "forward AD" in rows["jvp(f)"].told
    assert "\n" not in rows["jvp(f)"].told
    assert (rows["vmap(f)"].status, rows["grad(f)"].told) == ("passed", "")


def test_code_holds_what_a_kernel_was_given_and_not_what_it_wrote_there():
    def writing(q, k, v):
        return q.mul_(2)[..., :1].expand(*q.shape[:-1], v.shape[-1])

    found = check(writing, laws=("kernel",), without=OTHERS, examples=5, seconds=20.0)
    (row,) = [row for row in found.broken if row.law == "agrees_with_the_reference"]
    assert "q = torch.tensor([[[2.0" in row.code


def test_where_nothing_passes_nothing_is_well():
    def none(q, k, v, mask):
        if q.requires_grad or torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError("no derivative")
        return dense.attend(q, k, v, mask)

    found = check(none, laws=("transforms",), depth=1)
    assert {row.status for row in found.rows} == {"raises"}
    assert not found.ok
    assert not Findings("", "", {}, ()).ok


def test_a_kernel_that_asserts_by_itself_raises_and_breaks_no_law():
    def strict(q, k, v, mask):
        if q.shape[-2] > 2:
            raise AssertionError("at most two queries")
        return dense.attend(q, k, v, mask)

    law = laws.kernels.agrees_with_the_reference
    q = torch.ones(1, 3, 1, dtype=torch.float64)
    drawn = st.just((q, q, q, None, fa.key(0)))
    row = examine(law, strict, drawn, lambda *_: "", 3, 0, time.monotonic() + 60)
    assert (row.status, row.told) == ("raises", "AssertionError: at most two queries")


def test_inputs_that_a_kernel_refuses_are_not_drawn_and_are_told():
    def narrow(q, k, v):
        if q.dtype == torch.float64:
            raise TypeError("no float64")
        if q.shape[1] != k.shape[1]:
            raise ValueError("as many heads\nof keys")
        return gallery.definition(q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool))

    found = check(narrow, depth=1, examples=3)
    assert found.setting == "kernel(plain), float32 on cpu"
    assert found.refused == {
        "float64": "TypeError: no float64",
        "grouped": "ValueError: as many heads of keys",
    }
    assert "refuses fewer key heads than query heads: ValueError" in str(found)
    statuses = {row.law: row.status for row in found.rows}
    assert statuses["future_cannot_change_the_past"] == "not offered"
    assert statuses["merge_of_any_split_is_the_whole"] == "not offered"
    assert set(statuses.values()) == {"passed", "not offered"}


def test_what_a_kernel_does_not_claim_is_left_out_by_name():
    wrong = GALLERY + "nan_for_an_empty_row"
    few = ("agrees_with_the_reference", "masked_rows_are_zero_with_zero_gradients")
    rest = tuple(law.__name__ for law in laws.kernel if law.__name__ not in few)
    assert not check(wrong, laws=("kernel",), without=rest, examples=20).ok
    found = check(wrong, laws=("kernel",), without=(*rest, "empty_rows"), examples=20)
    assert found.ok
    assert [row.status for row in found.rows] == ["passed", "not offered"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nestings_in_fewer_digits_are_held_to_plain_operations_of_the_dtype(dtype):
    right = check(GALLERY + "closed", laws=("transforms",), dtype=dtype, depth=1)
    assert {row.status for row in right.rows} == {"passed"}
    wrong = check(GALLERY + "wrong_scale", laws=("transforms",), dtype=dtype, depth=1)
    assert wrong.broken
    assert_pasted_code_fails(wrong.broken[0], re.escape(wrong.broken[0].law))


def test_the_same_seed_finds_the_same_input():
    of = lambda seed: check(
        GALLERY + "wrong_scale", laws=("kernel",), without=OTHERS, examples=5, seed=seed
    )
    assert of(3) == of(3)


def test_time_ends_a_search_and_what_was_not_reached_is_told():
    begun = time.monotonic()

    def slow(q, k, v, mask):
        time.sleep(0.05)
        return dense.attend(q, k, v, mask)

    found = check(slow, seconds=2.0, examples=1000)
    assert time.monotonic() - begun < 20
    assert max(row.examples for row in found.rows) < 100


def test_errors_are_in_units_of_the_rounding_of_the_dtype():
    law = laws.kernels.agrees_with_the_reference
    q = k = v = torch.ones(1, 2, 1)
    spoilt = lambda *x: dense.attend(*x).out * (1 + 3 * 2**-23)
    with agreement.measured() as errors:
        law(spoilt, q, k, v, None, fa.key(0))
    assert errors == pytest.approx([3.0])
    bfloat = lambda *x: torch.full_like(x[2], 1 + 2**-7)
    with agreement.measured() as errors:
        law(bfloat, *(x.bfloat16() for x in (q, k, v)), None, fa.key(0))
    assert errors == pytest.approx([1.0])


# What is checked, and how it is called.


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("attend", "module:object or file.py:object, got 'attend'"),
        ("a b:c", "module:object or file.py:object"),
        ("nothing.there:f", "cannot be imported: ModuleNotFoundError"),
        ("nothing.py:f", "no such file"),
        ("funcattn:atend", "funcattn has no atend. Did you mean attend?"),
        ("funcattn:attend +", "an attribute or a call of one"),
        ("funcattn:__import__('os').system('true')", "has no __import__"),
        ("funcattn.sampling:top_k(open('x'))", "an attribute or a call of one"),
        ("funcattn.sampling:top_k(-1)", "top_k\\(-1\\) raises ValueError"),
        ("funcattn:key(0)", "a kernel of .* Choose laws"),
    ],
)
def test_a_name_of_nothing_is_one_clear_error(name, complaint):
    with pytest.raises(ValueError, match="check") as caught:
        check(name)
    assert re.search(complaint, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"laws": ("kernle",)}, "Did you mean kernel?"),
        ({"without": ("commutes_with_vmpa",)}, "Did you mean commutes_with_vmap?"),
        ({"signature": "spda"}, "Did you mean sdpa?"),
        ({"laws": ("kernel", "sampler")}, "of one kind of object"),
        ({"signature": "plain", "dtype": torch.int64}, "the kernel should be callable"),
    ],
)
def test_an_unknown_option_is_one_clear_error(options, complaint):
    with pytest.raises(ValueError, match="check: ") as caught:
        check(gallery.closed, **options)
    assert complaint in str(caught.value)


def test_kinds_and_signatures_are_known_by_types_and_parameters():
    kernel = fa.kernels.Kernel("mine", "", lambda r: "", lambda r: None)
    assert [
        subjects.kind_of(x)
        for x in (
            fa.attend,
            kernel,
            sampling.greedy,
            caches.Cache,
            caches.ring(window=3),
            fa.int8,
            fa.cast(torch.float32),
            speculation.blockwise,
            7,
        )
    ] == [
        *("kernel", "kernel", "sampler", "cache", "cache", "transform", "transform"),
        *("acceptance", None),
    ]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert [
        subjects.signature_of(f)
        for f in (fa.attend, gallery.as_flash, gallery.as_sdpa, sdpa, gallery.by_blocks)
    ] == ["mask", "flash", "sdpa", "sdpa", "plain"]


def test_a_kernel_value_of_the_library_is_checked_as_a_function():
    run = lambda r: fa.attend(r.q, r.k, r.v, r.mask, scale=r.scale, bias=r.bias, kernel="reference")
    kernel = fa.kernels.Kernel("mine", "the reference", lambda r: "", run)
    assert check(kernel, laws=("kernel",), without=OTHERS, examples=3).ok


@pytest.mark.parametrize("signature", signatures.SIGNATURES)
def test_an_adapted_kernel_is_the_definition_or_says_what_it_cannot_express(signature):
    f = {
        "mask": gallery.closed,
        "dense": gallery.by_booleans,
        "sdpa": gallery.as_sdpa,
        "flash": gallery.as_flash,
        "causal": gallery.by_blocks,
        "plain": lambda q, k, v: dense.attend(q, k, v).out,
    }[signature]
    kernel = signatures.adapt(f, signature)
    draw = lambda n, *shape: fa.random.normal(fa.key(n), shape, torch.float64)
    boolean = fa.random.bernoulli(fa.key(9), 0.7, (1, 4, 4))
    said = 0
    for lead, mask in itertools.product(
        [(), (2,), (3, 2)], [None, fa.masks.causal(4), fa.masks.window(4, 2), boolean]
    ):
        q, k, v = draw(0, *lead, 4, 4, 3), draw(1, *lead[1:], 2, 4, 3), draw(2, 2, 4, 2)
        try:
            found = kernel(q, k, v, mask)
        except NotOffered:
            said += 1
            continue
        out = found if isinstance(found, torch.Tensor) else found[0]
        assert torch.allclose(out, dense.attend(q, k, v, mask).out, atol=1e-12)
    assert said == {"flash": 6, "causal": 9, "plain": 9}.get(signature, 0)
    with pytest.raises(ValueError, match="adapt: signature should be one of mask"):
        signatures.adapt(f, "other")


# Tables and code.


def test_code_of_a_value_is_the_value():
    values = [
        torch.tensor([[1.5, -torch.inf]], dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.tensor(3),
        fa.key(2**32 - 1),
        fa.key(2**40),
        fa.masks.causal(3),
        fa.masks.window(3, 2),
        {"a": (torch.ones(2), ()), "b": [torch.arange(2)]},
        None,
    ]
    for value in values:
        again = eval(snippets.literal(value), {"torch": torch, "fa": fa})
        assert fa.tree.paths(again) == fa.tree.paths(value)
        for a, b in zip(fa.tree.leaves(again), fa.tree.leaves(value), strict=True):
            assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
    assert snippets.literal(fa.masks.causal(3)) == "fa.masks.causal(3)"


def test_a_table_fits_eighty_columns_and_json_says_the_same():
    rows = (
        Finding(
            "any_program_reads_as_its_rows_and_changes_no_earlier_value",
            "not offered",
            None,
            0,
            "x " * 99,
            "",
        ),
        Finding("jvp(f)", "raises", None, 1, "NotImplementedError: " + "y" * 60, ""),
        Finding(
            "hvp_agrees_with_the_reference", "broken", float("inf"), 3, "it is off", "assert x"
        ),
        Finding("commutes_with_vmap", "passed", 1234567.0, 3, "", ""),
    )
    found = Findings("kernels.py:f", "kernel(mask)", {"leads": "TypeError: " + "z " * 90}, rows)
    assert max(map(len, str(found).splitlines())) <= 80
    assert [table_lines(row, set())[0].split() for row in rows[2:]] == [
        ["hvp_agrees_with_the_reference", "BROKEN", "inf"],
        ["commutes_with_vmap", "passed", "1e+06"],
    ]
    told = json.loads(found.as_json())
    assert [row["status"] for row in told["laws"]] == [row.status for row in rows]
    assert told["laws"][2]["worst"] == "inf"
    assert told["ok"] is False


def test_a_plan_tries_nothing_yet():
    def never(q, k, v, mask):
        if torch._C._functorch.maybe_current_level() is not None:
            raise AssertionError
        return dense.attend(q, k, v, mask)

    tasks = plan(never, None, Options(depth=1)).tasks
    assert [task.name for task in tasks[:2]] == [law.__name__ for law in laws.kernel[:2]]
    assert [task.name for task in tasks[14:17]] == ["grad(f)", "jvp(f)", "vmap(f)"]
