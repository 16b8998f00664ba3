"""SGLang in a Docker image: the `docker run` that runs it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from ziphius.errors import ConfigError
from ziphius.launchers.apptainer import mount_option
from ziphius.launchers.launcher import RUN_ID, Launch
from ziphius.launchers.runtime import SglangServer, container_variables, made_folders, mounts, server_words, without_own

_PROGRAM = "docker"


@dataclass(frozen=True, slots=True)
class Docker:
    """`image`: as `docker run` takes it."""

    image: str
    python: str = "python3"

    def require(self, env: Mapping[str, str]) -> None:
        if shutil.which(_PROGRAM, path=env.get("PATH")) is None:
            raise ConfigError("docker is not installed here")

    def launch(self, server: SglangServer, env: Mapping[str, str]) -> Launch:
        program = shutil.which(_PROGRAM, path=env.get("PATH")) or _PROGRAM
        container = f"ziphius-{server.name}"
        words = [program, "run", "--rm", "--name", container, "--network", "host", "--ipc", "host"]
        # As the first process, SGLang would have to reap orphans. Docker's init does that.
        words += ["--init", "--ulimit", "memlock=-1"]
        if server.gpus:
            words += ["--gpus", "all"]
        for mount in mounts(server):
            words += ["--mount", mount_option(mount, "readonly")]
        inside = container_variables(server, env)
        # Names only: docker takes the values from its own environment, where `ps` does not show them.
        for name in sorted({*inside, RUN_ID}):
            words += ["--env", name]
        argv = (*words, "--entrypoint", self.python, self.image, *server_words(server))
        return Launch(
            argv,
            {**without_own(env), **inside},
            None,
            files=() if server.secrets is None else (server.secrets,),
            folders=made_folders(server),
            # The container is a child of the daemon, so it goes on when `docker run` is killed.
            cleanup=(program, "rm", "--force", container),
        )
