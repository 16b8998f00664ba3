"""The native engine as a child process: `ziphius serve`, with its config on stdin."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import BinaryIO

import msgspec

from ziphius.config import Resolved, env_name, option_fields
from ziphius.errors import ConfigError
from ziphius.launchers.launcher import Launch


def native(resolved: Resolved, env: Mapping[str, str]) -> Launch:
    """A server that runs exactly `resolved`. The child resolves nothing again, so nothing can differ.

    ConfigError for a node other than 0, which has no API.

    The config, and with it the API key, travels on stdin. --name and --port are there for a person who reads `ps`.
    """
    config = resolved.config
    if config.node_rank > 0:
        raise ConfigError(
            "start is for node 0, whose HTTP API it waits for; "
            f"here run: ziphius serve --node-rank {config.node_rank} ...",
            param="node_rank",
        )
    argv = (sys.executable, "-m", "ziphius", "serve", "--resolved", "--name", config.name, "--port", str(config.port))
    options = {env_name(option.name) for option in option_fields()}
    child_env = {key: value for key, value in env.items() if key not in options}
    # The caller's folder must not shadow modules (a random http.py there), in the server or in its workers.
    child_env["PYTHONSAFEPATH"] = "1"
    # A crash in native code writes a Python traceback into the log.
    child_env["PYTHONFAULTHANDLER"] = "1"
    return Launch(argv, child_env, msgspec.json.encode(resolved))


def read_resolved(stream: BinaryIO) -> Resolved:
    """The child's side of `native`: read the config from stdin. ConfigError when the parent died before it wrote it."""
    data = stream.read()
    if not data:
        raise ConfigError("no configuration on stdin: the command that started this server ended too early")
    try:
        return msgspec.json.decode(data, type=Resolved)
    except (msgspec.DecodeError, msgspec.ValidationError) as e:
        raise ConfigError(f"the configuration on stdin is broken: {e}") from e
