"""Sampling as transforms of logits, composed as optax composes gradients.

    sampler = chain(repetition_penalty(1.1), temperature(0.8), top_k(40), top_p(0.95))      order is what you write

    composition    Sampler, chain, mixture; log_probs, draw; begin, observe_prompt, primed: the prompt's part
    filters        what the logits alone decide: temperature, top_k, top_p, min_p, typical_p, cutoffs, top_n_sigma, top_h
    penalties      what was written counts: repetition, presence, frequency; logit_bias
    repeats        what was written lately: no_repeat_ngram, dry
    constraints    what may be written: allowed_tokens, suppress_tokens, min_new_tokens, constrained, automaton
    adaptive       xtc, mirostat, guidance by a second past

`log_probs(sampler)` gives the log-probabilities that `draw` draws from, whatever is in the chain: what is verified in
speculation is what was sampled.
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
from .filters import epsilon_cutoff, eta_cutoff, min_p, temperature, top_h, top_k, top_n_sigma, top_p, typical_p
from .penalties import frequency_penalty, logit_bias, presence_penalty, repetition_penalty
from .repeats import dry, no_repeat_ngram

# Earlier names, which go on working.
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
