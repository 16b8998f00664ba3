"""An Apptainer image of SGLang: its source, the command that builds it, its record, and why a build failed."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from ziphius.errors import ConfigError, ImageError

DEFAULT_SOURCE = "docker://lmsysorg/sglang:v0.5.23"
"""The source of an image when the user names none."""

VERSION_PROGRAM = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
"""Code for the image's python3 that prints the version of its SGLang."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about an image. It is kept beside the image as IMAGE.json."""

    source: str
    digest: str | None
    """Of the registry's manifest. None when the source has no digest, or the registry did not tell it."""
    sglang_version: str | None
    """As the image's python3 reports it. None when the image has no SGLang."""
    built_at: str
    """UTC, as 2026-01-31T12:00:00Z."""
    apptainer_version: str
    size_bytes: int


def record_path(image: Path) -> Path:
    return image.with_name(image.name + ".json")


def read_record(image: Path) -> ImageRecord | None:
    """None when the image was not built by Ziphius. ImageError when the record cannot be read."""
    path = record_path(image)
    try:
        return msgspec.json.decode(path.read_bytes(), type=ImageRecord)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ImageError(f"cannot read {path}: {e.strerror}") from e
    except (msgspec.DecodeError, msgspec.ValidationError) as e:
        raise ImageError(f"{path} is no record of an image: {e}") from e


def checked_source(source: str) -> str:
    """As Apptainer takes it, paths absolute: docker://NAME, docker-archive:FILE, a .def file, or a folder with a root.

    ConfigError when it is none of these, or does not exist.
    """
    if source.startswith("docker://"):
        return source
    scheme, colon, rest = source.partition(":")
    path = Path(rest if colon and scheme == "docker-archive" else source).expanduser().absolute()
    if not path.exists():
        if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)+(?::[\w.-]+)?", source):
            raise ConfigError(f"there is no file {source}; an image of a registry is written docker://{source}",
                              param="from")  # fmt: skip
        raise ConfigError(f"there is no {path} to build from", param="from")
    if colon and scheme == "docker-archive":
        return f"docker-archive:{path}"
    if path.is_file() and path.suffix != ".def":
        raise ConfigError(f"{path} is no .def file; an archive of docker's is written docker-archive:{source}",
                          param="from")  # fmt: skip
    return str(path)


def source_bytes(source: str) -> int | None:
    """The size of a local source in bytes. None for a remote source and for a .def file."""
    path = Path(source.removeprefix("docker-archive:"))
    if source.startswith("docker://") or path.suffix == ".def":
        return None
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir() or file.is_symlink())


def build_command(program: str, source: str, target: Path) -> tuple[str, ...]:
    """zstd at a low level takes a fifth of gzip's time, for about the same size."""
    return (program, "build", "--mksquashfs-args", "-comp zstd -Xcompression-level 3", str(target), source)


_TROUBLES = (
    (r"no such host|Temporary failure in name resolution|dial tcp|i/o timeout|TLS handshake timeout|"
     r"network is unreachable|connection refused|server misbehaving",
     "the registry cannot be reached: build where there is a network, or from a docker-archive: that was made there"),
    (r"toomanyrequests|rate limit", "the registry wants fewer requests of this address: log in (`apptainer registry "
     "login`), or try again later"),
    (r"unauthorized|denied|authentication required|403 \(Forbidden\)",
     "the registry refuses: is the name right, and does it need `apptainer registry login`?"),
    (r"manifest unknown|not found: manifest|name unknown|404 \(Not Found\)", "the registry has no such image or tag"),
    (r"No space left on device|no space left on device",
     "a disk is full: Apptainer unpacks in APPTAINER_TMPDIR and keeps layers in APPTAINER_CACHEDIR"),
    (r"mksquashfs not found|\"mksquashfs\": executable file not found|while searching for mksquashfs",
     "mksquashfs is missing: install squashfs-tools"),
    (r"mksquashfs command failed|mksquashfs.*(?:exit status|signal|[Ff]ailed)",
     "mksquashfs failed: mostly it is the disk, or the memory, that was too small"),
    (r"Failed to create user namespace|user namespaces? (?:is|are) (?:not|disabled)",
     "Apptainer may not make user namespaces here: ask the administrator for them"),
    (r"no descriptor found|invalid tar header|unexpected EOF|not a valid", "the source is damaged"),
)  # fmt: skip


def build_trouble(output: str) -> str:
    """One clear line of why a build failed, from Apptainer's output."""
    said = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    fatal = next(
        (line for line in reversed(said) if line.startswith("FATAL:")), said[-1] if said else "it said nothing"
    )
    fatal = re.sub(r"\s+", " ", fatal.removeprefix("FATAL:")).strip()
    for pattern, meaning in _TROUBLES:
        if any(re.search(pattern, line) for line in said[-20:]):
            return f"{meaning} ({fatal})"
    return fatal


def build_phase(line: str) -> str | None:
    """The phase that begins with a line of Apptainer's output; None for other lines."""
    for start, phase in (
        ("Copying blob", "fetching"),
        ("Getting image source signatures", "fetching"),
        ("Extracting OCI image", "unpacking"),
        ("Verifying bootstrap image", "unpacking"),
        ("Running setup scriptlet", "preparing"),
        ("Running post scriptlet", "preparing"),
        ("Creating SIF file", "packing"),
    ):
        if start in line:
            return phase
    return None
