"""What drafters propose; that nothing is lost is in test_decoding.py."""

import pytest
import torch

import funcattn as fa
from funcattn import drafters


def look(text, **options):
    drafter = drafters.prompt_lookup(**options)
    state = drafter.init(torch.tensor(text[:-1]), torch.tensor(len(text) - 1), 8)
    draft, _ = drafter.propose(fa.key(0), torch.tensor(text[-1]), state)
    return draft.tokens[: int(draft.valid)].tolist()


def test_prompt_lookup_gives_what_followed_the_last_time():
    assert look([1, 2, 3, 4, 1, 2], length=3) == [3, 4, 1]
    assert look([5, 1, 7, 1, 8, 1], length=2) == [8, 1]  # the latest of equals
    assert look([1, 2, 7, 9, 2, 8, 1, 2], length=1) == [7]  # two tokens tell more than one
    assert look([1, 2, 7, 9, 2, 8, 1, 2], length=1, ngram=1) == [8]
    assert look([1, 2, 3], length=3) == []
    assert look([6, 6], length=3) == [6]


def test_what_was_kept_is_looked_up_next():
    drafter = drafters.prompt_lookup(length=3)
    state = drafter.init(torch.tensor([1, 2, 3, 9]), torch.tensor(3), 8)  # the last is a pad
    draft, state = drafter.propose(fa.key(0), torch.tensor(4), state)
    assert int(draft.valid) == 0
    state = drafter.keep(torch.tensor([1, -1, -1, -1]), torch.tensor(1), state)
    draft, state = drafter.propose(fa.key(0), torch.tensor(1), state)
    assert draft.tokens.tolist() == [2, 3, 4]
    state = drafter.keep(torch.tensor([2, 3, 7, -1]), torch.tensor(3), state)
    draft, state = drafter.propose(fa.key(0), torch.tensor(7), state)
    assert state.tokens[: int(state.length) + 1].tolist() == [1, 2, 3, 4, 1, 2, 3, 7]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: drafters.prompt_lookup(length=0),
            "drafters.prompt_lookup: length should be an int, at least 1",
        ),
        (lambda: drafters.prompt_lookup(ngram=0), "ngram should be an int, at least 1"),
        (lambda: drafters.model(None, (), length=0), "drafters.model: length"),
        (lambda: drafters.function(None, length=1.5), "drafters.function: length"),
    ],
)
def test_bad_input_is_an_error_with_its_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_function_that_gives_another_size_is_an_error():
    drafter = drafters.function(lambda text, n: (text[:2], n), length=3)
    with pytest.raises(ValueError, match=r"tokens \(N,\) with N = 3, valid \(\)"):
        drafter.propose(
            fa.key(0), torch.tensor(1), drafter.init(torch.tensor([1, 2]), torch.tensor(2), 4)
        )


@pytest.mark.parametrize("valid", [-1, 4])
def test_a_function_that_counts_beyond_its_draft_is_an_error(valid):
    drafter = drafters.function(lambda text, n: (text[:3], torch.tensor(valid)), length=3)
    state = drafter.init(torch.tensor([1, 2, 3]), torch.tensor(3), 4)
    with pytest.raises(ValueError, match=f"valid from 0 to N = 3, got {valid}"):
        drafter.propose(fa.key(0), torch.tensor(1), state)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_knows_the_tokens_of_its_head(tied):
    config = fa.Config(vocabulary=24, layers=1, tied=tied)
    model = fa.decoder(config)
    params = model.init(fa.key(0))
    # more rows than there are tokens, as some files have
    padded = params._replace(embedding=torch.zeros(32, config.width))
    assert drafters.model(model, params).vocabulary == 24
    assert drafters.model(model, fa.quantize(fa.int4(group=8))(params)).vocabulary == 24
    assert drafters.model(model, padded).vocabulary == (32 if tied else 24)


def test_a_drafter_prints_as_the_call_that_made_it():
    model = fa.decoder(fa.Config())
    params = model.init(fa.key(0))
    assert (
        repr(drafters.prompt_lookup(length=5, ngram=2))
        == "Drafter(prompt_lookup(length=5, ngram=2))"
    )
    mine = drafters.model(model, params, length=3, sampler=fa.sampling.temperature(0.7))
    assert repr(mine).startswith("Drafter(model(Model")
    assert repr(mine).endswith("Params(...), length=3, sampler=temperature(0.7)))")
    assert "prompt_lookup" not in repr(drafters.prompt_lookup()._replace(keep=print))
    for drafter in (
        mine,
        drafters.function(lambda text, n: (text, n)),
        drafters.Drafter(print, print, print, 2),
    ):
        assert " at 0x" not in repr(drafter)


def test_earlier_names_go_on_working():
    tokens, valid = torch.tensor([1, 2]), torch.tensor(2)
    draft = drafters.Draft(tokens, laws=(), valid=valid)
    assert draft.laws is draft.probs is draft._replace(laws=()).probs
    speculation = fa.speculation
    assert speculation.laws_along is speculation.log_probs_along_draft
    assert (speculation.matched, speculation.rewind) == (
        speculation.accept_greedy,
        speculation.select_state,
    )
    assert speculation.Along(laws=tokens, states=()).laws is tokens
