"""What every test stands on: no network, one thread, the same bits each time, and one model loaded
once.

The jaxtyping and beartype import hook is left out on purpose: it breaks under torch.compile and
costs near a millisecond a call. A test that wants it decorates the one function it is about.
"""

import os
import tempfile
from pathlib import Path

# Read when the libraries are imported, so set before they are. One thread each: the order of a sum,
# and so its last bits, does not depend on the machine or on how many workers share it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would warn about each fork
# compiled once, kept
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "funcattn-inductor")
)

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# Triton's kernels then run in numpy; it reads this when it is imported, which torch does late
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: a first call compiles, and no test here asserts a time. In CI the examples are the
# same each time, so that a red run is about the change; at home they are new each time, so that
# somebody finds the next counterexample.
hypothesis.settings.register_profile("home", deadline=None, max_examples=30)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.register_profile(
    "brief", deadline=None, max_examples=6, derandomize=True, database=None
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "home")
)


# Where the tests' own tensors are: FUNCATTN_DEVICE=cuda on a machine with a GPU; =far on any, which
# tells tensors of two devices apart without one (far.py). A test that is about the CPU is marked
# `cpu`, and says why.
DEVICE = os.environ.get("FUNCATTN_DEVICE", "cpu")
if DEVICE != "cpu":
    import far

    far.settle(DEVICE, default=os.environ.get("FUNCATTN_DEFAULT", DEVICE))
# a marker, and whether it keeps a test from running here
ELSEWHERE = [("cpu", DEVICE != "cpu"), ("real", DEVICE == "far")]


# What raises on a torch before 2.12, loudly and in torch itself (docs/gotchas.md): these tests may
# fail there.
OLDER = (
    "test_a_quantized_model_runs_on_a_mesh[fp8]",
    "test_a_compiled_call_of_remat_goes_under_one_transform_after_another",
    *(
        f"test_compiled_code_gets_the_same_numbers[{f}]"
        for f in ("grad", "vmap.grad", "grad.grad", "jvp.grad")
    ),
    "test_a_compiled_tree_function_is_the_eager_one[update by regex]",
    "test_inductor_takes_the_same_step",
    "test_tests_pass_where_tensors_of_two_devices_do_not_mix",
)
IS_OLDER = torch.__version__ < torch.torch_version.TorchVersion("2.12")


def pytest_collection_modifyitems(items):
    for item in items:
        if IS_OLDER and (item.name in OLDER or "test_triton.py" in item.nodeid):
            item.add_marker(
                pytest.mark.xfail(reason="torch before 2.12, or its Triton, raises here")
            )
        for name, holds in ELSEWHERE:
            if holds and (mark := item.get_closest_marker(name)) is not None:
                item.add_marker(pytest.mark.skip(reason=f"{name}: {mark.args[0]}"))


# a script that needs Triton, which test_triton.py runs; tests of tools that `make test-peers` installs
collect_ignore = ["ahead.py", *([] if os.environ.get("FUNCATTN_PEERS") else ["peers"])]


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as `Loaded(config, params, tokenizer)`. It is a value: no test can
    change it for another.
    """
    import funcattn as fa

    loaded = fa.load("smollm2-135m")
    return loaded._replace(params=fa.tree.to(torch.get_default_device())(loaded.params))


@pytest.fixture(autouse=True)
def the_ambient_state_is_left_as_it_was():
    """A test that sets torch's default dtype or device, and does not set it back, fails itself and
    not its neighbour.
    """
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    yield
    assert (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
    ) == before
