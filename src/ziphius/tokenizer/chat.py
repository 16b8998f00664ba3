"""ChatTemplate: messages become the model's prompt. A template is untrusted code and runs in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ziphius.errors import CheckpointError, InvalidRequest
from ziphius.tokenizer.files import TokenizerFiles

_CONTINUE_HERE = "ZIPHIUS_CONTINUES_HERE "
"""Appended to the final message to find its end. Its space shows whether the template strips messages."""

_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                    RecursionError)  # fmt: skip
"""What a template can raise: its own errors, and Python's when a message does not have the shape that it expects."""


class ChatTemplate:
    """One checkpoint's Jinja template with transformers' functions and settings around it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the template's variables, such as bos_token. CheckpointError for bad Jinja."""
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise CheckpointError(f"the chat template is not valid Jinja: line {e.lineno}: {e.message}") from e

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> ChatTemplate | None:
        """None when the checkpoint has no template."""
        if files.chat_template is None:
            return None
        tokens = {
            "bos_token": files.bos_token,
            "eos_token": files.eos_token,
            "unk_token": files.unk_token,
            "pad_token": files.pad_token,
        }
        return cls(files.chat_template, {name: token for name, token in tokens.items() if token is not None})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for `messages` (plain JSON types; text content as one string).

        `add_generation_prompt` opens the assistant's turn. `continue_final_message` instead leaves the
        final message open, so that the answer continues it; `add_generation_prompt` is then ignored.
        InvalidRequest (param `messages`) when the template rejects the messages.
        """
        if not continue_final_message:
            return self._render(messages, add_generation_prompt, tools)
        last = messages[-1].get("content") if messages else None
        if not isinstance(last, str):
            raise InvalidRequest("there is no final message with text to continue", param="messages")
        marked = [*messages[:-1], {**messages[-1], "content": last + _CONTINUE_HERE}]
        text = self._render(marked, False, tools)
        end = text.rfind(_CONTINUE_HERE.strip())
        if end < 0 or last.strip() not in text:
            raise InvalidRequest("the chat template leaves out the final message, so it cannot be continued",
                                 param="messages")  # fmt: skip
        return text[:end] if text.startswith(_CONTINUE_HERE, end) else text[:end].rstrip()

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool,
                tools: Sequence[Mapping[str, Any]] | None) -> str:  # fmt: skip
        try:
            return self._template.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _TEMPLATE_FAULTS as e:
            raise InvalidRequest(f"the chat template cannot render these messages: {e}", param="messages") from e


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals = {
        "range": environment.globals["range"],
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    # Jinja's own tojson escapes HTML characters, which a model must see as they are.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, which could reach Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r}")
        super().__setitem__(name, value)


class _GenerationBlock(Extension):
    """{% generation %}: marks the assistant's words for training; here its body renders as if it were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
