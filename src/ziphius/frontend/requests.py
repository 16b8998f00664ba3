"""Reads a request's body within its limits, and checks and numbers request ids (rids)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from ziphius.errors import BodyTooLarge, InvalidRequest
from ziphius.frontend.engine_client import new_rid
from ziphius.frontend.protocol import Body, parse

_DISCARDED_BYTES = 64 * 1024 * 1024
"""So much of a body beyond the limit is read and thrown away, so that its sender sees the answer."""
_LONGEST_RID = 256

_T = TypeVar("_T", bound=Body)


async def read_json(request: Request, kind: type[_T], max_bytes: int) -> _T:
    """The body as a `kind`. Raises InvalidRequest, UnsupportedField or BodyTooLarge."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another site can send other types without a preflight request; SGLang refuses them too
    if content_type != "application/json" and not content_type.endswith("+json"):
        await _discard(request)
        raise InvalidRequest("Unsupported Media Type: Only 'application/json' is allowed", param="content-type")
    return parse(await _read(request, max_bytes), kind)


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared[:20]) > max_bytes
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        too_large = too_large or size > max_bytes
        if not too_large:
            chunks.append(chunk)
        elif size > max_bytes + _DISCARDED_BYTES:
            break
    if too_large:
        size_told = f"{declared[:20]} bytes" if declared.isdigit() else f"more than {size} bytes"
        raise BodyTooLarge(f"the body has {size_told}; this server takes at most {max_bytes} (--max-body-bytes)")
    return b"".join(chunks)


async def _discard(request: Request) -> None:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _DISCARDED_BYTES:
            break


def one_rid(rid: str | None) -> str:
    """A caller's rid after a check, or a new one. It goes into logs, so it must be printable."""
    if rid is None:
        return new_rid()
    if not 0 < len(rid) <= _LONGEST_RID or not rid.isprintable():
        raise InvalidRequest(
            f"rid must have 1 to {_LONGEST_RID} printable characters, not {len(rid)}: {rid[:40]!r}", param="rid"
        )
    return rid


def numbered_rids(rid: str, count: int) -> list[str]:
    """The rids of a request's sequences: the request's own for one sequence, numbered ones for several."""
    return [rid] if count == 1 else [f"{rid}_{i}" for i in range(count)]


def several_rids(rids: Sequence[str], copies: int) -> list[str]:
    """As `numbered_rids`, for a batch in which each prompt has a rid from the caller."""
    return [numbered for rid in rids for numbered in numbered_rids(one_rid(rid), copies)]
