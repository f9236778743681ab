"""Generation options of lm-evaluation-harness tasks, and the sampler that they specify."""

from typing import Any

from .. import sampling
from ..core import errors

STEPS = 256  # new tokens if a task sets no limit: the default of the harness
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Options without effect at these values; other values, and any other option, raise.
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "typical_p": 1.0,
    "early_stopping": False,
    "use_cache": True,
}
# of model_args
HARMLESS = {
    "batch_size",
    "max_batch_size",
    "trust_remote_code",
    "use_fast_tokenizer",
    "low_cpu_mem_usage",
}


def check_options(options: dict[str, object]) -> None:
    """Raise for an option that is not implemented."""
    known = {"until", *LIMITS, *SAMPLING}
    wrong = [
        name
        for name, value in options.items()
        if name not in known and (name not in NEUTRAL or value != NEUTRAL[name])
    ]
    if wrong:
        remedy = f"Known are {', '.join(sorted(known))}."
        errors.fail(
            "generate_until", f"gen_kwargs {wrong[0]}", "left out", repr(options[wrong[0]]), remedy
        )
    until = options.get("until", ())
    if not isinstance(until, str) and not (
        isinstance(until, list | tuple) and all(isinstance(stop, str) for stop in until)
    ):
        errors.fail(
            "generate_until",
            "until",
            "a text or a list of texts",
            repr(until),
            "Ids belong to tokenizer.stop.",
            TypeError,
        )


def sampler_of(options: dict[str, Any]) -> sampling.Sampler:
    """The sampler that a task specifies, as transformers reads these options; greedy by default."""
    heat = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
    if options.get("do_sample") and heat <= 0:
        errors.fail(
            "generate_until",
            "temperature",
            "above 0 with do_sample",
            heat,
            "Leave one of them out.",
        )
    penalty = float(options.get("repetition_penalty", 1.0))
    penalties = () if penalty == 1.0 else (sampling.repetition_penalty(penalty),)
    if not options.get("do_sample", heat > 0):
        return sampling.chain(*penalties, sampling.greedy) if penalties else sampling.greedy
    off = {"top_k": (-1, 0), "top_p": (1.0,), "min_p": (0.0,)}  # values that filter nothing
    wanted = [
        name for name, nothing in off.items() if name in options and options[name] not in nothing
    ]
    return sampling.chain(
        *penalties,
        sampling.temperature(heat),
        *(getattr(sampling, name)(options[name]) for name in wanted),
    )
