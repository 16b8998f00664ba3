"""What a runtime (a Python, Apptainer, Docker) runs: SGLang's arguments, and the folders and variables it needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ziphius.launchers.launcher import Launch, PrivateFile

MODULE = ("-m", "sglang.launch_server")
SECRETS_FLAG = "--config"
"""SGLang reads further settings from a YAML file: the API key goes there, off the command line."""
_NOT_FOR_A_CHILD = "ZIPHIUS_"
# The variables of the caller's environment that a container gets. The image has its own values for all others.
_FORWARDED_PREFIXES = ("HF_", "NCCL_", "SGLANG_", "SGL_", "CUDA_", "GLOO_", "UCX_", "NVSHMEM_", "TORCH",
                       "TRITON_", "FLASHINFER_", "OMP_", "OTEL_", "TRANSFORMERS_",
                       "TOKENIZERS_")  # fmt: skip
_FORWARDED = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy",
              "all_proxy", "TZ", "LANG", "LC_ALL", "MASTER_ADDR", "MASTER_PORT", "PYTORCH_CUDA_ALLOC_CONF",
              "PYTORCH_ALLOC_CONF")  # fmt: skip
# Folders of the host that a container must not get. The image has its own CUDA. Of the hub's folder it gets only the
# cache; what else would be in it, such as a model's unpacked code, then goes to XDG_CACHE_HOME.
_OF_THE_HOST = ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "TRITON_PTXAS_PATH", "HF_HOME")
CACHE_FOLDERS = {
    "XDG_CACHE_HOME": "xdg",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",
    "DG_JIT_CACHE_DIR": "deep_gemm",
}
"""Variable -> folder for what a server compiles. An image is read-only, and such files do not work on NFS."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder or file of this machine, seen at the same path inside a container."""

    path: Path
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangServer:
    """One SGLang server."""

    name: str
    """The instance's name."""
    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    """Variables that Ziphius sets, whatever the caller's environment says."""
    secrets: PrivateFile | None
    reads: tuple[Path, ...]
    """Folders that it must see: the model's, and those to which the model's links lead."""
    hub_cache: Path
    """Where it finds and keeps what it fetches from the hub."""
    compiled: Path
    """This machine's own folder for what it compiles."""
    gpus: bool

    @property
    def home(self) -> Path:
        """The home folder inside an image."""
        return self.compiled / "home"


class Runtime(Protocol):
    """How a server becomes a process on this machine."""

    def require(self, env: Mapping[str, str]) -> None:
        """ConfigError, with what to do, when something that it needs is missing."""
        ...

    def launch(self, server: SglangServer, env: Mapping[str, str]) -> Launch:
        """The process to start. It can also be shown when something that it needs is missing."""
        ...


def server_words(server: SglangServer) -> tuple[str, ...]:
    """The words of the command line that follow the interpreter."""
    secrets = () if server.secrets is None else (SECRETS_FLAG, str(server.secrets.path))
    return (*MODULE, *server.arguments, *secrets)


def without_own(env: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without Ziphius' own variables (one of them may be the API key)."""
    return {name: value for name, value in env.items() if not name.startswith(_NOT_FOR_A_CHILD)}


def container_variables(server: SglangServer, env: Mapping[str, str]) -> dict[str, str]:
    """The environment inside an image: the caller's variables that make sense there, caches, the server's own."""
    inside = {
        name: value
        for name, value in env.items()
        if (name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES)) and name not in _OF_THE_HOST
    }
    inside |= {name: str(server.compiled / folder) for name, folder in CACHE_FOLDERS.items()}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        inside.pop(name, None)
    inside["HF_HUB_CACHE"] = str(server.hub_cache)
    return {**inside, **server.variables}


def mounts(server: SglangServer) -> tuple[Mount, ...]:
    """The mounts in the order in which they are made: one inside another comes after it."""
    found = {path: Mount(path) for path in server.reads}
    if server.secrets is not None:
        found[server.secrets.path] = Mount(server.secrets.path)
    found[server.hub_cache] = Mount(server.hub_cache, writable=True)
    found[server.compiled] = Mount(server.compiled, writable=True)
    return tuple(found[path] for path in sorted(found))


def made_folders(server: SglangServer) -> tuple[Path, ...]:
    return (server.hub_cache, server.home, *sorted({server.compiled / folder for folder in CACHE_FOLDERS.values()}))


def needed_folders(model: str) -> tuple[Path, ...]:
    """The model's folder, and those that links in it lead to (as all files of a hub cache's snapshot do)."""
    folder = Path(model).expanduser()
    if not folder.exists():
        return ()
    folder = folder.absolute()
    top = folder if folder.is_dir() else folder.parent
    found = {top}
    for path in (top, *top.iterdir()):
        if path.is_symlink():
            target = path.resolve()
            found.add(target if target.is_dir() else target.parent)
    return tuple(sorted(path for path in found if path.exists() and path != Path("/")))


def default_compiled(env: Mapping[str, str]) -> Path:
    """A folder on a disk of this machine: homes are often shared between machines."""
    return Path(env.get("TMPDIR") or "/tmp") / f"ziphius-cache-{os.getuid()}"
