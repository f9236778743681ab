"""The package as others get it: built, installed where nothing of the checkout is, and tried
without what only developers have.
"""

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from places import ROOT

DEVELOPERS = (
    "hypothesis",
    "pytest",
    "transformers",
    "matplotlib",
    "mkdocs",
    "jupytext",
    "nbformat",
    "tqdm",
    "huggingface_hub",
    "lm_eval",
)
TRIAL = f"""
import importlib.util, sys
from pathlib import Path

class Refused:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {DEVELOPERS!r}:
            return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise ImportError(f"{{module.__name__}} is for developers")

sys.meta_path.insert(0, Refused())
import torch, funcattn as fa
from torch.func import vmap
assert Path(fa.__file__).is_relative_to(sys.argv[1]), fa.__file__
assert (Path(fa.__file__).parent / "py.typed").exists()
config, params, tokenizer = fa.load("smollm2-135m")
model = fa.decoder(config)
prompt = torch.tensor(tokenizer.encode("The capital of France is"))
write = lambda key: fa.generate(key, model, params, prompt, steps=2)[0]
print(tokenizer.decode(vmap(write)(fa.split(fa.key(0)))[0]))
small = fa.quantize(fa.int8)(params)
fa.save(sys.argv[1] + "/saved", config, small, tokenizer)
assert fa.tree.paths(fa.load(sys.argv[1] + "/saved").params) == fa.tree.paths(small)
"""

pytestmark = pytest.mark.slow


def install(package, place):
    """Install a wheel or a source distribution, without what it needs, into a folder."""
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--target",
        str(place),
    ]
    command = [sys.executable, "-m", "pip", "install", *options, str(package)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a source distribution, and a wheel that was made of it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The wheel for Linux on x86-64, of which auditwheel has told the oldest Linux."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"FUNCATTN_WHEEL": "native"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*-py3-none-linux_x86_64.whl")
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [
        "auditwheel",
        "repair",
        "--exclude",
        "libtorch*",
        "--exclude",
        "libc10*",
        "--wheel-dir",
        str(folder / "repaired"),
        str(wheel),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"PATH": tools}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


@pytest.mark.cpu("the operators in C++ are for the CPU")
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="for Linux on x86-64"
)
def test_the_wheel_for_linux_brings_the_operators_and_wants_no_compiler(compiled, tmp_path):
    assert re.fullmatch(
        r"funcattn-[\d.]+-py3-none-manylinux\w*_2_\d\d_x86_64(\.manylinux\w+)?\.whl", compiled.name
    )
    install(compiled, tmp_path / "installed")
    nothing = {
        "PYTHONPATH": str(tmp_path / "installed"),
        "CXX": "no-such-compiler",
        "FUNCATTN_CACHE": str(tmp_path / "cache"),
    }
    script = """
import sys, torch, funcattn as fa
from funcattn.quantization import tiles
assert fa.__file__.startswith(sys.argv[1]) and not tiles.missing(), tiles.missing()
weight, x = fa.int8.encode(fa.random.normal(fa.key(0), (32, 64))), fa.random.normal(fa.key(1), (64,))
packed = fa.layers.prepare(weight, 1)
print(type(packed).__name__, bool((fa.layers.linear(packed, x) - fa.layers.linear(weight, x)).abs().max() < 1e-4))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | nothing, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "True"
    assert not (tmp_path / "cache").exists()  # nothing was compiled
    shown = [sys.executable, "-m", "funcattn", "inspect", "--machine"]
    done = subprocess.run(
        shown, capture_output=True, text=True, timeout=120, env=os.environ | nothing, cwd=tmp_path
    )
    assert ", of the installed wheel" in done.stdout


def test_the_wheel_holds_the_library_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "funcattn/py.typed" in names
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"funcattn", "pytest_funcattn.py"}  # the library, and its plugin of pytest
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "funcattn").rglob("*.*")
        if path.parent.name != "__pycache__"
    }
    assert {name for name in names if name.startswith("funcattn/")} == files


def test_the_source_distribution_holds_what_its_tests_need(built):
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "funcattn/__init__.py",
        "tests/conftest.py",
        "benchmarks/_timing.py",
    } <= names
    assert not [name for name in names if name.startswith(("notebooks", "site", ".venv"))]


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_installed_elsewhere_writes_and_saves(built, tmp_path, pattern):
    (package,) = built.glob(pattern)
    place = tmp_path / "installed"
    install(package, place)
    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", TRIAL, str(place)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "Paris."
    shown = [sys.executable, "-m", "funcattn", "--help"]
    done = subprocess.run(
        shown, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "generate" in done.stdout
