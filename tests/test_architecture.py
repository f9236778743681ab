"""The shape of the library, read from its source: floors, sizes, names, and what it must never
call.

Each rule is a function from a package's folder to a list of complaints, so that the last test can
show it a package that breaks the rule and see it complain.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, TESTS

PACKAGE = ROOT / "funcattn"

# A room imports only from floors below its own. A folder is one room; its files import each other
# in any order without a circle.
FLOORS = [
    {"records", "core", "tree", "native", "randomness", "progress"},
    {
        "masks",
        "collectives",
        "rematerialization",
        "taps",
        "curvature",
    },
    {"kernels"},
    {"layers"},
    {"caches", "models", "sampling", "quantization", "vocabulary"},
    {"transformer", "low_rank"},
    {"sharding", "compilation", "quantization.calibration", "decoding"},
    {
        "speculation",
        "drafters",
        "search",
        "serving",
        "checkpoints",
        "families",
        "training",
        "evaluation",
        "interop",
    },
    {"__init__"},  # the face: a map of all below
    {"cli", "__main__"},
]
WITHIN = {  # neighbours on one floor
    "core": {"records"},
    "tree": {"records", "core"},
    "native": {"core"},
    "randomness": {"records", "core", "tree", "native"},
    "progress": {"core"},
    "rematerialization": {"collectives"},
    "models": {"caches"},
    "sampling": {"models"},
    "quantization": {"models"},
    "interop": {"evaluation", "checkpoints"},
    "training": {"checkpoints"},
    "drafters": {"checkpoints", "training"},  # whose face it is too
    "families": {"checkpoints"},  # whose face it is
    "__main__": {"cli"},
}
INNER = {"quantization.calibration"}  # rooms inside of a folder, on a floor of their own
APART = "testing"  # may import anything; nothing imports it

LONGEST = 400  # lines: what can be read in one sitting
# Where tests are: a module's are in the folder of its name, tests/caches/test_paged.py for
# caches/paged.py, or with its folder in front where that name is taken
# (tests/interop/test_interop_sdpa.py); those of a folder's face are in the folder. tests of a whole
# walk, of the repository and its pages, or of torch, which stand at the top
WHOLE = {
    *(
        "architecture",
        "canaries",
        "citations",
        "docstrings",
        "lock",
        "notebooks",
        "pytest_funcattn",
        "readme",
        "site",
        "smollm2",
        "tools",
        "wheel",
    ),
    # of other people's tools, which `make test-peers` installs
    *("peers.bergson", "peers.captum", "peers.curvlinops", "peers.dattri", "peers.laplace"),
    "peers.compressed_tensors",
    *("peers.hessian_eigenthings", "peers.opacus", "peers.posteriors"),
    *("devices", "distributed.differing", "distributed.gloo", "family_peers", "gguf_families"),
}
UNMIRRORED = {"__init__", "__main__"}  # which say what is in other modules
# modules without a file of their own: a test of their room, or of what calls them, holds their laws
TESTED_BY = {
    # The room is tested through its face, in whose words the laws are.
    "caches.caches": "caches: branch dense making",
    "cli.cli": "cli: arguments chatting commands evaluating generating inspecting machine sessions "
    "templating",
    "collectives.collectives": "collectives: bindings groups operations verbs",
    "compilation.compilation": "compilation: compiled conditions model stack",
    "evaluation.evaluation": "evaluation: scores",
    "evaluation.pictures": "evaluation: drawing",
    "kernels.kernels": "kernels: products reference sdpa",
    "layers.layers": "layers: activations factors products",
    "layers.scans": "layers: gated_linear delta_rule state_spaces",
    "quantization.quantization": "quantization: formats multiplying packed reports schemes "
    "tiling transforms",
    "quantization.calibration.calibration": "quantization.calibration: clipping gptq_columns "
    "layerwise smoothquant",
    "randomness.randomness": "randomness: draws keys",
    "sampling.sampling": "sampling: composition",
    "sharding.sharding": "sharding: devices mapping mesh models rules storing vocabulary; caches: "
    "sharded; training: norms",
    "testing.checking": "testing: accepted findings nesting signatures snippets subjects",
    "testing.testing": "testing: agreement dense strategies transforms; "
    "testing.laws: acceptances comparisons kernels pasts samplers texts trees",
    "training.training": "training: losses",
    "transformer.layer_inputs": "transformer: streams layer_sizes layer_spec; caches: grouped",
    "transformer.transformer": "transformer: affine arguments config feed_forward forward head_groups layer model weights",
    "vocabulary.vocabulary": "vocabulary: api functions likelihoods operators passes; transformer: "
    "likelihoods",
    "tree.tree": "tree: mapping nodes summaries",
    "drafters": "decoding.speculative: drafters",
    "search": "decoding: beams",
    "serving": "decoding: batching",
    "speculation": "decoding.speculative: acceptance regions rules",
    # One function in several modules.
    "checkpoints.families.families": ": families; checkpoints.families: conventions layouts "
    "metadata positions tables weights",
    "family_peers": "checkpoints.families: bart bert delta_nets dense_variants distances falcon fused gated gemma gemma4 gpt "
    "gpt_variants granite granite_mixtures kimi laguna latent_layouts latent_variants layer_norms llama llama4 "
    "llama_variants mambas mimo mixture_variants mixtures nemotron_hybrids olmo router_variants short_convolutions "
    "sigmoid_mixtures towers",
    "gguf_families": "checkpoints.families: architectures gemma_gguf gguf_tensors latent_gguf",
    "kernels.closed.flash": "kernels.closed: algebra functions log_sum_exp operators specs; "
    "kernels.backends: aten",
    "kernels.backends.triton.triton": "kernels.backends.triton: "
    "addresses block_sizes conditions language launching pieces programs softmax tuning",
    "training.optimizers": "training: combined fused leafwise schedules",
    "checkpoints.tokenizer.templates": "checkpoints.tokenizer.sandbox: environment worker",
    # A part of what this test is about.
    "checkpoints.families.config_json": "checkpoints.families: ignored",
    "checkpoints.hf.quantized.quantized": "checkpoints.hf.quantized: awq_files bitsandbytes "
    "codes compressed_tensors float8 gptq_files hqq leaves methods mlx mxfp4 stored torchao",
    "checkpoints.hf.folder": "checkpoints.hf: weights; checkpoints: loading",
    "checkpoints.hf.adapters": "checkpoints.hf: patterns peft_settings saved_adapters",
    "checkpoints.parts_index": "checkpoints: parts",
    "checkpoints.tokenizer.prompts": "checkpoints.tokenizer.sandbox: origins texts",
    "checkpoints.tokenizer.tokenizer": "checkpoints.tokenizer: library other_files",
    "checkpoints.gguf.gguf_file": "checkpoints.gguf: header",
    "checkpoints.tokenizer.gguf_metadata": "checkpoints.gguf: metadata",
    "caches.quantized_blocks": "caches: coded_rows",
    "cli.terminal": "core: errors",
    "collectives.agreement": "collectives: fingerprint",
    "core.atomic": "checkpoints: writing",
    "decoding.generation": "decoding: requests streams",
    "distributed.gloo": "sharding: costs",
    "interop.flex": "interop: block_masks",
    "interop.interop_harness": "interop: harness_options",
    "interop.interop_jagged": "kernels.backends: masking",
    "kernels.api": "kernels: arguments dropout",
    "kernels.dispatch": "kernels: request",
    "kernels.score_mod": "kernels: block_sums",
    "kernels.backends.torch_blocks": "kernels.backends: torch_attend",
    "quantization.tiles": "quantization: fast",
    "tools": "kernels.closed: flops",
    "transformer.lengths": "transformer: rereading",
    "layers.recurrence": "layers: delta_states",
    "transformer.recurrent": "transformer: mixers state_spaces; caches: delta hybrid; "
    "layers: space_states",
    "transformer.partition": "transformer: parallel; layers: layouts",
}

GLOBAL_DRAWS = {
    *(
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "randint_like",
        "normal",
        "bernoulli",
        "poisson",
    ),
    *(
        "multinomial",
        "binomial",
        "dropout",
        "seed",
        "initial_seed",
        "manual_seed",
        "get_rng_state",
        "set_rng_state",
        "Generator",
    ),
}
DRAWING_METHODS = {
    *(
        "normal_",
        "uniform_",
        "bernoulli_",
        "exponential_",
        "random_",
        "cauchy_",
        "geometric_",
        "log_normal_",
        "multinomial",
    ),
}


# What is there: modules by dotted name below the package, and which imports which.


def modules(package: Path) -> dict[str, ast.Module]:
    """`kernels.choice` -> its syntax tree; a folder's `__init__` goes by the folder's name, the
    package's own by `__init__`.
    """
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def targets(name: str, node: ast.AST, package: Path) -> list[str]:
    """What one import statement of module `name` names, below the package: `from ..layers import
    linear` -> layers.linear.
    """
    here = [] if name == "__init__" else name.split(".")
    folder = here if (package / Path(*here)).is_dir() else here[:-1]
    if isinstance(node, ast.Import):
        whole = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = [package.name, *folder[: len(folder) - node.level + 1]] if node.level else []
        whole = [
            ".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names
        ]
    else:
        whole = []
    return [path.partition(".")[2] for path in whole if path.split(".")[0] == package.name]


def imports(name: str, tree: ast.Module, known: dict[str, ast.Module], package: Path) -> set[str]:
    """The modules of this package that a module imports, wherever in its source: late and
    type-checking imports too.
    """
    named = {target for node in ast.walk(tree) for target in targets(name, node, package)}
    return {
        target if target in known else target.rpartition(".")[0] or "__init__" for target in named
    }


def room(name: str) -> str:
    return next(
        (inner for inner in INNER if f"{name}.".startswith(f"{inner}.")), name.split(".")[0]
    )


def floor(name: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if room(name) in rooms), None)


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes at the top of a module, and the methods of its classes, that a user may
    call by name.
    """
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if (
            isinstance(node, kinds)
            and not node.name.startswith("_")
            and "overload" not in map(ast.unparse, node.decorator_list)
        ):
            yield node.name, node
            if isinstance(node, ast.ClassDef) and not any(
                "Function" in ast.unparse(base) for base in node.bases
            ):
                for method in node.body:
                    if isinstance(method, kinds) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method


# The rules.


def imports_point_downward(package: Path) -> list[str]:
    known, complaints = modules(package), []
    for name, tree in known.items():
        if room(name) == APART:
            continue
        here = floor(name)
        if here is None:
            complaints.append(f"{name} stands on no floor")
            continue
        for target in imports(name, tree, known, package):
            there = floor(target)
            if room(target) == APART:
                complaints.append(f"{name} imports {target}, which stands apart")
            elif room(target) == room(name) or room(target) in WITHIN.get(room(name), ()):
                continue
            elif there is None or there >= here:
                complaints.append(f"{name} (floor {here}) imports {target} (floor {there})")
    return complaints


def imports_make_no_circle(package: Path) -> list[str]:
    known, complaints, done = modules(package), [], set()
    graph = {
        name: sorted(imports(name, tree, known, package) - {name}) for name, tree in known.items()
    }

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            complaints.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return complaints


def modules_are_short(package: Path) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    return [
        f"{path.name} has {length} lines, above {LONGEST}"
        for path, length in lengths.items()
        if length > LONGEST
    ]


def module_names_are_their_own(package: Path) -> list[str]:
    """A module named as a public function rebinds it when imported late; one named as the standard
    library's hides it.
    """
    known, complaints = modules(package), []
    faces = {
        name: tree
        for name, tree in known.items()
        if name == "__init__" or (package / Path(*name.split("."))).is_dir()
    }
    exported = {
        face: {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias, target in zip(node.names, targets(face, node, package), strict=True)
            if target not in known
        }
        for face, tree in faces.items()
    }
    for name in known:
        last = name.split(".")[-1]
        if last in sys.stdlib_module_names:
            complaints.append(f"{name} bears the name of a module of the standard library")
        if last in exported["__init__"] | exported.get(name.rpartition(".")[0], set()):
            complaints.append(f"{name} bears a public name")
        if last in {"utils", "util", "helpers", "common", "misc"}:
            complaints.append(f"{name} says nothing about what is in it")
    return complaints


def randomness_is_explicit(package: Path) -> list[str]:
    """Nothing draws from a generator that torch, numpy or Python holds for everyone."""
    complaints = []
    for name, tree in modules(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                used = [(ast.unparse(node.value), node.attr)]
            elif isinstance(node, ast.Import):
                used = [("", alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used = [(node.module or "", alias.name) for alias in node.names]
            elif (
                isinstance(node, ast.keyword)
                and node.arg == "dropout_p"
                and ast.unparse(node.value) not in {"0.0", "0"}
            ):
                complaints.append(
                    f"{name}:{node.value.lineno} dropout_p draws from torch's generator"
                )
                continue
            else:
                continue
            for base, member in used:
                foreign = base.split(".")[0] in {"torch", "F", "nn", "np", "numpy"}
                of_python = (base, member) == ("", "random") or (
                    base == "random" and isinstance(node, ast.ImportFrom)
                )
                of_numpy = foreign and (member == "random" or base.endswith(".random"))
                if (
                    of_python
                    or of_numpy
                    or (foreign and member in GLOBAL_DRAWS)
                    or member in DRAWING_METHODS
                ):
                    complaints.append(f"{name}:{node.lineno} {base}.{member}".replace(" .", " "))
    return complaints


def everything_public_is_described(package: Path) -> list[str]:
    complaints = []
    for name, tree in modules(package).items():
        if not ast.get_docstring(tree):
            complaints.append(f"{name} does not say what it is for")
        for label, node in public(tree):
            is_overload = any(
                isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list
            )
            if not is_overload and not ast.get_docstring(node):
                complaints.append(f"{name}.{label} has no docstring")
    return complaints


RULES = [
    imports_point_downward,
    imports_make_no_circle,
    modules_are_short,
    module_names_are_their_own,
    randomness_is_explicit,
    everything_public_is_described,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_library_keeps(rule):
    complaints = rule(PACKAGE)
    assert not complaints, "\n".join(complaints)


def test_every_public_name_survives_the_import_of_every_module():
    script = """
import importlib, pkgutil, sys, types, funcattn
loaded = [module for name, module in sys.modules.items() if name.split(".")[0] == "funcattn"]
before = [(module, name, value) for module in loaded for name, value in vars(module).items() if not name.startswith("__")]
for module in list(pkgutil.walk_packages(funcattn.__path__, "funcattn.")):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        parent, _, last = module.name.rpartition(".")
        found = getattr(importlib.import_module(parent), last)
        assert isinstance(found, types.ModuleType) and found.__name__ == module.name, f"{module.name} is hidden by {found}"
changed = [f"{module.__name__}.{name}" for module, name, value in before if getattr(module, name) is not value]
missing = [name for name in getattr(funcattn, "__all__", ()) if not hasattr(funcattn, name)]
assert not changed and not missing, (changed, missing)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def names_of_tests(name: str, faces: set[str]) -> set[str]:
    """What the test file of a module may be called, below tests/ and without `test_`.

    `kernels.triton.tuning` -> kernels.triton.tuning, kernels.triton.triton_tuning,
    kernels.triton.kernels_triton_tuning
    """
    parts = name.split(".")
    folder = parts if name in faces else parts[:-1]
    return {".".join([*folder, "_".join(parts[n:])]) for n in range(len(parts))}


def listed(modules: str) -> list[str]:
    """`kernels: api sdpa; : masks` -> kernels.api, kernels.sdpa, masks"""
    rooms = (part.partition(":") for part in modules.split(";"))
    return [
        f"{room.strip()}.{name}".lstrip(".") for room, _, names in rooms for name in names.split()
    ]


def mirrors_both_ways(
    known: set[str], tests: set[str], whole: set[str], tested_by: dict[str, str]
) -> list[str]:
    """Complaints: a module without tests, a file of tests without a module, and exceptions that are
    none any more.
    """
    faces = {module.rpartition(".")[0] for module in known} - {""}  # tested with what is in them
    tests_of = {module: tests & names_of_tests(module, faces) for module in known}
    mirroring = {test for found in tests_of.values() for test in found}
    elsewhere = [name for modules in tested_by.values() for name in listed(modules)]
    needed = known - faces - UNMIRRORED
    base_names = [test.rpartition(".")[2] for test in sorted(tests)]
    return [
        *(f"{name} has no tests" for name in sorted(needed - {*elsewhere}) if not tests_of[name]),
        *(f"{test} mirrors no module" for test in sorted(tests - mirroring - whole - {*tested_by})),
        *(f"{test} is not there" for test in sorted({*whole, *tested_by} - tests)),
        *(f"{test} mirrors a module" for test in sorted(whole & mirroring)),
        *(
            f"{name} needs no exception"
            for name in sorted(elsewhere)
            if name not in needed or tests_of[name]
        ),
        *(f"{name} is listed twice" for name in sorted({*elsewhere}) if elsewhere.count(name) > 1),
        *(
            f"two files are called test_{name}.py"
            for name in sorted({*base_names})
            if base_names.count(name) > 1
        ),
    ]


def test_every_module_has_tests_and_every_test_file_a_module():
    paths = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]
    tests = {".".join([*path.parent.parts, path.stem.removeprefix("test_")]) for path in paths}
    assert mirrors_both_ways(set(modules(PACKAGE)), tests, WHOLE, TESTED_BY) == []


def test_a_missing_mirror_draws_a_complaint():
    known, whole, tested_by = (
        {"__init__", "kernels", "kernels.a", "kernels.b", "tree"},
        {"site"},
        {"kernels.kernels": "kernels: b"},
    )
    tests = {"kernels.kernels", "kernels.a", "tree", "site"}

    def complaints(known=known, tests=tests, whole=whole, tested_by=tested_by):
        return mirrors_both_ways(known, tests, whole, tested_by)

    assert complaints() == []
    assert complaints(tests={*tests, "kernels.kernels_b"}) == ["kernels.b needs no exception"]
    assert complaints(known={*known, "packing"}) == ["packing has no tests"]
    assert complaints(tests={*tests, "attic"}) == ["attic mirrors no module"]
    assert complaints(tests=tests - {"kernels.a"} | {"a"}) == [
        "kernels.a has no tests",
        "a mirrors no module",
    ]
    assert complaints(tests=tests - {"site"}) == ["site is not there"]
    assert complaints(whole={"site", "tree"}) == ["tree mirrors a module"]
    assert complaints(known=known - {"kernels.b"}) == ["kernels.b needs no exception"]
    assert complaints(tested_by={"kernels.kernels": "kernels: b", "tree": "kernels: b"}) == [
        "kernels.b is listed twice"
    ]
    assert complaints(known={*known, "caches.a"}, tests={*tests, "caches.a"}) == [
        "two files are called test_a.py"
    ]


def map_and_floors_agree(text: str, known: set[str]) -> list[str]:
    """Complaints about the README's table `| floor | rooms | |`: a room that is not there, is left
    out, or is on another floor.
    """
    rows = re.findall(r"^\| (\d*) ?\| ((?:`[\w.]+` ?)+)\|", text, re.MULTILINE)
    drawn = {name: number for number, names in rows for name in re.findall(r"`([\w.]+)`", names)}
    rooms = {room(name) for name in known if not name.startswith("_")}
    complaints = [f"the map leaves {name} out" for name in sorted(rooms - drawn.keys())]
    complaints += [
        f"the map has {name}, which is not there" for name in sorted(drawn.keys() - rooms)
    ]
    placed = [name for name in sorted(drawn.keys() & rooms) if name != APART]
    return complaints + [
        f"the map puts {name} on another floor"
        for name in placed
        if name not in FLOORS[int(drawn[name])]
    ]


@pytest.mark.skipif(
    not (ROOT / "README.md").exists(), reason="the package is installed without its pages"
)
def test_the_map_of_the_readme_shows_every_room_on_its_floor():
    assert map_and_floors_agree((ROOT / "README.md").read_text(), set(modules(PACKAGE))) == []


def test_a_wrong_map_draws_a_complaint():
    known = {"tree", "kernels.choice", "_checks", "testing.laws"}
    apart = "| | `testing` | apart |"
    assert map_and_floors_agree(f"| 0 | `tree` | |\n| 2 | `kernels` | |\n{apart}", known) == []
    assert map_and_floors_agree(f"| 0 | `tree` | |\n{apart}", known) == [
        "the map leaves kernels out"
    ]
    assert map_and_floors_agree(f"| 0 | `tree` | |\n| 1 | `kernels` | |\n{apart}", known) == [
        "the map puts kernels on another floor"
    ]
    more = f"| 0 | `tree` `attic` | |\n| 2 | `kernels` | |\n{apart}"
    assert map_and_floors_agree(more, known) == ["the map has attic, which is not there"]


# Each rule broken on purpose: one file of a small sound package replaced, and the complaint that
# must come.

SOUND = {
    "__init__.py": '"""The face."""\nfrom funcattn import masks\nfrom funcattn.kernels import merge',
    "tree.py": '"""Trees."""',
    "masks.py": '"""Masks."""\nfrom funcattn import tree',
    "layers.py": '"""Layers."""',
    "sampling.py": '"""Samplers."""',
    "testing/__init__.py": '"""Apart."""\nimport funcattn',
    "testing/laws.py": '"""Laws."""',
    "kernels/__init__.py": '"""Kernels."""\nfrom .reference import merge',
    "kernels/reference.py": '"""Dense."""\ndef merge():\n    """Join."""',
}
BROKEN = [
    (
        imports_point_downward,
        "tree.py",
        "from funcattn.masks import Mask",
        "tree (floor 0) imports masks (floor 1)",
    ),
    (
        imports_point_downward,
        "tree.py",
        "def late():\n    from . import masks",
        "tree (floor 0) imports masks (floor 1)",
    ),
    (
        imports_point_downward,
        "kernels/a.py",
        "from ..layers import linear",
        "kernels.a (floor 2) imports layers (floor 3)",
    ),
    (
        imports_point_downward,
        "caches.py",
        "import funcattn.sampling",
        "caches (floor 4) imports sampling (floor 4)",
    ),
    (
        imports_point_downward,
        "tree.py",
        "import funcattn",
        "tree (floor 0) imports __init__ (floor 8)",
    ),
    (
        imports_point_downward,
        "cli.py",
        "from funcattn.testing import laws",
        "cli imports testing.laws, which stands apart",
    ),
    (imports_point_downward, "attic.py", "", "attic stands on no floor"),
    (
        imports_make_no_circle,
        "kernels/reference.py",
        "from .. import kernels",
        "kernels -> kernels.reference -> kernels",
    ),
    (modules_are_short, "masks.py", "\n" * 401, "masks.py has 401 lines, above 400"),
    (
        module_names_are_their_own,
        "codecs.py",
        "",
        "codecs bears the name of a module of the standard library",
    ),
    (module_names_are_their_own, "kernels/merge.py", "", "kernels.merge bears a public name"),
    (module_names_are_their_own, "utils.py", "", "utils says nothing about what is in it"),
    (randomness_is_explicit, "masks.py", "torch.rand(3)", "masks:1 torch.rand"),
    (randomness_is_explicit, "masks.py", "x.normal_()", "masks:1 x.normal_"),
    (randomness_is_explicit, "masks.py", "from torch import randn", "masks:1 torch.randn"),
    (randomness_is_explicit, "masks.py", "import random", "masks:1 random"),
    (
        randomness_is_explicit,
        "masks.py",
        "attend(q, dropout_p=p)",
        "masks:1 dropout_p draws from torch's generator",
    ),
    (
        everything_public_is_described,
        "masks.py",
        "def causal(): ...",
        "masks.causal has no docstring",
    ),
    (
        everything_public_is_described,
        "masks.py",
        "class Mask:\n    def dense(self): ...",
        "masks.Mask.dense has no docstring",
    ),
    (everything_public_is_described, "masks.py", "", "masks does not say what it is for"),
]


def build(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "funcattn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "funcattn"


def test_a_sound_package_draws_no_complaint(tmp_path):
    package = build(tmp_path, SOUND)
    assert [complaint for rule in RULES for complaint in rule(package)] == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "complaint"), BROKEN, ids=[complaint for *_, complaint in BROKEN]
)
def test_a_broken_rule_draws_its_complaint(rule, file, text, complaint, tmp_path):
    assert complaint in rule(build(tmp_path, SOUND | {file: text}))
