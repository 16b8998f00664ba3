"""SGLang in an Apptainer image (a SIF): the `apptainer exec` that runs it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ziphius.errors import ConfigError
from ziphius.launchers.launcher import RUN_ID, Launch
from ziphius.launchers.runtime import (
    Mount,
    SglangServer,
    container_variables,
    made_folders,
    mounts,
    server_words,
    without_own,
)

PROGRAMS = ("apptainer", "singularity")
_PREFIX = "APPTAINERENV_"


def find_program(env: Mapping[str, str]) -> str | None:
    """The path of Apptainer (or of singularity, its former name) on the caller's PATH, or None."""
    for program in PROGRAMS:
        found = shutil.which(program, path=env.get("PATH"))
        if found is not None:
            return found
    return None


def require_program(env: Mapping[str, str]) -> str:
    program = find_program(env)
    if program is None:
        raise ConfigError("apptainer is not installed here (scripts/install_apptainer.sh can put it into a folder)")
    return program


@dataclass(frozen=True, slots=True)
class Apptainer:
    """`image`: a SIF (or an unpacked root). `python`: its interpreter."""

    image: Path
    python: str = "python3"

    def require(self, env: Mapping[str, str]) -> None:
        require_program(env)
        if not self.image.exists():
            raise ConfigError(f"there is no image {self.image}: `ziphius image build` makes one", param="image")

    def launch(self, server: SglangServer, env: Mapping[str, str]) -> Launch:
        program = find_program(env) or PROGRAMS[0]
        words = [program, "exec"]
        # With its own process ids, everything in it ends with its first process, even what ignores signals.
        words += ["--pid"]
        if server.gpus:
            words += ["--nv"]
        # The image's environment and the values meant for it stay as they are: no shell reads them.
        words += ["--cleanenv", "--no-eval", "--no-mount", "cwd", "--pwd", "/"]
        # A separate home folder: root's would hide what an image keeps in /root, and a user's may be on NFS.
        words += ["--home", str(server.home)]
        for mount in mounts(server):
            words += ["--mount", mount_option(mount)]
        argv = (*words, str(self.image), self.python, *server_words(server))
        # SingularityCE knows only its own prefix. Apptainer accepts that one too, with a warning.
        prefix = _PREFIX if Path(program).name == "apptainer" else "SINGULARITYENV_"
        inside = {prefix + name: value for name, value in container_variables(server, env).items()}
        return Launch(
            argv,
            {**_of_the_host(env), **inside},
            None,
            files=() if server.secrets is None else (server.secrets,),
            folders=made_folders(server),
            marks=(RUN_ID, prefix + RUN_ID),
        )


def mount_option(mount: Mount, read_only: str = "ro") -> str:
    """`--mount`'s value: its fields are quoted as in a CSV line, because a path may hold commas, colons and quotes."""
    fields = ["type=bind", f"source={mount.path}", f"destination={mount.path}"]
    if not mount.writable:
        fields.append(read_only)
    return ",".join(_csv_field(field) for field in fields)


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def _of_the_host(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of Apptainer itself. Variables that the caller meant for other images are not passed on."""
    own = without_own(env)
    return {name: value for name, value in own.items() if not name.startswith((_PREFIX, "SINGULARITYENV_"))}
