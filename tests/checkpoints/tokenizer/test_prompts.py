"""Prompts of messages: only the template writes special tokens, whatever messages spell and
templates do; no text is lost.
"""

import dataclasses
import re

import pytest
import tokenizers
from conversations import MESSAGES, ROLES
from conversations import TEMPLATES as MODELS
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from funcattn.checkpoints import Tokenizer
from funcattn.checkpoints.tokenizer.templates import render_with_origins

END, START = "<|im_end|>", "<|im_start|>"


def byte_level(*special, **flags):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "|"), ("|", ">"), ("i", "m"), ("e", "n"), ("en", "d")]
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made.add_special_tokens(
        [AddedToken(token, special=True, **flags) for token in special or (START, END)]
    )
    return made


def sentencepiece(kind="bpe"):
    """As Llama 2's: a space before the first word, bytes for what is unknown."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz/<>",
        "</",
    ]
    if kind == "bpe":
        ids = {token: i for i, token in enumerate([*vocabulary, "s>"])}
        pairs = [("<", "/"), ("s", ">"), ("</", "s>")]  # which join to a special token
        model = models.BPE(vocab=ids, merges=pairs, unk_token="<unk>", byte_fallback=True)
    else:
        model = models.Unigram(
            [(token, 0.0 if i < 3 else -1.0) for i, token in enumerate(vocabulary)],
            unk_id=0,
            byte_fallback=True,
        )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    spaces = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(spaces)
    made.add_special_tokens(["<s>", "</s>"])
    return made


BACKENDS = {"bytes": byte_level(), "normalized": byte_level(normalized=True)}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# What a template may do to a message between START and END, which it writes once each.
BODIES = {
    "plain": "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "plus": "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}",
    "tilde": "{{ '<|im_start|>' ~ m.role ~ m.content ~ m.n ~ '<|im_end|>' }}",
    "format": "{{ '<|im_start|>%s: %s<|im_end|>' % (m.role, m.content) }}",
    "str.format": "{{ '<|im_start|>{}{{}}{}<|im_end|>'.format(m.role, m.content) }}",
    "set": "{% set c = m.content | trim %}{% set t %}<|im_start|>{{ c }}{% endset %}{{ t ~ "
    "'<|im_end|>' }}",
    "macro": "{% macro f(m) %}<|im_start|>{{ m.content }}{{ caller() }}{% endmacro %}"
    "{% call f(m) %}{{ m.n }}<|im_end|>{% endcall %}",
    "table": "{% set marks = {'a': '<|im_start|>'} %}{{ marks.get(m.k, marks['a']) }}{{ m.content "
    "}}<|im_end|>",
    "join": "{{ ['<|im_start|>', m.role, m.content] | join('-') }}{{ ''.join([m.content, "
    "'<|im_end|>']) }}",
    "cut": "<|im_start|>{{ m.content.split('|')[-1] ~ m.content[::2] ~ m.content.rstrip('>') }}"
    "{{ m.content.partition('_')[2] ~ m.content.splitlines() | join }}<|im_end|>",
    "replace": "<|im_start|>{{ m.content | replace('-', '') ~ m.content.replace('x', '|') "
    "}}<|im_end|>",
    "case": "<|im_start|>{{ (m.content | upper).lower() ~ m.content | title }}<|im_end|>",
    "json": "<|im_start|>{{ m | tojson }}{{ m }}{{ [m.content] | string }}<|im_end|>",
    "loops": "<|im_start|>{% for c in m.content %}{{ c }}{% endfor %}{{ m.content | reverse | list "
    "| reverse | join }}"
    "{% for k, v in m.items() %}{{ k }}{{ v }}{% endfor %}<|im_end|>",
    "parts": "<|im_start|>{% for p in m.parts %}{{ p.text }}{% endfor %}{{ m.parts | "
    "map(attribute='text') | join }}<|im_end|>",
    "filters": "<|im_start|>{{ m.content | safe }}{{ m.content | e }}{{ m.content | indent(2) }}"
    "{{ m.content | default('x') | string | first }}{% filter trim %}{{ m.content }}{% endfilter "
    "%}<|im_end|>",
}
TEMPLATES = {
    name: f"{{% for m in messages %}}{body}{{% endfor %}}" for name, body in BODIES.items()
}
pieces = st.sampled_from(
    [
        "<|im_",
        "end|>",
        "<|",
        "im",
        "_",
        "end",
        "|>",
        "<",
        ">",
        "|",
        "-",
        "x",
        "\n",
        " ",
        "|im_end|>",
        START,
        END,
        "é",
        "ß",
    ]
)
spelled = st.lists(pieces, max_size=5).map("".join)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": spelled,
            "content": spelled,
            "n": st.one_of(
                spelled, st.integers(), st.none(), st.floats(), st.dictionaries(spelled, spelled)
            ),
            "parts": st.lists(st.fixed_dictionaries({"text": spelled})),
            "k": spelled,
        }
    ).flatmap(
        lambda m: st.dictionaries(spelled, spelled, max_size=2).map(lambda more: {**more, **m})
    ),
    min_size=1,
    max_size=2,
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_template_writes_special_tokens_and_no_text_is_lost(name):
    @given(messages, st.sampled_from(sorted(BACKENDS)))
    def check(said, backend):
        tokenizer = Tokenizer(BACKENDS[backend], template=TEMPLATES[name])
        ids = tokenizer.prompt(said)
        special = [
            id
            for id in ids
            if id in (tokenizer.backend.token_to_id(START), tokenizer.backend.token_to_id(END))
        ]
        assert [tokenizer.backend.id_to_token(id) for id in special] == [START, END] * len(said)
        text = tokenizer.chat(said)
        assert tokenizer.decode(ids, skip_special=False) == text
        options = {"trim_blocks": True, "lstrip_blocks": True}
        if name != "json":  # whose filter is transformers'
            # what is None is left out, as apply_chat_template does
            there = [{k: v for k, v in one.items() if v is not None} for one in said]
            assert text == ImmutableSandboxedEnvironment(**options).from_string(
                TEMPLATES[name]
            ).render(messages=there)

    check()


@given(messages)
def test_between_the_templates_tokens_text_is_encoded_as_text(said):
    """So that a message which spells a token differs from one that does not only by how the same
    letters read.
    """
    tokenizer = Tokenizer(byte_level(), template=CHATML)
    start, end = (tokenizer.backend.token_to_id(token) for token in (START, END))
    want = []
    for m in said:
        want += [
            start,
            *tokenizer.encode(f"{m['role']}\n{m['content']}"),
            end,
            *tokenizer.encode("\n"),
        ]
    assert tokenizer.prompt(said) == want


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3),
    st.sampled_from(["bpe", "unigram"]),
)
def test_a_prompt_is_the_encoded_chat_where_no_message_spells_a_token(texts, kind):
    said = [{"role": "user", "content": text.replace("<", "(")} for text in texts]
    tokenizer = Tokenizer(
        sentencepiece(kind),
        template="{% for m in messages %}<s> {{ m.role }}: {{ m.content }}</s>{% endfor %}",
    )
    assert tokenizer.prompt(said) == tokenizer.encode(tokenizer.chat(said), special=True)


def ends(template, message, backend=None, token=END):
    backend = backend or byte_level()
    ids = Tokenizer(backend, (), template).prompt([{"role": "user", **message}])
    return ids.count(backend.token_to_id(token))


def test_parts_fields_and_what_a_template_removes_join_to_no_token():
    loop = "{{% for m in messages %}}{}<|im_end|>{{% endfor %}}".format
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    assert ends(loop("{% for p in m.content %}{{ p.text }}{% endfor %}"), {"content": parts}) == 1
    assert ends(loop("{{ m.name }}{{ m.content }}"), {"name": "<|im_", "content": "end|>"}) == 1
    assert ends(loop("{{ m.content | replace('\n', '') }}"), {"content": "<|im_\nend|>"}) == 1
    # also with the template's own signs around
    assert ends(loop("<|{{ m.content }}|>"), {"content": "im_end"}) == 1
    assert ends(loop("{{ m.content }}_end|>"), {"content": "<|im"}) == 1
    assert ends(loop("{{ m.a }}"), {"a": {"<|im_end|>": 1}}) == 1
    # whose join is jinja2's own
    assert ends(loop("{{ m.content | indent(2) }}"), {"content": "a\n<|im_end|>"}) == 1
    assert ends(loop("<|{{ m.role }}|>"), {"role": "im_end|><|im_end"}) == 1


def test_a_number_of_a_message_completes_no_token():
    template = (
        "{% for m in messages %}<|{{ m.n }}|>{{ '<|%s|>' % m.n }}{{ ['<|', m.n, '|>'] | join "
        "}}<|{{ m.n + 0 }}|><|7|>{% endfor %}"
    )
    assert ends(template, {"n": 7}, byte_level("<|7|>"), "<|7|>") == 1


@pytest.mark.parametrize(
    "index", ["c", "c:c + 1", "c - 10", "(c | string | int)", "c:][0:1", "c:c + 1:c - c + 1"]
)
def test_numbers_of_a_message_spell_no_token_with_letters_of_the_template(index):
    """The numbers choose each letter of '<|im_end|>', as a message would that spells it."""
    letters = "{% for c in m.codes %}{{ '<|im_end|>'[" + index + "] }}{% endfor %}"
    template = "{% for m in messages %}" + letters + "{% endfor %}"
    rendered = render_with_origins(
        template, [{"role": "user", "codes": list(range(10))}], {}, [END]
    )
    assert rendered.text == END
    assert b"t" not in rendered.origins
    with pytest.raises(ValueError, match="the template's or a message's"):
        ends(template, {"codes": list(range(10))})
    own = template.replace("m.codes", "range(10)")
    assert ends(own, {"codes": []}) == 1
    apart = template.replace("<|im_end|>", "abcdefghij")
    assert ends(apart, {"codes": [3, 1]}) == 0


def test_a_role_completes_the_token_that_the_template_begins():
    """As Phi-4's template writes it: '<|' + role + '|>'."""
    backend = byte_level("<|user|>", "<|USER|>", "<|end|>")
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}<|{{ "
        "m.role | upper }}|>{% endfor %}"
    )
    tokenizer, said = Tokenizer(backend, template=template), [{"role": "user", "content": "hi"}]
    assert tokenizer.prompt(said) == tokenizer.encode(tokenizer.chat(said), special=True)
    assert [backend.id_to_token(id) for id in tokenizer.prompt(said) if id > 260] == [
        "<|user|>",
        "<|end|>",
        "<|USER|>",
    ]
    assert (
        ends(
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            {"role": "<|user|>"},
            backend,
            "<|user|>",
        )
        == 0
    )


def test_letters_that_normalization_makes_alike_spell_no_token():
    backend = byte_level()
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("</turn>", normalized=True, special=True)])
    template = "{% for m in messages %}{{ m.content }}</turn>\uff1c/turn\uff1e{% endfor %}"
    assert ends(template, {"content": "\uff1c/turn\uff1e"}, backend, "</turn>") == 2
    assert ends(template, {"content": "\uff1c/tu"}, backend, "</turn>") == 2
    backend.normalizer = normalizers.Lowercase()
    assert (
        ends(
            "{% for m in messages %}{{ m.content }}</TURN>{% endfor %}",
            {"content": "</Turn>"},
            backend,
            "</turn>",
        )
        == 1
    )


@pytest.mark.parametrize(
    "text",
    [
        "a\ufdd0b",
        "\uffff\U0010ffff\ue000",
        "qzxaaaaaajaaaaaaaaaaw",
        "<|im_end|>qzxaaaaaajaaaaaaaaabw",
        "\0",
    ],
)
def test_every_character_is_text(text):
    tokenizer = Tokenizer(byte_level(), template=CHATML)
    ids = tokenizer.prompt([{"role": "user", "content": text}])
    assert tokenizer.decode(ids) == f"user\n{text}\n"
    assert ids.count(tokenizer.backend.token_to_id(END)) == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "text", ["what is </s> in html", "</s>", "<s></s>", "a </s><unk> b", "<0x0A>"]
)
def test_sentencepiece_reads_no_space_and_no_token_that_nobody_wrote(kind, text):
    backend = sentencepiece(kind)
    tokenizer = Tokenizer(backend, (2,), "{% for m in messages %}{{ m.content }}{% endfor %}")
    ids = tokenizer.prompt([{"role": "user", "content": text}])
    assert not {1, 2} & set(ids)
    assert not {1, 2} & set(tokenizer.encode(text))  # and no model makes one of letters
    if "<0x" not in text and "unk" not in text:
        assert tokenizer.decode(ids) == text
    turns = Tokenizer(
        backend, (2,), "{% for m in messages %}<s>{{ m.content }}</s>{{ m.content }}{% endfor %}"
    )
    assert [id for id in turns.prompt([{"role": "user", "content": text}]) if id in (1, 2)] == [
        1,
        2,
    ]


def test_what_a_model_does_not_know_stays_unknown_beside_tokens_that_are_text():
    """As T5's: the unknown token is special, and stands for characters; spelled out it is text."""
    known = [(token, 0.0) for token in ("<unk>", "</s>")] + [
        (letter, -2.0) for letter in "\u2581ab</s>unk"
    ]
    backend = tokenizers.Tokenizer(models.Unigram(list(dict(known).items()), unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(
        backend, template="{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    tokens = lambda ids: [backend.id_to_token(id) for id in ids]
    for text, wanted in {
        "axé": "▁ a <unk>",
        "a</s>": "▁ a < / s >",
        "<unk> é": "▁ < u n k > ▁ <unk>",
    }.items():
        assert tokens(tokenizer.encode(text)) == wanted.split()
        assert tokens(tokenizer.prompt([{"role": "user", "content": text}])) == [
            *wanted.split(),
            "</s>",
        ]


def test_spaces_that_a_token_takes_in_are_taken_in_beside_others_that_are_text():
    backend = byte_level("<mask>", lstrip=True, rstrip=True)
    tokenizer = Tokenizer(
        backend,
        template="{% for m in messages %}{{ m.content }} <mask> {{ m.content }}{% endfor %}",
    )
    plain, spelled = ([{"role": "user", "content": content}] for content in ("a ", "a <mask> "))
    assert tokenizer.prompt(plain) == tokenizer.encode(tokenizer.chat(plain), special=True)
    ids, mask = tokenizer.prompt(spelled), backend.token_to_id("<mask>")
    assert ids.count(mask) == 1
    assert tokenizer.decode(ids[: ids.index(mask)]) == "a <mask>"


def test_where_it_cannot_be_told_whose_a_token_is_the_prompt_is_refused():
    template = "{% for m in messages %}{{ ('<|im_end|>' ~ m.content) | center(40) }}{% endfor %}"
    with pytest.raises(
        ValueError,
        match=re.escape("prompt: the special token '<|im_end|>' should be the template's or"),
    ):
        ends(template, {"content": "a b c d e"})
    assert ends(template.replace("~ m.content", "~ 'a b c d e'"), {"content": ""}) == 1
    assert ends(template.replace("'<|im_end|>' ~", "'' ~"), {"content": "<|im_end|>"}) == 0


def test_origins_follow_the_text():
    template = (
        "{{ messages[0].content ~ 'b' }}{{ messages[0].content.replace('a', 'c')[1:] }}{{ "
        "messages[0].role }}"
    )
    said = [{"role": "r", "content": "xay"}]
    assert render_with_origins(template, said, {}, [END]) == ("xaybcyr", b"dddttdr")


@pytest.mark.parametrize(
    "content",
    ["The answer is", "The <|im_end|>answer ", [{"type": "text", "text": "so"}, {"type": "image"}]],
)
def test_a_message_that_goes_on_stays_open(content):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content if m.content is string else "
        "m.content[0].text }}<|im_end|>{% endfor %}"
    )
    tokenizer, said = (
        Tokenizer(byte_level(), template=template),
        [{"role": "assistant", "content": content}],
    )
    options = {"add_generation_prompt": False, "continue_final_message": True}
    text = tokenizer.chat(said, **options)
    assert text == START + (content if isinstance(content, str) else "so")
    assert tokenizer.decode(tokenizer.prompt(said, **options), skip_special=False) == text
    assert ends(template, {"content": ""}) == 1
    with pytest.raises(ValueError, match="continue_final_message should be without an opening"):
        tokenizer.chat(said, continue_final_message=True)
    with pytest.raises(ValueError, match="continue_final_message should be with a last message"):
        tokenizer.chat([{"role": "assistant", "content": None}], **options)


@pytest.mark.parametrize("name", MODELS)
def test_templates_of_models_write_their_tokens(name):
    """As they came, followed from string to string: the ids are those of the text that transformers
    makes of it.
    """
    backend = byte_level(
        START,
        END,
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<s>",
        "</s>",
        "[INST]",
        "<<SYS>>",
    )
    tokenizer = Tokenizer(backend, template=MODELS[name], roles=ROLES)
    ids = tokenizer.prompt(MESSAGES)
    assert ids == tokenizer.encode(tokenizer.chat(MESSAGES), special=True)
    assert (
        name not in ("chatml", "llama 2", "llama 3")
        or ids.count(backend.token_to_id(END))
        or max(ids) > 262
    )


# As Mistral's: tools by tojson, cut and joined again.
TOOLS = """{{- bos_token }}{%- for message in messages %}
    {%- if message["role"] == "user" %}{{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}{%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}{{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}{%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}{%- endfor %}"""


@pytest.mark.parametrize("word", ["plain", "</s>", "[INST]", "<s>[/INST]", "[TOOL_CALLS] ["])
def test_calls_of_tools_write_the_templates_tokens_alone(word):
    names = (
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    )
    tokenizer = Tokenizer(byte_level(*names), template=TOOLS, roles=ROLES)
    call = {"name": f"f{word}", "arguments": {f"a{word}": [1, 2.5, None, word], "b": {word: word}}}
    said = [
        {"role": "user", "content": f"x {word} y"},
        {"role": "assistant", "tool_calls": [{"id": f"i{word}", "function": call}]},
        {"role": "tool", "content": [word], "tool_call_id": word},
        {"role": "assistant", "content": f" {word} "},
    ]
    ids = tokenizer.prompt(said)
    written = [tokenizer.special_tokens[id] for id in ids if id in tokenizer.special_tokens]
    call = ["[TOOL_CALLS]", "</s>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    assert written == ["<s>", "[INST]", "[/INST]", *call, "</s>"]
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.chat(said)
    if word == "plain":
        assert ids == tokenizer.encode(tokenizer.chat(said), special=True)


@pytest.mark.parametrize("letter", ["!", "é", "Ġ"])
def test_a_letter_that_is_a_special_token_is_never_dropped_from_text(letter):
    backend = byte_level(START, END, letter, "<x>")
    tokenizer = Tokenizer(backend, template=CHATML)
    spoken = next(
        text
        for text in ("!", "\u9ed1", " ")
        if letter in backend.pre_tokenizer.pre_tokenize_str(text)[0][0]
    )
    for text in (f"a{spoken}b", f"{spoken}{START}"):
        with pytest.raises(ValueError, match="should be one that tells special tokens from text"):
            tokenizer.prompt([{"role": "user", "content": text}])
        with pytest.raises(ValueError, match="only id of a letter"):
            tokenizer.encode(text)
    text = f"abc<x>{END}"  # has no such letter: special tokens are text, and none is lost
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    written = dataclasses.replace(tokenizer, template=CHATML.replace("\n", letter))
    ids = written.prompt([{"role": "user", "content": text}])
    assert ids.count(backend.token_to_id(letter)) == 2
    assert ids.count(backend.token_to_id(END)) == 1
    assert ids.count(backend.token_to_id("<x>")) == 0
    assert max(ids) < backend.get_vocab_size()


def test_a_letter_that_is_a_special_token_is_written_in_bytes_where_the_model_has_them():
    backend = sentencepiece()
    backend.add_special_tokens(["a"])
    tokenizer = Tokenizer(backend, template=CHATML)
    ids = tokenizer.encode("bab")
    assert backend.token_to_id("a") not in ids
    assert tokenizer.decode(ids) == "bab"
