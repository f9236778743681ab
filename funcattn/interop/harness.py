"""A model of this library as an LM of EleutherAI's lm-evaluation-harness.

fa.interop.register_lm_eval()
lm_eval.simple_evaluate("funcattn", model_args={"pretrained": "smollm2-135m"}, tasks=["hellaswag"])

or, with a loaded model: `simple_evaluate(fa.interop.lm_eval_model(model, params, tokenizer,
context=2048), tasks=[...])`. The answers to one question (of a multiple choice) continue one cache,
which is computed once.

Source: Gao et al., github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md; the interface
is lm_eval.api.model.LM.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from .. import checkpoints, decoding, evaluation, randomness, transformer, tree
from ..checkpoints.tokenizer.tokenizer import Tokenizer
from ..core import errors
from ..models import Model, Past
from ..records import ABSENT, is_absent
from ..tree import Tree
from .harness_options import HARMLESS, LIMITS, STEPS, check_options, sampler_of


class LMEvalAdapter:
    """The methods that the harness calls; `lm_eval_model` mixes it into the harness's LM.

    Args:
        model, params, tokenizer: that belong together.
        context: tokens that the model reads at most; longer texts are truncated on the left.
        chunk: number of positions whose logits are in memory at a time.
        seed: of the random key for tasks that sample.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        tokenizer: Tokenizer,
        *,
        context: int,
        chunk: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            errors.fail(
                "lm_eval_model",
                "tokenizer",
                "given",
                None,
                "The harness asks in text: load a model with its tokenizer.",
            )
        if context < 2:
            errors.fail(
                "lm_eval_model", "context", "at least 2 tokens", context, "Such as config.context."
            )
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.context, self.chunk, self.seed = context, chunk, seed
        # whether prompts come from the chat template, where special tokens are parsed
        self.templated = False

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it equals greedy decoding.

        Requests are pairs (context, continuation).
        """
        pairs = [self._pair(*request.args) for request in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, (before, _) in enumerate(pairs):
            alike.setdefault(before, []).append(place)
        for before, places in alike.items():
            fits = [
                place for place in places if len(before) + len(pairs[place][1]) <= self.context + 1
            ]
            past = self._past(before) if len(fits) > 1 and len(before) > 1 else ABSENT
            for place in places:
                after = pairs[place][1]
                shared = place in fits and not is_absent(past)
                found[place] = self._foretold(
                    *((before[-1:], after) if shared else self._cut(before, after)),
                    past if shared else ABSENT,
                )
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text after the start token, in windows."""
        found = []
        for request in requests:
            ids = (self.prefix, *self._plain(request.args[0]))
            total = 0.0
            for begin, first, end in rolling(len(ids), self.context):
                total += self._foretold(ids[begin:first], ids[first:end], ABSENT)[0]
            found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generated text for each (context, options), up to `until` or `max_gen_toks` tokens.

        Raises:
            ValueError: an unknown option, or as many new tokens as the model can read.
        """
        found = []
        for number, request in enumerate(requests):
            text, options = (
                request.args[0],
                {name: value for name, value in request.args[1].items() if value is not None},
            )
            check_options(options)
            until = options.get("until", ())
            until = [until] if isinstance(until, str) else [stop for stop in until if stop]
            steps = next((int(options[name]) for name in LIMITS if name in options), STEPS)
            if not 0 <= steps < self.context:
                wanted = (
                    f"fewer than the {self.context} tokens of the context, which hold the question "
                    "too"
                )
                remedy = "Set it for the task: gen_kwargs max_gen_toks=..."
                errors.fail("generate_until", "max_gen_toks", wanted, steps, remedy)
            ids = (self._encode(text) or [self.prefix])[-(self.context - steps) :]
            prompt = self._tensor(ids)
            pieces = decoding.stream(
                *(
                    randomness.fold_in(randomness.key(self.seed).to(prompt.device), number),
                    self.model,
                    self.params,
                    prompt,
                ),
                steps=steps,
                tokenizer=self.tokenizer,
                sampler=sampler_of(options),
                stop_strings=tuple(until),
            )
            found.append("".join(piece.text for piece in pieces))
        return found

    @property
    def prefix(self) -> int:
        """The token that starts a text: bos, or else eos, as in the harness."""
        for role in ("bos_token", "eos_token"):
            found = self.tokenizer.backend.token_to_id(self.tokenizer.roles.get(role, ""))
            if found is not None:
                return found
        return self.tokenizer.stop[0] if self.tokenizer.stop else 0

    @property
    def tokenizer_name(self) -> str:
        """A name that distinguishes cached answers from those of other tokenizers."""
        return f"funcattn-{self.tokenizer.vocabulary}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template of the tokenizer, or ""."""
        return (self.tokenizer.template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text; afterwards special tokens in texts are parsed.

        Args:
            chat_history: messages with roles.
            add_generation_prompt: False where the last message is the start of an answer to
                continue.
        """
        self.templated = True
        return self.tokenizer.chat(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final=not add_generation_prompt,
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=self.templated)

    def _plain(self, text: str) -> list[int]:
        """The ids of a text without the token that starts it."""
        ids = self._encode(text)
        return ids[1:] if ids[:1] == [self.prefix] else ids

    def _pair(self, before: str, after: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of context and continuation; spaces at the end of the context go to the continuation.

        The harness splits in the same way.

        Raises:
            ValueError: the continuation is empty, or longer than the model reads.
        """
        bare = before.rstrip()
        head = self._encode(bare) if bare else []
        ids = self._encode(before + after)[len(head) :] if head else self._plain(before + after)
        if not 0 < len(ids) <= self.context:
            wanted = f"1 to {self.context} tokens behind its context"
            remedy = (
                "It may be empty, or one token with the end of the context: move text from the "
                "context into it."
            )
            errors.fail(
                "loglikelihood",
                f"the continuation {after!r}",
                wanted,
                f"{len(ids)} behind {before[-50:]!r}",
                remedy,
            )
        return tuple(head or [self.prefix]), tuple(ids)

    def _cut(
        self, before: tuple[int, ...], after: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both, with the context truncated on the left; the model reads all but the last token."""
        return before[-(self.context + 1 - len(after)) :], after

    def _past(self, ids: tuple[int, ...]) -> Any:
        """The cache that the answers have in common: all tokens of the question but the last."""
        prompt = self._tensor(ids[:-1])
        key = randomness.key(self.seed).to(prompt.device)  # not used, since no token is sampled
        return decoding.generate(key, self.model, self.params, prompt, steps=0, chunk=self.chunk)[1]

    def _foretold(
        self, before: tuple[int, ...], after: tuple[int, ...], past: Past
    ) -> tuple[float, bool]:
        with torch.no_grad():
            before_after = self._tensor(before), self._tensor(after)
            scores, likeliest = evaluation.score_and_greedy(
                self.model, self.params, *before_after, past, chunk=self.chunk
            )
        return float(scores.double().sum()), bool(likeliest.all())

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=tree.leaves(self.params)[0].device)


def rolling(length: int, context: int) -> list[evaluation.Window]:
    """The windows over a long text: each token is scored once, all windows are full.

    Example:
        >>> [tuple(window) for window in rolling(11,
        ...     4)]  # 4 tokens are read for 4 scores; the last reads 4 for 2
        [(0, 1, 5), (4, 5, 9), (6, 9, 11)]
    """
    found, first = [], 1
    while first < length:
        end = min(first + context, length)
        found.append(evaluation.Window(max(0, end - context - 1), first, end))
        first = end
    return found


def lm_eval_model(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    *,
    context: int,
    chunk: int = 512,
    seed: int = 0,
) -> Any:  # an lm_eval.api.model.LM, which this library does not depend on
    """A model for the harness: `lm_eval.simple_evaluate(lm_eval_model(...), tasks=[...])`.

    Args:
        model, params, tokenizer: that belong together, as from `fa.load` and `fa.decoder`.
        context: tokens that the model reads at most, such as config.context.
        chunk: number of positions whose logits are in memory at a time.
        seed: of the random key for tasks that sample.

    Raises:
        ImportError: lm_eval is not installed. ValueError: no tokenizer.
    """
    return _kind()(model, params, tokenizer, context=context, chunk=chunk, seed=seed)


def register_lm_eval() -> None:
    """Register "funcattn" with the harness, for its command line:

        lm_eval --model funcattn --model_args pretrained=smollm2-135m,dtype=float32 --tasks
        hellaswag

    `pretrained` is an argument of `fa.load`. The registration is per process: call it before, or in
    `--include_path` code.

    Raises:
        ImportError: lm_eval is not installed.
    """
    kind = _kind()
    registry = _harness("lm_eval.api.registry")

    class Loading(kind):
        def __init__(
            self,
            pretrained: str = "smollm2-135m",
            dtype: Any = None,
            device: Any = None,
            **options: Any,
        ) -> None:
            unknown = options.keys() - {"chunk", "seed", "max_length", *HARMLESS}
            if unknown:
                remedy = "Load the model yourself, and pass lm_eval_model(...)."
                wanted = "among pretrained, dtype, device, max_length, chunk, seed"
                errors.fail("funcattn", "model_args", wanted, ", ".join(sorted(unknown)), remedy)
            if (
                isinstance(dtype, str)
                and dtype != "auto"
                and not isinstance(getattr(torch, dtype, None), torch.dtype)
            ):
                errors.fail(
                    "funcattn",
                    "dtype",
                    "a dtype of torch",
                    repr(dtype),
                    "Such as float32 or bfloat16.",
                )
            named = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else None
            config, params, tokenizer = checkpoints.load(pretrained, dtype=named)
            place = tree.to(device or "cpu")
            kept = {name: int(options[name]) for name in ("chunk", "seed") if name in options}
            context = int(options.get("max_length") or config.context)
            super().__init__(
                transformer.decoder(config), place(params), tokenizer, context=context, **kept
            )

    if "funcattn" not in registry.model_registry:
        registry.register_model("funcattn")(Loading)


def _kind() -> type:
    base = _harness("lm_eval.api.model").LM
    return type("FuncattnLM", (LMEvalAdapter, base), {"__doc__": LMEvalAdapter.__doc__})


def _harness(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise ImportError(
            "lm_eval_model: lm_eval should be installed, got none. Run pip install lm_eval."
        ) from missing
