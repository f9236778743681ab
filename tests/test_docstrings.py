"""What `help` and `inspect` show of the public names: a sentence, every parameter, no addresses."""

import inspect
import re
import types

import pytest
import torch

import funcattn as fa
from funcattn.core.doors import door, shown_value

PUBLIC = {name: getattr(fa, name) for name in fa.__all__}
ROOMS = {name: value for name, value in PUBLIC.items() if isinstance(value, types.ModuleType)}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
IN_ROOMS = {
    f"{room}.{name}": value
    for room, module in ROOMS.items()
    for name in getattr(module, "__all__", ())
    if inspect.isfunction(value := getattr(module, name))
}


def documented(text):
    """The parameters that stand in front of a colon: `q: ...`, `model, params: ...`, `x (*lead, T):
    ...`.
    """
    heads = re.findall(
        r"^ *((?:\*{0,2}\w+, )*\*{0,2}\w+)(?: \([^)]*\))?:(?: |$)", text, re.MULTILINE
    )
    return {name.lstrip("*") for head in heads for name in head.split(", ")}


def undocumented(function):
    """The parameters of a function that its docstring leaves out."""
    return [
        name
        for name in inspect.signature(function).parameters
        if name not in documented(inspect.getdoc(function) or "")
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_in_a_sentence_what_it_is(name):
    first = (inspect.getdoc(PUBLIC[name]) or "").partition("\n\n")[0]
    assert re.search(r"\w{2}.*[.:;)]$", first, re.DOTALL), first


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_of_a_public_function_is_documented(name):
    assert undocumented(FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", [*FUNCTIONS, *IN_ROOMS])
def test_a_signature_shows_no_address_of_a_function(name):
    defaults = [
        p.default for p in inspect.signature((FUNCTIONS | IN_ROOMS)[name]).parameters.values()
    ]
    assert [repr(x) for x in defaults if " at 0x" in repr(x) and not isinstance(x, tuple)] == []


RATE = fa.training.cosine(1.0, 10)


def test_a_default_that_is_a_function_is_shown_by_name_and_is_that_function():
    def half(x):
        return x / 2

    @door
    def called(x: torch.Tensor, *, f=half, schedule=RATE) -> torch.Tensor:
        return f(x)

    signature = inspect.signature(called)
    assert str(signature) == "(x: torch.Tensor, *, f=half, schedule=cosine(...)) -> torch.Tensor"
    assert signature.parameters["f"].default(3) == 1.5
    assert called(torch.tensor(3.0)) == 1.5
    assert shown_value(half) == "half"


def test_the_rules_see_what_breaks_them():
    def f(x, y, *, key):
        """Compute.

        Args:
            x, key: of it.
        """

    assert undocumented(f) == ["y"]
