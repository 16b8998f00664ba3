"""A launch as lines for a shell, with masked secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from ziphius.launchers.launcher import Launch

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|CREDENTIAL", re.IGNORECASE)
_LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]*@")
"""A proxy's URL with a password."""
_MASK = "********"


def command_line(launch: Launch, env: Mapping[str, str]) -> str:
    """What to type into a shell to get the same process: the variables that differ from `env`, then the command.

    A secret is shown as the variable of `env` that holds it, if there is one. Comments above the command name the files
    and folders that must exist.
    """
    lines = [f"# {note}" for note in launch.notes]
    if launch.folders:
        lines.append(shlex.join(["mkdir", "-p", *map(str, launch.folders)]))
    lines += [f"# {file.path} (readable by its owner only): {file.told}" for file in launch.files]
    if launch.stdin is not None:
        lines.append("# its configuration is written to its stdin")
    changed = {name: value for name, value in launch.env.items() if env.get(name) != value}
    words = [f"{name}={_shown(name, value, env)}" for name, value in sorted(changed.items())]
    words += [shlex.quote(word) for word in launch.argv]
    return "\n".join([*lines, " ".join(words)])


def _shown(name: str, value: str, env: Mapping[str, str]) -> str:
    if _LOGIN.search(value):
        return shlex.quote(_MASK)
    if not _SECRET.search(name):
        return shlex.quote(value)
    for holder, held in env.items():
        if held == value and _SECRET.search(holder):
            return f'"${holder}"'
    return shlex.quote(_MASK)
