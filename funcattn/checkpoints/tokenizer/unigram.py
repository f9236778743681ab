"""SentencePiece's Unigram: of all ways to cut a text into pieces, the one of the greatest sum of
scores.

Characters are replaced first by the map of the file (NFKC and its kin), spaces are SPACE as for
BPE, and a run of letters that are no pieces is one unknown token, or its bytes.

Source: Kudo, Subword regularization, arXiv:1804.10959, section 3.2; transformers,
    convert_slow_tokenizer.py, build_tokenizer_from_spm_proto.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, models, normalizers, processors

from .sentencepiece import NORMAL, SPACE, with_spaces

CONTROL, USER_DEFINED = 3, 4
UNLIKELY = 1e6  # more than the scores of all pieces of a long word


def unigram(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    unknown: int,
    *,
    byte_fallback: bool,
    leading_space: bool,
    single_spaces: bool,
    charsmap: bytes,
) -> tokenizers.Tokenizer | str:
    """The tokenizer of the `tokenizers` library whose pieces have the greatest sum of scores; or
    why there is none.

    Args:
        tokens, scores, kinds, leading_space: as of `pieces`.
        unknown: the id of what no piece covers, one for a run of it.
        byte_fallback: whether that is written in bytes.
        single_spaces: whether spaces around a text, and further ones in it, are left out.
        charsmap: of what replaces characters, or b"".

    Law: ids are those of transformers, which follows SentencePiece
        (test_unigram.py::test_ids_are_those_of_transformers,
        test_the_pieces_have_the_greatest_sum_of_scores).
    """
    known = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    if USER_DEFINED in kinds:
        return "with pieces that are not trained"
    if not known.issuperset(letter for token in known for letter in token):
        return "with letters that are no pieces"
    # Other tokens are never made of characters. As every letter of a piece is one, how unlikely the
    # unknown is, which the library makes of the least score, decides nothing.
    least = min((x for x, kind in zip(scores, kinds, strict=True) if kind == NORMAL), default=0.0)
    never = least - UNLIKELY
    scored = [score if kind == NORMAL else never for score, kind in zip(scores, kinds, strict=True)]
    model = models.Unigram(
        list(zip(tokens, scored, strict=True)), unk_id=unknown, byte_fallback=byte_fallback
    )
    first = [normalizers.Precompiled(charsmap)] if charsmap else []
    if single_spaces:
        around, further = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        first += [normalizers.Replace(around, ""), normalizers.Replace(further, " ")]
    backend = with_spaces(tokenizers.Tokenizer(model), leading_space, first)
    if single_spaces:  # signs for spaces too, as SentencePiece has it
        ends = normalizers.Replace(tokenizers.Regex(rf"{SPACE}+\z"), "")
        backend.normalizer = normalizers.Sequence([backend.normalizer, ends])
    return backend


def with_special(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], kinds: Sequence[int], begin: int | None
) -> None:
    """Add the control tokens to a tokenizer, of which `begin`, if any, is put before a text."""
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control if token])
    if begin is not None:
        known = [{"id": "first", "ids": [begin], "tokens": [tokens[begin]]}]
        first = processors.TemplateProcessing(single=["first", "$A"], special_tokens=known)
        backend.post_processor = first
