"""Chat templates: those that models come with render as in transformers; hostile ones reach
nothing, end, and end nothing.
"""

import os
import subprocess
import sys
import threading
import warnings

import pytest
from conversations import MESSAGES, ROLES, TEMPLATES
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from funcattn.checkpoints import CheckpointError
from funcattn.checkpoints.tokenizer import templates


def render(template, messages=MESSAGES, names=(), **more):
    return templates.render(template, messages, dict(names, **more))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name, add_generation_prompt):
    names = {
        "messages": MESSAGES,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **ROLES,
    }
    theirs = _compile_jinja_template(TEMPLATES[name]).render(**names)
    assert (
        render(TEMPLATES[name], MESSAGES, ROLES, add_generation_prompt=add_generation_prompt)
        == theirs
    )
    assert theirs.strip()


def test_a_template_knows_the_date():
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_a_long_conversation_stays_within_the_bounds():
    long = MESSAGES[1:3] * 1000
    for name in ("chatml", "llama 3"):
        assert (
            render(TEMPLATES[name], long, ROLES, add_generation_prompt=True).count("What is 2 + 2?")
            == 1000
        )


def test_what_a_template_complains_of_is_in_the_error():
    with pytest.raises(CheckpointError, match="roles must alternate"):
        render(TEMPLATES["llama 2"], MESSAGES[:1] + MESSAGES[2:], ROLES)


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
X = "'x' * 4000000"
NESTED = "{% for i in range(60000) %}{% set ns.a = STEP %}{% endfor %}{{ ns.a | list | length }}"
# Each takes gigabytes, minutes or the stack, by another operation of jinja2 or Python.
LARGE = [
    "{{ 'x' * 10 ** 9 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ 'x'.center(999999999) }}",
    "{{ ('x' * 1000000) | replace('x', 'x' * 1000000) }}",
    "{{ (['x' * 1000000] * 100000) | join }}",
    "{% for i in range(99999) %}{{ '" + "x" * 999 + "' }}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}{% "
    "endfor %}",
    "{{ 'a'.encode().ljust(900 * 10**6) | length }}",
    "{{ (1).to_bytes(900 * 10**6, 'big') | length }}",
    "{{ ('%900000000d'.encode() % 1) | length }}",
    "{{ ('{0}' * 230).format(" + X + ") | length }}",
    "{% set s = " + X + " %}{{ ('%(a)s' * 230 % {'a': s}) | length }}",
    "{{ ('a' * 230).translate({97: " + X + "}) | length }}",
    "{{ (range(230) | join(" + X + ")) | length }}",
    "{% set s = " + X + " %}{{ [" + "s," * 230 + "] }}",
    "{{ strftime_now('%99999Y' * 90000) | length }}",
    "{{ ('\t' * 10**6).expandtabs(10**4) }}",
    "{{ '0'.zfill(10 ** 10) }}",
    "{{ ('ab' * 10**7) | urlize }}",
]
SLOW = [
    "{{ (('a\n' * 9000) | indent(100000)) | length }}",
    "{{ messages | slice(10 ** 10) | list }}",
    "{% set ns = namespace(d={}) %}{% for i in range(99999) %}{% set ns.d = dict(ns.d, **{'a' ~ i: "
    "i}) %}{% endfor %}",
    "{% set ns = namespace(s=['x']) %}{% for i in range(100) %}{% set ns.s = [ns.s, ns.s] %}{% "
    "endfor %}{{ ns.s }}",
    "{{ ([[1] * 100000] * 1000) | tojson }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set s = 'a' * 4000000 %}{% for i in range(100000) %}{% if s.count('ab') %}{% endif %}{% "
    "endfor %}",
]
LAZY = ("batch(1)", "slice(1)", "map('string')", "unique")
DEEP = [
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    *(
        "{% set ns = namespace(a=[1]) %}" + NESTED.replace("STEP", f"ns.a | {step}")
        for step in LAZY
    ),
    "{% set ns = namespace(a=[1]) %}{% for i in range(60000) %}{% set ns.a = [ns.a] %}{% endfor "
    "%}{{ ns.a == ns.a[:] }}{{ ns.a }}",
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
    with pytest.raises(
        CheckpointError,
        match=r"chat: the chat template .* (unsafe|undefined|no loader|no attribute|no filter)",
    ):
        render(template)


@pytest.mark.parametrize("template", BROKEN, ids=lambda template: template[:20])
def test_a_template_that_is_broken_is_refused(template):
    with pytest.raises(CheckpointError, match="chat: the chat template"):
        render(template)


@pytest.mark.parametrize("template", [*LARGE, *DEEP], ids=lambda template: template[:40])
def test_a_template_that_takes_too_much_is_refused_and_ends_nothing(template):
    with pytest.raises(CheckpointError, match="chat: the chat template"):
        render(template)
    assert render("{{ messages[0].role }}") == "system"


@pytest.mark.slow
@pytest.mark.parametrize("template", SLOW, ids=lambda template: template[:40])
def test_a_template_without_end_is_ended(template):
    with pytest.raises(
        CheckpointError, match=r"two seconds of computing|none after 4 seconds|MiB of memory"
    ):
        render(template)


def test_what_is_given_to_a_template_may_be_as_large_as_it_is():
    """The bound is on what a rendering adds: 60 MB are more than the process holds, and less than
    it may take.
    """
    long = [{"role": "user", "content": "x" * 4 * 10**6}]
    assert (
        len(render("{{ messages[0].content }}{{ messages[0].content | length }}", long))
        == 4 * 10**6 + 7
    )
    assert render("{{ ('x' * 60 * 10**6) | length }}") == "60000000"
    with pytest.raises(CheckpointError, match="MiB of memory"):
        render("{{ ('x' * 250 * 10**6) | length }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ', '.join(messages | map(attribute='role')) }}",
        "{{ ''.join(messages | selectattr('role', 'equalto', 'user') | map(attribute='content')) }}",
        "{{ '-'.join(['a', 'b', 'a'] | unique) }}",
        "{% set g = messages | map(attribute='role') %}{{ ','.join(g) }}",
        "{{ '-'.join(messages | batch(1) | map('first') | map(attribute='role')) }}",
        "{{ '%s' % (messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | "
        "join('+')) }}",
        "{% set g = messages | map(attribute='role') %}{{ dict.fromkeys(g, 1) }}{{ g | list }}",
        "{{ messages[1].content | e }}{{ ('<' | e) + '>' }}{{ messages | map('tojson') | first | "
        "safe }}",
    ],
)
def test_what_a_filter_yields_lazily_is_used_once(template):
    """As in jinja2's own sandbox; also where each character's writer is followed."""
    want = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    want.filters["tojson"] = _compile_jinja_template("").environment.filters["tojson"]
    want = want.from_string(template.replace("dict.fromkeys", "{}.fromkeys")).render(
        messages=MESSAGES
    )
    assert want
    assert render(template) == want
    assert templates.render_with_origins(template, MESSAGES, {}, ["<|end|>"]).text == want


def test_values_reach_a_template_as_they_are():
    class Name(str):
        pass

    value = {
        "z": None,
        "a": (True, 2, 2.5, -0.0, 2**70),
        "surrogate": "\ud800\ufdd0\0",
        Name("n"): [Name("x")],
        3: {},
    }
    want = str({**value, "a": list(value["a"])})
    assert render("{{ messages[0].v }}", [{"role": "user", "v": value}]) == want
    assert (
        render("{{ messages[0].v.surrogate }}", [{"role": "user", "v": value}])
        == value["surrogate"]
    )


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, {"a": [iter([])]}, {(1, 2): 3}])
def test_what_no_template_can_be_given_is_refused_by_its_place(value):
    with pytest.raises(TypeError, match=r"chat: .*messages\[0\]\['v'\].* should be .*text"):
        render("", [{"role": "user", "v": value}])


def test_messages_that_hold_themselves_are_refused():
    endless = [{"role": "user"}]
    endless[0]["v"] = endless
    with pytest.raises(ValueError, match="nested"):
        render("", endless)


# The process that renders.


def worker():
    render("")
    return templates._Worker.process


def test_one_process_renders_until_it_ends_and_then_another():
    first = worker()
    assert worker() is first
    first.kill()
    assert render("{{ 1 }}") == "1"
    assert worker().pid != first.pid


def test_a_process_that_nobody_asks_leaves_and_another_takes_its_place(monkeypatch):
    templates._Worker.stop()
    short = templates.PROGRAM.replace(
        "import main", "import main; sandbox.worker.IDLE_SECONDS = 0.1"
    )
    monkeypatch.setattr(
        templates,
        "PROGRAM",
        f"import sys; sys.path += sys.argv[1:]; import sandbox.worker; {short}",
    )
    first = worker()
    assert first.wait(60) == 0
    assert worker().pid != first.pid
    templates._Worker.stop()


def test_threads_and_forks_render_side_by_side():
    worker()
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(render("{{ n }}", n=n) == str(n)))
        for n in range(8)
    ]
    [thread.start() for thread in threads]
    read, write = os.pipe()
    # of Python 3.12 and newer: threads are not in the fork, which is the question here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        os.write(write, render("{{ 7 }}").encode())
        templates._Worker.stop()
        os._exit(0)
    [thread.join() for thread in threads]
    assert os.waitpid(child, 0)[1] == 0
    assert (os.read(read, 9), found) == (b"7", [True] * 8)
    os.close(read), os.close(write)


def test_an_interrupt_between_question_and_answer_leaves_no_answer_behind(monkeypatch):
    worker()
    read = templates._read
    monkeypatch.setattr(templates, "_read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        render("old")
    monkeypatch.setattr(templates, "_read", read)
    assert render("new") == "new"


@pytest.mark.parametrize(
    "change", [{"get_executable": lambda: None}, {"get_executable": lambda: "/no/such/python"}]
)
def test_where_no_process_can_be_started_the_error_says_so(monkeypatch, change):
    templates._Worker.stop()
    for name, value in change.items():
        monkeypatch.setattr(f"multiprocessing.spawn.{name}", value)
    with pytest.raises(
        CheckpointError, match=r"chat: .* should be .*\. Render the template elsewhere"
    ):
        render("")


def test_the_process_needs_no_streams_or_variables_and_ends_with_this_one():
    """Run with everything closed and Python's variables set against it; killed, it leaves nothing
    behind.
    """
    script = """
import os, sys
os.close(0); os.close(2)
from funcattn.checkpoints.tokenizer import templates
print(templates.render("{{ messages[0].role }}", [{"role": "user"}], {}), templates._Worker.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    names = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "error",
        "PYTHONINSPECT": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **names},
    )
    text, pid = done.stdout.split()
    assert text == "user"
    for _ in range(1000):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the process that renders is left behind")
