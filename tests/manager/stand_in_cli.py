"""The `ziphius` command with the stand-in server for an engine: `stand_in_cli.py [HABIT ...] VERB [OPTION ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ziphius.cli import app as cli
from ziphius.config import Resolved
from ziphius.launchers import native
from ziphius.launchers.launcher import Launch


def main() -> None:
    split = sys.argv.index("--")
    habits, sys.argv[1:] = sys.argv[1:split], sys.argv[split + 1 :]
    server = str(Path(__file__).with_name("stand_in_server.py"))

    def launch(resolved: Resolved, env: Mapping[str, str]) -> Launch:
        return Launch((sys.executable, server, *habits), env, msgspec.json.encode(resolved))

    native.native = launch  # type: ignore[assignment]
    os.environ["COLUMNS"] = "100"
    cli.main()


if __name__ == "__main__":
    main()
