"""Chat templates: those that models come with render as in transformers; hostile ones reach nothing and end."""

import subprocess
import sys

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.templates import render

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "user", "content": "Sicher? Größe ☃ 日本"},
]
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% endif %}{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system %}{% set c = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ m['content'] %}
{% else %}{% set c = m.content %}{% endif %}
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}
{% else %}{{ ' ' + c + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "loops": """{%- set ns = namespace(last=-1, seen=[]) -%}
{%- for m in messages if m.role != 'system' %}
    {%- if loop.first %}[{{ loop.length }}]{% endif %}{{ loop.index }}/{{ loop.revindex }}:{{ m.role }}
    {%- if loop.previtem is defined %}<{{ loop.previtem.role }}{% endif %}
    {%- if not loop.last %}>{{ loop.nextitem.role }}{% else %}.{% endif %}
    {%- set ns.last = loop.index0 %}{% set ns.seen = ns.seen + [m.role] %}
    {%- if m.role == 'assistant' %}{% continue %}{% endif %}{{ loop.cycle('a', 'b') }}
{%- else %}none{%- endfor %}{{ ns.last }}{{ ns.seen | join(', ') }}""",
    "macros": """{% macro turn(m, upper=false) %}
{{ (m.role | upper if upper else m.role) ~ ': ' ~ m.content | tojson }}{{ caller() if caller }}{% endmacro %}
{{ turn(messages[0]) }}{% call turn(messages[1], upper=true) %}!{% endcall %}{{ messages[0] | tojson(indent=2) }}
{%- generation %}{{ messages[2].reasoning_content.split(' ')[-1] }}{% endgeneration %}""",
    "filters": """{{ messages | map(attribute='role') | unique | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{% set x %}{{ messages[1].content | trim }}{% endset %}
{{ x }}{{ '%s-%03d' % ('a', 7) }}{{ '{:>5}'.format('b') }}{{ 'a' * 3 }}{{ 2 ** 5 }}{{ tools is none }}
{% for k, v in messages[2].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[1].content.replace('2', 'two') | indent(2) }}
{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ messages[::-1][0].role }}
{{ {'b': 1, 'a': 2} | dictsort }}{% with y = x ~ 1 %}{{ y }}{% endwith %}""",
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name, add_generation_prompt):
    names = {"messages": MESSAGES, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None, **ROLES}
    theirs = _compile_jinja_template(TEMPLATES[name]).render(**names)
    assert render(TEMPLATES[name], MESSAGES, ROLES, add_generation_prompt) == theirs
    assert theirs.strip()


def test_a_template_knows_the_date():
    assert render("{{ strftime_now('%Y') }}", MESSAGES, {}, True).startswith("20")


def test_a_long_conversation_stays_within_the_steps():
    long = MESSAGES[1:3] * 1000
    for name in ("chatml", "llama 3"):
        assert render(TEMPLATES[name], long, ROLES, True).count("What is 2 + 2?") == 1000


def test_what_a_template_complains_of_is_in_the_error():
    with pytest.raises(CheckpointError, match="roles must alternate"):
        render(TEMPLATES["llama 2"], MESSAGES[:1] + MESSAGES[2:], ROLES, True)


# Templates that came with a hostile file.

REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # CVE-2024-34359
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages).x.y }}",
    "{{ (messages | attr('__class__')).x }}",
    "{{ (messages | map(attribute='__class__') | list)[0].x }}",
    "{{ ('%s' | format(1) | attr('format'))(messages).__class__.x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
]
ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(99000) %}{{ ('y' * 4000000)[:1] }}{% endfor %}",
    "{{ ('x' * 4000000) | wordwrap(1) }}",
    "{{ ([[1] * 100000] * 1000) | sum(start=[]) }}",
]
GROWING = [
    "{{ range(10 ** 9) }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ 'x'.center(999999999) }}",
    "{{ 'x' | indent(999999999, true) }}",
    "{{ lipsum(100000) }}",
    "{{ ('x' * 1000000).replace('x', 'x' * 1000000) }}",
    "{{ ('x' * 1000000) | replace('x', 'x' * 1000000) }}",
    "{{ ''.join(['x' * 1000000] * 100000) }}",
    "{{ ['x' * 1000000] * 100000 | join }}",
    "{{ ([[1] * 100000] * 1000) | tojson }}",
    "{% for i in range(99999) %}{{ '" + "x" * 99 + "' }}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(100) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(100) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "{% set ns = namespace(s=['x']) %}{% for i in range(100) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(100) %}{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}{{ ns.s | tojson }}",
]
BROKEN = [
    "{% if %}",
    "{{ 1 // 0 }}",
    "{{ messages[0].a.b.c }}",
    "{{ " + "(" * 5000,
    "{{ " + "9" * 5000 + " }}",
    "{{ undefined() }}",
]


@pytest.mark.parametrize("template", REACHING)
def test_a_template_that_reaches_out_is_refused(template):
    with pytest.raises(CheckpointError, match=r"chat: the chat template .* (unsafe|undefined|another file|no attribute)"):
        render(template, MESSAGES, {}, True)


@pytest.mark.parametrize("template", BROKEN, ids=lambda template: template[:20])
def test_a_template_that_is_broken_is_refused(template):
    with pytest.raises(CheckpointError, match="chat: the chat template"):
        render(template, MESSAGES, {}, True)


def test_namespaces_in_namespaces_print_short():
    template = (
        "{% set ns = namespace(s=1) %}{% for i in range(60) %}{% set ns.s = namespace(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s }}"
    )
    assert render(template, MESSAGES, {}, True) == "<Namespace>"


def test_endless_and_growing_templates_end_in_little_memory():
    """In a process that could take 1.5 GiB and 60 s of computing for all of them together (they take 600 MB and 10 s)."""
    script = f"""
import resource
from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.templates import render
for template in {ENDLESS + GROWING!r}:
    try:
        render(template, {MESSAGES!r}, {{}}, True)
        print("rendered:", template)
    except CheckpointError as error:
        assert "MemoryError" not in str(error), template
"""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**29, 3 * 2**29))

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=limit)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
