"""What is checked: an object of any module, and which laws are about it.

locate("my.kernels:attend")            an object of a module
locate("kernels.py:attend")            of a file
locate("funcattn.sampling:top_p(0.9)") a call with literal arguments

kind_of(object)     kernel, sampler, cache, transform or acceptance
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core import errors
from ..core.errors import printable
from ..kernels import Kernel, attend
from ..quantization import quantize
from ..sampling import Sampler
from ..speculation import Rule

KINDS = ("kernel", "sampler", "cache", "transform", "acceptance")


def locate(name: str) -> Any:
    """The object that `module:object` or `file.py:object` names.

    Args:
        name: a module or a file, a colon, and an attribute, a chain of attributes, or a call of one
            with literal arguments. Modules of the current folder are found.

    Raises:
        ValueError: it is not of this form, or names what is not there or cannot be imported.

    Example:
        >>> locate("funcattn.sampling:top_k(3)")
        Sampler(top_k(3))
    """
    place, colon, text = name.partition(":")
    if Path(place).suffix != ".py" and not all(part.isidentifier() for part in place.split(".")):
        colon = ""
    if not colon or not text:
        remedy = "Such as my.kernels:attend, or kernels.py:attend."
        errors.fail("check", "the object", "module:object or file.py:object", repr(name), remedy)
    module = _module(place)
    try:
        return _evaluate(ast.parse(text, mode="eval").body, module)
    except SyntaxError:
        remedy = "Such as attend, Kernels.attend or top_k(3)."
        errors.fail("check", "the object", "an attribute or a call of one", repr(text), remedy)


def kind_of(subject: Any) -> str | None:
    """The laws that are about an object, by its type and its parameters; None where unclear."""
    if isinstance(subject, Sampler):
        return "sampler"
    if isinstance(subject, Rule):
        return "acceptance"
    if isinstance(subject, Kernel):
        return "kernel"
    if hasattr(subject, "encode") and hasattr(subject, "for_head"):
        return "transform"
    if hasattr(subject, "empty") and not inspect.isroutine(subject):
        return "cache"
    if not callable(subject):
        return None
    names = parameters(subject)
    if names is None or len(names) >= 3:
        return "kernel"
    return "transform" if len(names) == 1 else None


def signature_of(kernel: Any) -> str:
    """The name in `signatures.SIGNATURES` that the parameters of a kernel suggest."""
    names = parameters(kernel)
    if names is None:  # built in
        return "sdpa" if "attn_mask" in (getattr(kernel, "__doc__", None) or "") else "plain"
    if "attn_mask" in names:
        return "sdpa"
    if "causal" in names:
        return "flash"
    return "mask" if len(names) > 3 and "mask" in names[3] else "plain"


def as_function(kind: str, subject: Any) -> Any:
    """What laws of a kind are called with: a Kernel as a function, a scheme as a transform."""
    if isinstance(subject, Kernel):
        return lambda q, k, v, mask: attend(q, k, v, mask, kernel=subject)
    return quantize(subject) if kind == "transform" and hasattr(subject, "encode") else subject


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of what is checked, such as of a missing batching rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parameters(f: Any) -> list[str] | None:
    """The names of the parameters that a function takes by position or name; None if unknown."""
    try:
        known = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return None
    return [p.name for p in known if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def in_a_line(error: BaseException, width: int = 200) -> str:
    """An exception in one line."""
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return printable(textwrap.shorten(told, width, placeholder="..."))


def _module(place: str) -> ModuleType:
    of_file = place.endswith(".py")
    folder = str(Path(place).resolve().parent) if of_file else str(Path.cwd())
    if of_file and not Path(place).is_file():
        errors.fail("check", "the module", "a file", repr(place), "There is no such file.")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _of_file(Path(place).resolve()) if of_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        reason = in_a_line(error)
        raise ValueError(f"check: {place} cannot be imported: {reason}") from error


def _of_file(path: Path) -> ModuleType:
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    name = path.stem if known is None else f"checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as an import does: dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _evaluate(node: ast.expr, module: ModuleType) -> Any:
    """A name, an attribute, or a call with literal arguments: nothing else is run."""
    if isinstance(node, ast.Name):
        return _attribute(module, node.id)
    if isinstance(node, ast.Attribute):
        return _attribute(_evaluate(node.value, module), node.attr)
    if isinstance(node, ast.Call):
        f: Callable[..., Any] = _evaluate(node.func, module)
        try:
            given = [ast.literal_eval(x) for x in node.args]
            named = {str(x.arg): ast.literal_eval(x.value) for x in node.keywords}
        except ValueError:
            raise SyntaxError from None
        try:
            return f(*given, **named)
        except Exception as error:
            raise ValueError(f"check: {ast.unparse(node)} raises {in_a_line(error)}") from error
    raise SyntaxError


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        where = getattr(holder, "__name__", type(holder).__name__)
        near = suggestion(name, dir(holder))
        raise ValueError(f"check: {where} has no {name}.{near}") from None


def suggestion(word: str, known: Iterable[str]) -> str:
    """A known word that is near, as a question, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""
