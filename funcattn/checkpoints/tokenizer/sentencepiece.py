"""The tokenizer of SentencePiece (BPE with scores), which the GGUF files of Llama 2, Mistral and
Gemma hold.

Text is split into characters; repeatedly, the neighbouring pair whose joined piece has the highest
score is merged. A space is written as U+2581 and belongs to the word after it; characters that no
piece covers are written in bytes, `<0x0A>`.

The `tokenizers` library joins by the rank of a pair, so the pairs are ranked here by the score of
what they make. Only where occurrences of one piece overlap may the two choose differently:
SentencePiece takes the left one first.

Source: Kudo and Richardson, SentencePiece, arXiv:1808.06226; llama.cpp, src/llama-vocab.cpp,
    llm_tokenizer_spm.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

from ...core.errors import fail
from ..families import CheckpointError

SPACE = "\u2581"
# letters of a piece: what its beginnings cost grows with its length; SentencePiece makes them of 16
# at most
LONGEST = 2**10
NORMAL = 1  # the kind of token that text is cut into; the others are never made of characters


def ranked_pairs(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the highest score first.

    Example:
        >>> ranked_pairs(["a", "b", "ab", "abb"], [0.0, 0.0, -1.0, -2.0], [1] * 4)
        [('a', 'b'), ('ab', 'b')]
    """
    known = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    longest = max(map(len, known), default=0)
    if longest > LONGEST:
        remedy = (
            "Save the model with its tokenizer.json in the Hugging Face layout, and load that "
            "folder."
        )
        fail(
            "load",
            "tokenizer.ggml.tokens",
            f"of at most {LONGEST} letters",
            longest,
            remedy,
            CheckpointError,
        )
    shorter = _beginnings(known)
    found = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind == NORMAL:
            cuts = ((begin, token[len(begin) :]) for begin in shorter[token])
            found += [(-score, pair) for pair in cuts if pair[1] in known]
    found.sort(key=lambda item: item[0])  # stable: pairs of one score stay in the order of the file
    return [pair for _, pair in found]


def _beginnings(known: set[str]) -> dict[str, list[str]]:
    """Piece -> the shorter pieces that it begins with, the shortest first. In the order of letters
    these stand right before it.
    """
    found, open_ = {}, list[str]()
    for token in sorted(known):
        while open_ and not token.startswith(open_[-1]):
            open_.pop()
        found[token] = [begin for begin in open_ if begin]
        open_.append(token)
    return found


def pieces(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    unknown: str | None,
    *,
    leading_space: bool,
) -> tokenizers.Tokenizer:
    """The tokenizer of the `tokenizers` library that cuts text into these pieces.

    Args:
        tokens, scores, kinds: of each id; kinds as GGUF numbers them.
        unknown: the token for what can be written in no other way, or None.
        leading_space: whether a space is put before a text, as before any word (Llama 2; Gemma does
            not).
    """
    return merged(tokens, ranked_pairs(tokens, scores, kinds), unknown, leading_space=leading_space)


def merged(
    tokens: Sequence[str],
    merges: list[tuple[str, str]],
    unknown: str | None,
    *,
    leading_space: bool,
) -> tokenizers.Tokenizer:
    """The same of pairs that are told, the first to be joined first."""
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    return with_spaces(tokenizers.Tokenizer(model), leading_space, [])


def with_spaces(
    backend: tokenizers.Tokenizer, leading_space: bool, first: Sequence[normalizers.Normalizer]
) -> tokenizers.Tokenizer:
    """A tokenizer whose model has spaces as SPACE, behind other normalizers."""
    to_spaces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if leading_space:
        spaces.insert(0, normalizers.Prepend(SPACE))
        to_spaces.append(decoders.Strip(" ", 1, 0))
    each = [*first, *spaces]
    backend.normalizer = each[0] if len(each) == 1 else normalizers.Sequence(each)
    backend.decoder = decoders.Sequence(to_spaces)
    return backend
