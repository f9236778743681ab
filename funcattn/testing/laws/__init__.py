"""Laws, as lists of plain functions that return nothing or raise AssertionError.

    laws.kernel       law(kernel, q, k, v, mask, key)     kernel(q, k, v, mask) -> out or Attended
    laws.sampler      law(sampler, logits, key)           a funcattn.sampling.Sampler, logits (V,)
    laws.cache        law(kind, size, key)                a kind of cache: a class with `.empty`
    laws.transform    law(transform, tree)                tree -> tree
    laws.acceptance   law(rule, target, draft, key)       a funcattn.speculation.Rule; in float64

Laws that do not apply are left out by name:
`[law for law in laws.kernel if law is not laws.kernels.jvp_...]`.
The key is for random choices of the law: a permutation of keys, a split of tokens, a tangent.
"""

from . import acceptances, kernels, pasts, samplers, texts, trees

kernel = [
    kernels.agrees_with_the_reference,
    kernels.order_of_keys_does_not_matter,
    kernels.output_lies_in_the_hull_of_the_values,
    kernels.future_cannot_change_the_past,
    kernels.shifting_all_logits_of_a_query_changes_only_lse,
    kernels.shifting_all_logits_of_a_row_changes_nothing,
    kernels.merge_of_any_split_is_the_whole,
    kernels.commutes_with_vmap,
    kernels.gradient_agrees_with_the_reference,
    kernels.masked_rows_are_zero_with_zero_gradients,
    kernels.jvp_agrees_with_the_reference,
    kernels.hvp_agrees_with_the_reference,
    kernels.shifting_all_logits_of_a_row_changes_no_tangents,
    kernels.masked_rows_have_zero_tangents,
]
sampler = [
    samplers.law_sums_to_one,
    samplers.no_hidden_token_comes_back,
    samplers.at_least_one_token_is_kept,
    samplers.adding_a_constant_to_logits_changes_nothing,
    samplers.commutes_with_vmap,
    samplers.draws_follow_the_law,
    samplers.state_keeps_its_form,
    samplers.arguments_stay_as_they_were,
]
cache = [
    pasts.commit_leaves_its_argument_as_it_was,
    pasts.remembers_what_was_committed,
    pasts.committing_all_equals_committing_any_split,
    pasts.rejected_rows_are_never_seen,
    pasts.entries_beyond_length_are_unobservable,
    pasts.each_row_under_vmap_commits_its_own_number,
    pasts.any_program_reads_as_its_rows_and_changes_no_earlier_value,
    texts.every_verb_writes_what_a_loop_over_apply_writes,
]
transform = [
    trees.keeps_paths,
    trees.gives_a_tree_of_tensors,
    trees.leaves_its_argument_as_it_was,
    trees.is_idempotent,
]
acceptance = [
    acceptances.what_is_written_has_the_law_of_the_target,
    acceptances.regions_are_probabilities,
    acceptances.regions_have_the_volume_of_the_pmf,
    acceptances.counts_follow_the_pmf,
    acceptances.a_shorter_draft_is_the_beginning_of_a_longer,
    acceptances.accepts_as_many_as_tokenwise,
]
