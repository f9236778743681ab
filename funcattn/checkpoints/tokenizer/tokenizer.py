"""Text to token ids and back, on the `tokenizers` library, from tokenizer.json or from the metadata
of a GGUF file.

Plain text and prompts are encoded differently. `encode(text)` never gives the id of a special
token, whatever the text spells. In `encode(text, special=True)`, for rendered chat templates,
`<|im_end|>` is one token. `prompt(messages)` applies both within one chat.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import tokenizers

from ...core import atomic
from ...core.errors import fail
from ..families.tables import Json
from ..writing import written
from . import chunks, conversations, prompts, templates, tokenizer_json
from .declared import declare
from .library import rust_errors

_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    Args:
        backend: of the `tokenizers` library; it is common to copies, and never modified.
        stop: ids that end a generation.
        template: the chat template (jinja2), or None.
        roles: variables of templates: bos_token, eos_token, ... -> the text of the token.
        bounds: resource limits for texts, where the backend is from a file.
        named: further chat templates, by name, such as "tool_use".

    Example:
        >>> from tokenizers import models, pre_tokenizers
        >>> backend = tokenizers.Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "?": 3},
        ...     unk_token="?"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> _ = backend.add_special_tokens(["<end>"])
        >>> tokenizer = Tokenizer(backend, stop=(0,))
        >>> tokenizer.encode("b a <end>", special=True), tokenizer.encode("b a <end>")
        ([2, 1, 0], [2, 1, 3, 3, 3])
    """

    backend: tokenizers.Tokenizer
    stop: tuple[int, ...] = ()
    template: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    bounds: tokenizer_json.Bounds = field(default=tokenizer_json.Bounds(), repr=False)
    named: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        template = "none" if self.template is None else f"{len(self.template)} letters"
        return f"Tokenizer(vocabulary={self.vocabulary}, stop={self.stop}, template: {template})"

    @property
    def vocabulary(self) -> int:
        """The number of ids of the tokenizer; the model may have more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Id -> text of the special tokens, which `decode` omits."""
        return prompts.special_of(self.backend)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: any Unicode without lone surrogates.
            special: True for a rendered prompt: special tokens spelled in it become their ids, and
                none is added. False for any other text: spelled special tokens are encoded as plain
                characters, and the tokens that the model expects first (a Llama's `<s>`) are added.
        """
        if not isinstance(text, str):
            fail(
                "encode",
                "text",
                "a str",
                f"a {type(text).__name__}",
                "Encode texts one by one.",
                TypeError,
            )
        with self._encoding("encode", "text"):
            self.bounds.check(self.backend, text)
            if not special:
                return prompts.encode_plain(self.backend, text)
            self.backend.encode_special_tokens = False
            return chunks.encode(self.backend, text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids (a list, or an integer tensor (T,)); incomplete characters are U+FFFD.

        Args:
            ids: ids unknown to the tokenizer, which a model with spare rows may draw, give no text.
            skip_special: omit special tokens.
        """
        if isinstance(ids, str):
            fail(
                "decode",
                "ids",
                "token ids",
                "a str",
                "Text becomes ids by encode(text).",
                TypeError,
            )
        numbers = [int(number) for number in ids]
        wrong = [number for number in numbers if not 0 <= number < 2**32]
        if wrong:
            fail("decode", "ids", "token ids", wrong[0], "Ids count from 0.")
        with rust_errors("the decoder of tokenizer.json"):
            return self.backend.decode(numbers, skip_special_tokens=skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        tools: Sequence[Mapping[str, Json]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool | str = False,
        continue_final_message: bool | str = False,
        **keywords: Json,
    ) -> str:
        """A conversation as text, by the chat template.

        A special token spelled in a message cannot be told from the template's in this text: use
        `prompt` for ids of untrusted messages.

        Args:
            messages: such as [{"role": "user", "content": "Hello"}]; of texts, numbers, None, lists
                and mappings. Fields that are None are left out.
            tools: JSON schemas of functions that the model may call.
            template: the name of one of several templates. None is "tool_use" where there are tools
                and such a template, else the default.
            add_generation_prompt: end with the beginning of the model's answer.
            continue_final: end with the content of the last message, for the model to continue; or
                the name of the field to continue, such as "reasoning_content".
            continue_final_message: the same, by the name that transformers gives it.
            keywords: further variables of the template: documents, enable_thinking, ...

        Raises:
            CheckpointError: there is no template, it fails, or the sandbox rejects an operation.
            TypeError: messages or tools are not a sequence of mappings, or have values of other
                types.
            ValueError: the last message is not in the text, both options are given, or no template
                has the name.

        Law: equals transformers' apply_chat_template
            (test_conversations.py::test_a_conversation_renders_as_in_transformers).
        """
        goes_on = continue_final or continue_final_message
        request = self._request(messages, tools, template, add_generation_prompt, goes_on, keywords)
        text = templates.render(*request)
        return conversations.opened(text) if goes_on else text

    def prompt(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        tools: Sequence[Mapping[str, Json]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool | str = False,
        continue_final_message: bool | str = False,
        **keywords: Json,
    ) -> list[int]:
        """The ids of a conversation in which only the template writes special tokens.

        A special token spelled in messages, tools or keywords is encoded as plain text, wherever
        its characters come from: one field or several, a part, a name, a number, with or without
        characters of the template between. A role may complete one, `<|` role `|>`, where it is of
        letters, digits, _ and -: roles are trusted. Added tokens that are not special (`<think>` in
        some tokenizers) are tokens everywhere, as in `encode`.

        Args: as in `chat`.

        Raises:
            CheckpointError, TypeError: as `chat`.
            ValueError: as `chat`; or the origin of a special token cannot be determined.

        Law: where all special tokens are the template's, prompt(m) == encode(chat(m),
            special=True); and nothing of the text is lost (test_prompts.py).
        """
        goes_on = continue_final or continue_final_message
        text, said, names, given = self._request(
            messages, tools, template, add_generation_prompt, goes_on, keywords
        )
        special = sorted(set(self.special_tokens.values()))
        rendered = templates.render_with_origins(text, said, names, special, given)
        if goes_on:
            text = conversations.opened(rendered.text)
            rendered = templates.Rendered(text, rendered.origins[: len(text)])
        with self._encoding("prompt", "messages"):
            self.bounds.check(self.backend, rendered.text)
            return prompts.encode(self.backend, rendered)

    def _request(
        self,
        messages: Sequence[Mapping[str, Json]],
        tools: Sequence[Mapping[str, Json]] | None,
        template: str | None,
        add_generation_prompt: bool,
        goes_on: bool | str,
        keywords: Mapping[str, Json],
    ) -> tuple[str, list[Mapping[str, Json]], dict[str, Json], dict[str, Json]]:
        """Template, messages, the template's own variables and those that are given, validated."""
        said, tools = conversations.normalized(messages), conversations.checked_tools(tools)
        chosen = conversations.chosen(
            self.template, self.named, template, has_tools=tools is not None
        )
        if goes_on:
            if add_generation_prompt:
                remedy = "Pass add_generation_prompt=False."
                wanted = "without an opening of the next message"
                fail("chat", "continue_final_message", wanted, "both", remedy)
            said = conversations.marked_at_its_end(
                said, goes_on if isinstance(goes_on, str) else "content"
            )
        names = {name: text for name, text in self.roles.items() if name not in keywords}
        own = {**names, "add_generation_prompt": add_generation_prompt}
        return chosen, said, own, {"tools": tools, **keywords}

    @contextmanager
    def _encoding(self, verb: str, what: str) -> Iterator[None]:
        """Hold the lock of the backend, and translate its errors."""
        try:
            with rust_errors(verb), _LOCK:
                yield
        except (TypeError, UnicodeEncodeError):
            remedy = 'text.encode("utf-8", "replace").decode() has none.'
            fail(verb, what, "Unicode that UTF-8 can write", "a lone surrogate", remedy)

    def files(self) -> dict[str, str]:
        """Name -> text of the tokenizer's files in the Hugging Face layout."""
        settings: dict[str, Json] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.roles,
        }
        if self.template is not None:
            settings["chat_template"] = self.template
        if self.named:
            default = {} if self.template is None else {"default": self.template}
            settings["chat_template"] = [
                {"name": name, "template": text} for name, text in {**default, **self.named}.items()
            ]
        files = {
            "tokenizer.json": self.backend.to_str(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
        }
        if self.stop:
            files["generation_config.json"] = json.dumps(
                {"eos_token_id": list(self.stop)}, indent=2
            )
        return files

    def save(self, folder: str | Path) -> None:
        """Write `files()` into a folder in one step; other files are kept.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with written("save", folder), atomic.files(folder, last="tokenizer.json") as draft:
            for name, text in self.files().items():
                (draft / name).write_text(text, encoding="utf-8")


def from_files(
    tokenizer: str,
    settings: Mapping[str, Json],
    templates: Mapping[str, str],
    stop: Iterable[int],
    beside: Mapping[str, Json] = MappingProxyType({}),
) -> Tokenizer:
    """A Tokenizer from the text of tokenizer.json and the values of the files beside it (see
    `declared`).

    Args:
        tokenizer: the text of tokenizer.json.
        settings: tokenizer_config.json.
        templates: the texts of chat_template.jinja ("default") and of additional templates, by
            name.
        stop: ids that end a generation; where there are none, the eos_token that is declared.
        beside: the values of special_tokens_map.json and its kin, by file.
    """
    bounds = tokenizer_json.check(tokenizer)
    with rust_errors("tokenizer.json"):
        backend = tokenizers.Tokenizer.from_str(tokenizer)
        backend.no_padding()  # a file may ask for any length
        backend.no_truncation()
        if getattr(backend.model, "dropout", None):  # of merges, at random: for training
            backend.model.dropout = None
    roles, template, named = declare(backend, settings, beside, templates)
    ends = tuple(stop)
    if not ends and "eos_token" in roles:
        found = backend.token_to_id(roles["eos_token"])
        ends = () if found is None else (found,)
    return Tokenizer(backend, ends, template, roles, bounds, named)
