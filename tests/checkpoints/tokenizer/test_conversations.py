"""Conversations with tools, keywords and last messages to be continued: as in transformers, by
forty templates in the manner of those that models come with.
"""

import dataclasses
import json

import pytest
from samples import metadata, tokenizer
from transformers import PreTrainedTokenizerFast

import funcattn as fa
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer.gguf_metadata import from_metadata
from funcattn.checkpoints.tokenizer.tokenizer import from_files

# How a template writes a turn, and what opens the answer.
TURNS = {
    "chatml": ("'<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n'", "<|im_start|>assistant\n"),
    "headers": (
        "'<|header|>' + m['role'] + '<|/header|>\n\n' + text | trim + '<|eot|>'",
        "<|header|>assistant<|/header|>\n\n",
    ),
    "inst": (
        "('[INST] ' ~ text ~ ' [/INST]') if m.role == 'user' else text ~ eos_token",
        "",
    ),
    "turns": (
        "'<turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ text.strip() ~ '</turn>\n'",
        "<turn>model\n",
    ),
    "bars": ("'<|' ~ m.role ~ '|>\n' ~ text ~ '<|end|>\n'", "<|assistant|>\n"),
    "names": ("m.role | capitalize ~ ': ' ~ text ~ '\n'", "Assistant:"),
    "markdown": ("'### ' ~ m.role | title ~ ':\n' ~ text ~ '\n\n'", "### Assistant:\n"),
    "channels": (
        "'<|start|>' ~ m.role ~ '<|channel|>final<|message|>' ~ text ~ '<|end|>'",
        "<|start|>assistant",
    ),
}
# What it writes besides.
BEFORE = {
    "plain": "{{ bos_token }}",
    "tools": """{%- if tools %}{{- '# Tools\n<tools>' }}
{%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{% endfor %}{{- '\n</tools>\n' }}{%- endif %}""",
    "tools-indented": """{%- if tools is not none %}{% for t in tools %}{% set f = t.function if t.function is defined else t %}
{{ f.name }}({% for k, v in f.parameters.properties.items() %}{{ k }}: {{ v.type }}{% if not loop.last %}, {% endif %}{% endfor %})
{{ f | tojson(indent=4) }}{% endfor %}{% else %}no tools{% endif %}""",
    "keywords": """{%- if enable_thinking is defined and enable_thinking is false %}{{- '/no_think\n' }}{%- endif %}
{%- if date_string is not defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{{- 'Today: ' + date_string + '\nEffort: ' ~ (reasoning_effort | default('medium')) ~ '\n' }}""",
    "documents": """{% if documents %}{% for d in documents %}Document {{ loop.index }}: {{ d['title'] }}
{{ d.text }}
{% endfor %}{% endif %}""",
}
BODY = """{%- for m in messages %}
{%- set text = m.content if m.content is string else (m.content | map(attribute='text') | join('|') if m.content else '') %}
{%- if m.reasoning_content %}{{- '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}
{%- if m.tool_calls is defined %}{{- '[calls]' }}{% endif %}{% if 'content' not in m %}{{- '[none]' }}{% endif %}
{%- if m.tool_calls %}{%- for call in m.tool_calls %}{{- '<call>' ~ call.function.name ~ (call.function.arguments | tojson) ~ '</call>' }}{% endfor %}{% endif %}
{{- TURN }}
{%- endfor %}
{%- if add_generation_prompt %}{{- OPEN }}{% if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>' }}{% endif %}{% endif %}"""
TEMPLATES = {
    f"{turn}-{before}": text + BODY.replace("TURN", write).replace("OPEN", repr(opening))
    for turn, (write, opening) in TURNS.items()
    for before, text in BEFORE.items()
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What the weather is <now>.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Weather in Zürich? \n"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": "I must ask."},
    {"role": "tool", "name": "weather", "content": '{"temp": 3}'},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}],
    },
    {"role": "assistant", "content": "It is 3 ", "tool_calls": None, "reasoning": "three"},
]
OPTIONS = {
    "plain": {},
    "no-prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "no-tools": {"tools": []},
    "keywords": {"enable_thinking": False, "date_string": "1 May 2026", "reasoning_effort": "high"},
    "roles": {"eos_token": "<other>"},
    "documents": {"documents": [{"title": "Alps", "text": "high"}]},
}


def with_template(template, **more):
    return dataclasses.replace(tokenizer(), template=template, **more)


def theirs(ours):
    roles = dict(ours.roles)
    made = PreTrainedTokenizerFast(tokenizer_object=ours.backend, **roles)
    named = {**({"default": ours.template} if ours.template else {}), **ours.named}
    made.chat_template = named if ours.named else ours.template
    return made


def test_there_are_forty_templates():
    assert len(TEMPLATES) == len(set(TEMPLATES.values())) == 40


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_renders_as_in_transformers(name):
    ours = with_template(TEMPLATES[name])
    reference = theirs(ours)
    for options in OPTIONS.values():
        options = {"add_generation_prompt": True, **options}
        wanted = reference.apply_chat_template(TALK, tokenize=False, **options)
        assert ours.chat(TALK, **options) == wanted


@pytest.mark.parametrize("field", [True, "content", "reasoning_content"])
@pytest.mark.parametrize("name", ["chatml-tools", "headers-keywords", "turns-plain"])
def test_a_last_message_is_continued_as_in_transformers(name, field):
    ours = with_template(TEMPLATES[name])
    options = {"add_generation_prompt": False}
    wanted = theirs(ours).apply_chat_template(
        TALK, tokenize=False, continue_final_message=field, **options
    )
    assert ours.chat(TALK, continue_final=field, **options) == wanted
    assert ours.chat(TALK, continue_final_message=field, **options) == wanted


SEVERAL = {"tool_use": "with tools: {{ tools | length }}", "rag": "{{ documents[0].title }}"}


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, None), ({"tools": TOOLS}, None), ({"tools": TOOLS}, "default"), ({}, "rag")],
)
def test_one_of_several_templates_is_chosen_as_in_transformers(options, name):
    ours = with_template("plain {{ tools is none }}", named=SEVERAL)
    options = {**options, "documents": OPTIONS["documents"]["documents"]}
    wanted = theirs(ours).apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True, chat_template=name, **options
    )
    assert ours.chat(TALK, template=name, **options) == wanted


def test_a_template_of_no_name_is_refused():
    with pytest.raises(ValueError, match="template should be None or one of 'default', 'rag'"):
        with_template("x", named={"rag": "y"}).chat(TALK, template="tool_use")
    with pytest.raises(CheckpointError, match="chat template"):
        with_template(None, named=SEVERAL).chat(TALK)


def test_named_templates_are_saved_and_loaded(tmp_path):
    ours = with_template("x", named=SEVERAL)
    files = ours.files()
    again = from_files(
        files["tokenizer.json"], json.loads(files["tokenizer_config.json"]), {}, ours.stop
    )
    assert (again.template, dict(again.named)) == ("x", SEVERAL)
    beside = from_files(files["tokenizer.json"], {}, {"default": "d", "rag": "r"}, ())
    assert (beside.template, dict(beside.named)) == ("d", {"rag": "r"})


def test_named_templates_of_gguf_are_read():
    fields = {
        **metadata(),
        "tokenizer.chat_templates": ["rag"],
        "tokenizer.chat_template.rag": "r",
    }
    assert from_metadata(fields).named == {"rag": "r"}
    del fields["tokenizer.chat_template.rag"]
    with pytest.raises(CheckpointError, match=r"chat_template\.rag"):
        from_metadata(fields)


@pytest.mark.parametrize(
    "tools", ["weather", [print], {"name": "weather"}, [None], 3], ids=lambda tools: str(tools)[:9]
)
def test_tools_that_are_no_schemas_are_refused(tools):
    with pytest.raises(TypeError, match="chat: tools should be JSON schemas"):
        with_template("{{ tools }}").chat(TALK, tools=tools)


def test_keywords_that_are_no_data_are_refused():
    with pytest.raises(TypeError, match="chat: style should be text"):
        with_template("{{ style }}").chat(TALK, style=object())


def test_tools_and_keywords_write_no_special_tokens():
    """`<|turn|>` and `<|end|>` are special in the sample tokenizer."""
    template = "<|turn|>{{ tools[0].name }} {{ style }}{{ tools | tojson }}<|end|>"
    ours = with_template(template)
    tools = [{"name": "a<|end|>b"}]
    ids = ours.prompt(TALK, tools=tools, style="<|turn|>")
    assert (ids.count(0), ids.count(1)) == (1, 1)
    assert (ids[0], ids[-1]) == (1, 0)
    text = ours.chat(TALK, tools=tools, style="<|turn|>")
    assert ours.decode(ids, skip_special=False) == text
    assert fa.checkpoints.Tokenizer.encode(ours, text, special=True).count(0) == 3
