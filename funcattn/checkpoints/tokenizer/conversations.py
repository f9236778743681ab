"""Conversations as chat templates read them: messages, tools, and a last message to be continued.

Fields that are None are left out, and what a model thought has each name that templates know it by,
as in transformers.

Source: transformers, utils/chat_template_utils.py, _normalize_chat_messages,
    _alias_reasoning_fields, render_jinja_template.
"""

from collections.abc import Mapping, Sequence

from ...core.errors import fail
from ..families import CheckpointError
from ..families.tables import Json

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field
TOOLS = "tool_use"  # the template for conversations with tools, where there are several


def normalized(messages: Sequence[Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    """Messages without what is None, their reasoning under the names that templates read.

    Raises:
        TypeError: they are not a sequence of mappings with roles.

    Example:
        >>> normalized([{"role": "assistant", "content": None, "reasoning": "hm"}])
        [{'thinking': 'hm', 'role': 'assistant', 'reasoning': 'hm', 'reasoning_content': 'hm'}]
    """
    if not _are_mappings(messages) or not all("role" in message for message in messages):
        fail(
            "chat",
            "messages",
            'messages such as [{"role": "user", "content": "Hello"}]',
            repr(messages)[:200],
            "Text without roles goes through encode.",
            TypeError,
        )
    found = []
    for message in messages:
        message = {name: value for name, value in message.items() if value is not None}
        thought = next((message[name] for name in REASONING if name in message), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
        found.append(message)
    return found


def checked_tools(tools: Sequence[Mapping[str, Json]] | None) -> list[Mapping[str, Json]] | None:
    """Tools as a list of mappings, or None."""
    if tools is None:
        return None
    if not _are_mappings(tools):
        remedy = "transformers.utils.get_json_schema(function) writes the one of a function."
        wanted = "JSON schemas, a mapping for each tool"
        fail("chat", "tools", wanted, repr(tools)[:200], remedy, TypeError)
    return list(tools)


def _are_mappings(values: object) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, Mapping) for value in values)


def chosen(
    default: str | None, named: Mapping[str, str], name: str | None, *, has_tools: bool
) -> str:
    """The template for a conversation: the one of a name, else `tool_use` for tools, else the
    default.

    Raises:
        ValueError: there is none of this name. CheckpointError: there is none at all.
    """
    if name is not None and name not in named and (name != "default" or default is None):
        known = ", ".join(map(repr, [*(["default"] if default is not None else []), *named]))
        remedy = "A template of your own: dataclasses.replace(tokenizer, template=...)."
        fail("chat", "template", f"None or one of {known}" if known else "None", repr(name), remedy)
    if name is None and has_tools and TOOLS in named:
        return named[TOOLS]
    found = default if name in (None, "default") else named[name]
    if found is None:
        remedy = (
            "Write the prompt yourself, or set one: dataclasses.replace(tokenizer, template=...)."
        )
        fail("chat", "the tokenizer", "one with a chat template", "none", remedy, CheckpointError)
    return found


# Continuing the last message.


END = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers


def marked_at_its_end(
    messages: Sequence[Mapping[str, Json]], field: str = "content"
) -> list[Mapping[str, Json]]:
    """The messages with a mark after a text of the last one: the content, its last part that is
    text, or another field under all of its names.
    """
    last = dict(messages[-1]) if messages else {}
    content = last.get(field)
    if isinstance(content, str):
        names = [name for name in (REASONING if field in REASONING else (field,)) if name in last]
        last |= {name: content + END for name in names if last[name] == content}
        return [*messages[:-1], last]
    parts = list(content) if isinstance(content, list | tuple) else []
    for place in reversed(range(len(parts))):
        if isinstance(parts[place], Mapping) and isinstance(parts[place].get("text"), str):
            parts[place] = {**parts[place], "text": parts[place]["text"] + END}
            return [*messages[:-1], {**last, field: parts}]
    remedy = f"Give a last message whose {field} is text."
    fail(
        "chat",
        "continue_final_message",
        "with a last message to go on with",
        f"{type(content).__name__} as its {field}",
        remedy,
    )


def opened(text: str) -> str:
    """A text up to the mark, without white space that the template strips from a message."""
    place = text.rfind(END.strip())
    if place < 0:
        remedy = (
            "This template leaves out, or changes, the last message: write the prompt yourself."
        )
        fail(
            "chat",
            "continue_final_message",
            "with a last message that is in the text",
            "another text",
            remedy,
        )
    return text[:place] if text[place : place + len(END)] == END else text[:place].rstrip()
