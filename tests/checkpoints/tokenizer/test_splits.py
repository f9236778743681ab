"""Cuts of text before merges: the names of GGUF files."""

import pytest
import regex
from samples import TOKENS, metadata

from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer.gguf_metadata import from_metadata
from funcattn.checkpoints.tokenizer.splits import SPLITS, pre_tokenizer

TEXTS = [
    "",
    "Hello World, it's 12345 o'clock!\n\n  Let's GO",
    "HelloWorld  \t\n x=1;//2 'LL don't",
    "Zürich ☃ 你好世界 ひらがな 한국어 ١٢٣٤ é́",
    "    indented\r\n\r\ntwo   ",
    "…—“quoted”…100,000.50$ <a|b> `x` ~~ \u00a0",
]


def cut(text, expressions):
    """An oracle by another library of regular expressions: what matches becomes pieces, and so
    does what is between.
    """
    pieces = [text] if text else []
    for expression in expressions:
        found = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(expression, piece, flags=regex.V1 | regex.MULTILINE):
                found += [piece[at : match.start()], match[0]]
                at = match.end()
            found.append(piece[at:])
        pieces = [piece for piece in found if piece]
    return pieces


@pytest.mark.parametrize("name", SPLITS)
def test_text_is_cut_by_the_expressions_of_its_name(name):
    component = pre_tokenizer(SPLITS[name])
    for text in TEXTS:
        ours = [text[a:b] for _, (a, b) in component.pre_tokenize_str(text)]
        assert ours == cut(text, SPLITS[name].expressions), text


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("llama-bpe", "it's 12345", "it|'s| |123|45"),
        ("qwen2", "it's 123", "it|'s| |1|2|3"),
        ("tekken", "HelloWorld it's 123", "Hello|World| it|'s| |1|2|3"),
        ("gpt-4o", "HelloWorld it's 12345", "Hello|World| it's| |123|45"),
        ("llama4", "HTMLParser it'LL", "HTMLParser| it'LL"),
        ("deepseek-v3", "1234 你好.hello .x", "123|4| |你好|.hello| .|x"),
        ("deepseek-coder", "x 12\n(ab)", "x| |1|2|\n|(|ab|)"),
        ("deepseek-llm", "ab 12 你好", "ab| |12| |你好"),
        ("command-r", "ab 12", "ab| |1|2"),
        ("gpt-2", "ab 12  c", "ab| 12| | c"),
        ("falcon", "a+b 12345", "a|+|b| |123|45"),
        ("kimi-k2", "Hello你好 World's", "Hello|你好| World's"),
        ("bloom", "ab, cd.", "ab|,| cd|."),
        ("viking", "ab 12", "ab| |1|2"),
        ("default", "a$b 1234", "a|$|b| |123|4"),
        ("qwen35", "é́a 12", "é́a| |1|2"),
        ("superbpe", "a 1234567 b", "a |1|234|567| b"),
    ],
)
def test_known_cuts(name, text, wanted):
    component = pre_tokenizer(SPLITS[name])
    assert "|".join(text[a:b] for _, (a, b) in component.pre_tokenize_str(text)) == wanted


@pytest.mark.parametrize("name", SPLITS)
def test_a_file_of_each_name_gives_a_tokenizer(name):
    tokenizer = from_metadata({**metadata(), "tokenizer.ggml.pre": name})
    for text in TEXTS[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    begins = tokenizer.encode("hello")[0] == TOKENS.index("<s>")
    assert begins == SPLITS[name].begins


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre.*tekken.*got 'of-tom"):
        from_metadata({**metadata(), "tokenizer.ggml.pre": "of-tomorrow"})
