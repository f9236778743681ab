"""Tensors in huge pages: equal values, memory of their own, freed with the last of a slab."""

import errno
import gc
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import vmap

import funcattn as fa
from funcattn.core import huge_pages
from funcattn.core.huge_pages import LEAST, PAGE, SLAB, placed

pytestmark = pytest.mark.skipif(
    not huge_pages.IS_SERVED, reason="this system has no huge pages by advice"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int8])
@pytest.mark.parametrize("size", [LEAST, LEAST + 4, 3 * LEAST + 12, SLAB, SLAB + 100])
def test_the_values_are_those_of_the_tensor(dtype: torch.dtype, size: int) -> None:
    bytes_ = torch.randint(0, 60, (size,), dtype=torch.uint8)
    x = bytes_.view(dtype) if size % 4 == 0 else bytes_
    y = placed(x)
    assert y is not x
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    assert y.data_ptr() % huge_pages.LINE == 0


@pytest.mark.parametrize("rows", [3, 300])
def test_a_transposed_tensor_becomes_contiguous(rows: int) -> None:
    x = fa.random.normal(fa.key(0), (rows, 200)).mT
    y = placed(x)
    assert y.is_contiguous()
    assert torch.equal(y, x)


def test_small_tensors_and_other_devices_stay_as_they_are() -> None:
    small, other = torch.ones(8), torch.empty(LEAST, device="meta")
    assert placed(small) is small
    assert placed(other) is other


def test_tensors_of_a_slab_share_nothing() -> None:
    size = LEAST // 4
    parts = [placed(torch.full((size,), float(i))) for i in range(3 * SLAB // LEAST)]
    versions = [part._version for part in parts]
    parts[1].zero_()
    assert [part._version for part in parts[2:]] == versions[2:]
    assert all(bool((part == i).all()) for i, part in enumerate(parts) if i != 1)
    assert all(part.untyped_storage().nbytes() == 4 * size for part in parts)


def test_a_slab_lives_as_long_as_its_last_tensor() -> None:
    huge_pages._open = None
    first, second = (placed(torch.ones(LEAST)) for _ in range(2))
    held = huge_pages._open
    assert held is not None
    alive = weakref.ref(held.memory)
    huge_pages._open = None
    del held, first
    gc.collect()
    assert alive() is not None
    assert bool((second == 1).all())
    del second
    gc.collect()
    assert alive() is None


def test_it_begins_at_a_huge_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_open", None)
    assert placed(torch.ones(LEAST)).data_ptr() % PAGE == 0
    assert placed(torch.ones(SLAB)).data_ptr() % PAGE == 0


def test_threads_get_memory_of_their_own() -> None:
    make = lambda i: placed(torch.full((LEAST,), i, dtype=torch.int32))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(400)))
    assert all(bool((x == i).all()) for i, x in enumerate(made))


@pytest.mark.parametrize("size", [5, PAGE, SLAB + 3])
def test_zeros_are_those_of_torch(size: int) -> None:
    like = torch.ones(2, dtype=torch.float16)
    found = huge_pages.zeros(like, 2, size)
    assert torch.equal(found, like.new_zeros(2, size))
    found.add_(1)
    assert bool((huge_pages.zeros(like, 2, size) == 0).all())


def test_zeros_inside_transforms_are_those_of_their_level() -> None:
    found = vmap(lambda x: huge_pages.zeros(x, SLAB).add_(x[0]))(torch.ones(3, 2))
    assert found.shape == (3, SLAB)
    with FakeTensorMode() as mode:
        fake = huge_pages.zeros(mode.from_tensor(torch.ones(2)), SLAB)
    assert isinstance(fake, FakeTensor)


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Refused)
    x = fa.random.normal(fa.key(0), (SLAB,))
    assert torch.equal(placed(x), x)
