"""SGLang in a Python of this machine. It gets the caller's environment, PYTHONPATH included."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ziphius.errors import ConfigError
from ziphius.launchers.launcher import Launch
from ziphius.launchers.runtime import SglangServer, server_words, without_own


@dataclass(frozen=True, slots=True)
class Local:
    """`python`: an interpreter that has SGLang. None: the one that runs Ziphius, if it has SGLang."""

    python: str | None

    def require(self, env: Mapping[str, str]) -> None:
        if self.python is None and importlib.util.find_spec("sglang") is None:
            raise ConfigError(
                "this Python has no SGLang: name one that has with --python, or use an image with "
                "--runtime apptainer (`ziphius image build` makes one)",
                param="python",
            )
        if self._interpreter() is None:
            raise ConfigError(f"--python {self.python}: there is no such program", param="python")

    def launch(self, server: SglangServer, env: Mapping[str, str]) -> Launch:
        argv = (self._interpreter() or str(self.python), *server_words(server))
        child = {**without_own(env), **server.variables}
        # The caller's folder must not shadow modules (a random http.py there).
        child.setdefault("PYTHONSAFEPATH", "1")
        child.setdefault("PYTHONFAULTHANDLER", "1")
        return Launch(argv, child, None, files=() if server.secrets is None else (server.secrets,))

    def _interpreter(self) -> str | None:
        if self.python is None:
            return sys.executable
        found = shutil.which(str(Path(self.python).expanduser()))
        # The link is not resolved: a virtual environment's interpreter finds its packages by the link's place.
        return None if found is None else str(Path(found).absolute())
