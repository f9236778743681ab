"""Sampling as transforms of logits, composed as optax composes gradients.

    sampler = chain(repetition_penalty(1.1), temperature(0.8), top_k(40), top_p(0.95))

Samplers of a chain apply from left to right.

    composition    Sampler, chain, mixture; log_probs, draw; begin, observe_prompt, primed
    filters        of the logits alone: temperature, top_k, top_p, min_p, typical_p, cutoffs,
                   top_n_sigma, top_h
    penalties      of the tokens so far: repetition, presence, frequency; logit_bias
    repeats        of recent passages: no_repeat_ngram, dry
    constraints    masks: allowed_tokens, suppress_tokens, min_new_tokens, constrained, automaton
    adaptive       xtc, mirostat, guidance by a second cache

`log_probs(sampler)` is exactly the distribution that `draw` draws from, for every chain: so
speculative decoding verifies the distribution that is sampled.
"""

from .adaptive import guidance, guide, mirostat, xtc
from .composition import (
    Sampler,
    begin,
    chain,
    draw,
    greedy,
    log_probs,
    log_probs_with_state,
    mixture,
    observe_prompt,
    primed,
    stateless,
)
from .constraints import allowed_tokens, automaton, constrained, min_new_tokens, suppress_tokens
from .filters import (
    epsilon_cutoff,
    eta_cutoff,
    min_p,
    temperature,
    top_h,
    top_k,
    top_n_sigma,
    top_p,
    typical_p,
)
from .penalties import frequency_penalty, logit_bias, presence_penalty, repetition_penalty
from .repeats import dry, no_repeat_ngram

# Deprecated names, which still work.
law, weigh, prime = log_probs, log_probs_with_state, observe_prompt

__all__ = [
    "Sampler",
    "allowed_tokens",
    "automaton",
    "begin",
    "chain",
    "constrained",
    "draw",
    "dry",
    "epsilon_cutoff",
    "eta_cutoff",
    "frequency_penalty",
    "greedy",
    "guidance",
    "guide",
    "law",
    "log_probs",
    "log_probs_with_state",
    "logit_bias",
    "min_new_tokens",
    "min_p",
    "mirostat",
    "mixture",
    "no_repeat_ngram",
    "observe_prompt",
    "presence_penalty",
    "primed",
    "repetition_penalty",
    "stateless",
    "suppress_tokens",
    "temperature",
    "top_h",
    "top_k",
    "top_n_sigma",
    "top_p",
    "typical_p",
    "xtc",
]
