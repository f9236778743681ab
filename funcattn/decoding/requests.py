"""The arguments of a decoding call, validated once."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from .. import caches, collectives
from ..core import errors
from ..models import Model, Past
from ..records import is_absent
from ..sampling import Sampler
from ..tree import Tree


@dataclass(frozen=True)
class Request:
    """The arguments common to the decoding functions, as in `fa.generate`.

    `verb` is the name of the function in error messages.
    """

    verb: str
    model: Model
    params: Tree
    prompt: Tensor
    cache: Past
    steps: int
    sampler: Sampler
    stop: Collection[int] = ()
    prompt_length: Tensor | None = None
    chunk: int = 512

    def checked(self, **values: object) -> "Request":
        """The request, validated; its arguments must agree on all processes of a mesh.

        Args:
            values: further arguments that decide which tokens are written, such as the key.
        """
        check_model(self.verb, self.model, self.sampler)
        check_prompt(self.verb, self.prompt)
        if not errors.is_count(self.steps, 0):
            errors.fail(
                self.verb,
                "steps",
                "an int, 0 or more",
                repr(self.steps),
                "Say how many tokens to write.",
            )
        if not errors.is_count(self.chunk, 1):
            errors.fail(
                self.verb, "chunk", "at least 1", self.chunk, "Tokens of the prompt read at a time."
            )
        errors.stops(self.verb, self.stop)
        self._check_room()
        self._check_prompt_length()
        self._agree(values)
        return self

    def _check_room(self) -> None:
        T, cache = self.prompt.shape[0], self.cache
        if not is_absent(cache) and caches.capacity(cache) < T:
            wanted = f"at most the {caches.capacity(cache)} tokens that the cache has room for"
            errors.fail(
                self.verb,
                "prompt",
                wanted,
                f"{T} tokens",
                "Make it with model.cache(size) for a larger size.",
            )

    def _check_prompt_length(self) -> None:
        length = self.prompt_length
        if length is None:
            return
        if not isinstance(length, Tensor) or length.is_floating_point() or length.dim():
            got = (
                f"{length.dtype} {errors.shape(length)}"
                if isinstance(length, Tensor)
                else repr(length)
            )
            remedy = "Pass torch.tensor(n), and map over many prompts with vmap."
            errors.fail(self.verb, "prompt_length", "an integer tensor ()", got, remedy, TypeError)
        if errors.is_true((length < 1) | (length > self.prompt.shape[0])):
            wanted = f"between 1 and the {self.prompt.shape[0]} tokens of the prompt"
            errors.fail(
                self.verb,
                "prompt_length",
                wanted,
                errors.peek(length),
                "Count the tokens before the padding.",
            )

    def _agree(self, values: dict[str, object]) -> None:
        """Fail where processes of one mesh have different arguments or cache lengths."""
        given = {
            "prompt": self.prompt,
            "cache": () if is_absent(self.cache) else self.cache.length,
            "steps": self.steps,
        }
        given |= {
            "prompt_length": self.prompt_length,
            "stop": tuple(self.stop),
            "chunk": self.chunk,
        }
        given |= {"sampler": self.sampler}
        collectives.agree(self.verb, given | values, self.params)


def check_model(verb: str, model: object, sampler: object) -> None:
    """Fail where an argument is not a model or not a sampler."""
    errors.is_decoder(verb, model)
    if not isinstance(sampler, Sampler):
        remedy = (
            "Such as fa.sampling.temperature(0.8) or fa.sampling.greedy; of a function of logits, "
            "fa.sampling.stateless(f)."
        )
        errors.fail(verb, "sampler", "a Sampler", f"a {type(sampler).__name__}", remedy, TypeError)


def check_prompt(verb: str, prompt: object) -> None:
    """Fail where a prompt is not one sequence (T,) of at least one token."""
    if not isinstance(prompt, Tensor) or prompt.dim() != 1:
        got = errors.shape(prompt) if isinstance(prompt, Tensor) else f"a {type(prompt).__name__}"
        remedy = "Pass torch.tensor(tokenizer.encode(text)); map over many with vmap."
        errors.fail(verb, "prompt", "one sequence (T,) of token ids", got, remedy)
    if not prompt.shape[0]:
        remedy = "Begin with one token, such as the tokenizer's first."
        errors.fail(verb, "prompt", "(T,) with T at least 1", errors.shape(prompt), remedy)


def check_numbers(verb: str, what: str, logits: Tensor, counts: Tensor | None = None) -> None:
    """Fail where logits (*lead, V) are NaN in a row that counts; no check on unreadable values."""
    wrong = logits.amax(-1).isnan()  # NaN is the greatest
    wrong = wrong if counts is None else counts & wrong
    if errors.is_true(wrong):
        remedy = (
            "Look for NaN in params and in the past; a past that overflowed inside a transform "
            "gives NaN too."
        )
        errors.fail(verb, what, "numbers", "NaN", remedy)
