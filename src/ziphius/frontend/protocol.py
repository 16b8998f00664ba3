"""What every request body shares, and how bytes become a body.

A field that a body does not declare is an error, so that no caller believes in something that was ignored.
Fields of OpenAI or SGLang that Ziphius does not have are declared as `Unsupported`.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, TypeVar

import msgspec

from ziphius.errors import InvalidRequest, RequestError, UnsupportedField

Unsupported = Annotated[
    Any, msgspec.Meta(description="Not supported: only null, false, an empty or a neutral value is taken.")
]
"""The type of a field that Ziphius does not have. `refuse_unsupported` refuses values that ask for something."""


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of all bodies, and of the objects inside them."""


class SamplingFields(Body):
    """Fields that mean the same in each API. None: not given."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    stop_regex: Unsupported = None
    regex: Unsupported = None
    ebnf: Unsupported = None
    json_schema: Unsupported = None
    structural_tag: Unsupported = None
    custom_params: Unsupported = None
    watermark: Unsupported = None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "best_of": (1,),
    "modalities": (["text"], ["text", "text"]),
    "service_tier": ("auto", "default"),
    "stream_interval": (1,),
    "beam_width": (1,),
}
"""Values that ask for nothing, besides null, false and empty ones."""

_SHOWN_CHARACTERS = 200
"""So much of a name that a caller made up is repeated in an error about it."""

_T = TypeVar("_T", bound=Body)
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)


def parse(data: bytes, kind: type[_T]) -> _T:
    """`data` as a `kind`. InvalidRequest and UnsupportedField name the field that is wrong."""
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        raise _validation_error(str(e)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise InvalidRequest(f"the body is not valid JSON: {e}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    refuse_unsupported(body, "")
    return body


def refuse_unsupported(body: Body, path: str) -> None:
    """UnsupportedField for the first `Unsupported` field that asks for something. `path` goes before its name."""
    for name in _unsupported_fields(type(body)):
        value = getattr(body, name)
        if value is None or value is False or value in ("", [], {}) or value in _NEUTRAL.get(name, ()):
            continue
        raise UnsupportedField(f"{path}{name} is not supported by this server", param=path + name)


@functools.cache
def _unsupported_fields(kind: type[Body]) -> tuple[str, ...]:
    return tuple(field.name for field in msgspec.structs.fields(kind) if field.type == Unsupported)


def _validation_error(text: str) -> RequestError:
    found = _WHERE.match(text)
    assert found is not None
    path = (found["path"] or "").removeprefix("$").removeprefix(".")
    unknown = _UNKNOWN.match(found["what"])
    if unknown is not None:
        name = (f"{path}.{unknown['name']}" if path else unknown["name"])[:_SHOWN_CHARACTERS]
        return InvalidRequest(f"unrecognized field: {name}", param=name)
    missing = _MISSING.match(found["what"])
    if missing is not None:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"{name} is required", param=name)
    what = found["what"][:1].lower() + found["what"][1:]
    return InvalidRequest(f"{path or 'the body'}: {what}", param=path or None)
