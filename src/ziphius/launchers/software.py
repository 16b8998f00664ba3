"""Which programs are installed, read from their files: importing torch to ask it would take seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 10


@dataclass(frozen=True, slots=True)
class TorchBuild:
    version: str
    cuda: str | None
    """The CUDA version it was built for; None for a build without."""


def torch_build() -> TorchBuild | None:
    """The installed torch, from its version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        return parse_torch_version((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
    except OSError:
        return None


def parse_torch_version(text: str) -> TorchBuild | None:
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return None if version is None else TorchBuild(version[1], cuda[1] if cuda else None)


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA."""
    build = torch_build()
    return build is not None and build.cuda is not None


@dataclass(frozen=True, slots=True)
class Package:
    """One requirement of this project and what is installed of it."""

    name: str
    wanted: str
    """A version specifier, as `>=0.115`."""
    installed: str | None

    @property
    def satisfied(self) -> bool:
        from packaging.specifiers import SpecifierSet

        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


def packages(requirements: Iterable[str] | None = None) -> tuple[Package, ...]:
    """Ziphius' own requirements, or those given, without the extras."""
    from packaging.requirements import Requirement

    lines = importlib.metadata.requires("ziphius") or [] if requirements is None else requirements
    found = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed: str | None = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        found.append(Package(requirement.name, str(requirement.specifier), installed))
    return tuple(found)


def apptainer_version() -> str | None:
    """`apptainer version 1.4.5` -> `1.4.5`; singularity's where only that is installed; None for neither."""
    for program in ("apptainer", "singularity"):
        path = shutil.which(program)
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return f"{program}, which does not answer"
        return done.stdout.strip().split()[-1] if program == "apptainer" else done.stdout.strip()
    return None
