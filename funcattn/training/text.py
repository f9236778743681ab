"""A character-level tokenizer for training without a pretrained one."""

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from ..checkpoints import Tokenizer
from ..core import errors
from ..core.doors import door

UNKNOWN = "\ufffd"  # the token of all characters that are not in the text


@door
def characters(text: str) -> Tokenizer:
    """A tokenizer with a token for each character of a text, by code point, and one for all others.

    It is a Tokenizer like any other: `fa.save` writes it with a model, and `fa.load` reads it.

    Example:
        >>> tokenizer = characters("to be, or not to be")
        >>> tokenizer.vocabulary, tokenizer.decode(tokenizer.encode("not to be"))
        (9, 'not to be')

    Law: decode undoes encode on the text's own characters
        (test_text.py::test_characters_come_back).
    """
    if not isinstance(text, str) or not text:
        got = "an empty one" if isinstance(text, str) else f"a {type(text).__name__}"
        errors.fail("characters", "text", "a text", got, "Read one: Path(...).read_text().")
    known = {letter: number for number, letter in enumerate(sorted({*text, UNKNOWN}))}
    backend = tokenizers.Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)
