"""llama.cpp beside funcattn: the same weights by llama-cpp-python, where that is importable.

Build it for this processor: `pip install --no-binary llama-cpp-python llama-cpp-python`. Matrices
are Q4_1 in the file of SmolLM2-135M; `q4_0` requantizes them to Q4_0, which llama.cpp repacks when
it loads: the fastest of its formats.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from funcattn.checkpoints.sources import locate

HERE = importlib.util.find_spec("llama_cpp") is not None


def name() -> str:
    """The package and its version."""
    return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"


def files() -> dict[str, Path]:
    """The weights by format, the fastest first; none where the package is missing."""
    return {"Q4_0": q4_0(), "Q4_1": locate("smollm2-135m")} if HERE else {}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def q4_0() -> Path:
    """The file with its matrices requantized to Q4_0, until this process ends."""
    llama, target = _library(), Path(_folder().name, "q4_0.gguf")
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = llama.LLAMA_FTYPE_MOSTLY_Q4_0, True
    source = str(locate("smollm2-135m")).encode()
    if llama.llama_model_quantize(source, str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError("llama_model_quantize fails")
    return target


def tell(threads: int, prompt: Sequence[int], steps: int = 64) -> None:
    """Print how fast tokens are written behind a prompt, the median of five runs."""
    if not HERE:
        print("llama.cpp: llama-cpp-python is not installed")
    for form, file in files().items():
        context, seconds, n = Context(file, threads=threads, room=1024), [], len(prompt) - 1
        context.read(prompt[:-1], 0)
        for _ in range(5):
            begun = time.perf_counter()
            context.write(prompt[-1:], n, steps)
            seconds.append((time.perf_counter() - begun) / steps)
        context.close()
        each = median(seconds)
        print(
            f"llama.cpp {form}, {threads} thread(s): {1 / each:.1f} tokens/s, {1e3 * each:.1f} ms "
            "a token"
        )


class Context:
    """Texts behind one another in llama.cpp: tokens in, logits out.

    Args:
        file: the weights.
        threads: of all it does.
        room: tokens of all texts together.
        texts: how many there are at most, as sequences of one cache.
    """

    def __init__(self, file: Path, *, threads: int, room: int, texts: int = 1) -> None:
        llama = self.llama = _library()
        self.model = llama.llama_model_load_from_file(
            str(file).encode(), llama.llama_model_default_params()
        )
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch = room, room
        settings.n_seq_max, settings.kv_unified = texts, True
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, settings)
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(room, 0, 1)
        self.V = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def read(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits (V,) of the last of some tokens of the first text, which begin at a position."""
        rows = [(token, position + i, 0) for i, token in enumerate(tokens)]
        return self._decode(rows, len(rows) - 1)[-1]

    def step(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits (texts, V) of one token of each text, all at one position."""
        return self._decode([(token, position, text) for text, token in enumerate(tokens)], 0)

    def _decode(self, rows: Sequence[tuple[int, int, int]], first: int) -> Tensor:
        """Logits of rows (token, position, text) from `first` on."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, text) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, i >= first
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, text
        if self.llama.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode fails")
        kind = ctypes.POINTER(ctypes.c_float * (self.V * (len(rows) - first)))
        found = ctypes.cast(self.llama.llama_get_logits(self.context), kind).contents
        return torch.frombuffer(found, dtype=torch.float32).view(-1, self.V)

    def write(self, last: Sequence[int], position: int, steps: int) -> None:
        """Steps of all texts from their last tokens on, greedily, which are forgotten then."""
        now = list(last)
        for i in range(steps):
            now = self.step(now, position + i).argmax(-1).tolist()
        for text in range(len(now)):
            self.llama.llama_memory_seq_rm(self.memory, text, position, -1)

    def forget(self, position: int = 0) -> None:
        """Drop what the first text has from a position on."""
        self.llama.llama_memory_seq_rm(self.memory, 0, position, -1)

    def fork(self, texts: int) -> None:
        """What the first text has is what the others begin with; it is held once."""
        for text in range(1, texts):
            self.llama.llama_memory_seq_cp(self.memory, 0, text, -1, -1)

    def close(self) -> None:
        """Free the context and the weights."""
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


@functools.cache
def _library() -> Any:
    """The bindings, which then print errors alone."""
    import llama_cpp

    kept = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(kept, ctypes.c_void_p(0))
    _library_log.append(kept)  # called as long as the process runs
    llama_cpp.llama_backend_init()
    return llama_cpp


_library_log: list[Any] = []
