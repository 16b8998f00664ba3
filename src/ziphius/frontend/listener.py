"""The HTTP listener: a bound socket, and uvicorn without signal handlers."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from ziphius.errors import InstanceError, PortInUse

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_LAST_WRITES_S = 5
"""The bytes of the last request have so long to reach its client."""
_UNREAD_MS = 60_000
"""A client that acknowledges nothing for so long loses its connection."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on the port. From now on the port is taken, although no connection is accepted yet."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as e:
        raise InstanceError(f"cannot listen on {host}: {e.strerror}", param="host") from e
    # `localhost` has an IPv4 and an IPv6 address; clients that try only one of them try IPv4
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # On Linux accepted sockets inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        if e.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use by another program", param="port") from e
        raise InstanceError(f"cannot listen on {host}:{port}: {e.strerror}") from e
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, because `serve` handles the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def http_server(app: ASGIApp) -> HttpServer:
    """Not started yet: `serve(sockets=[...])` runs it until its `should_exit` is set."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return HttpServer(
        uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_LAST_WRITES_S,
            backlog=_BACKLOG,
        )
    )
