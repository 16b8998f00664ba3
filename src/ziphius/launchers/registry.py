"""Asks a container registry for an image's digest and size (OCI distribution 1.1)."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

import httpx2
import msgspec

_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The kernel's name of an architecture -> the registry's name."""
_TIMEOUT_S = 15.0
_DOCKER_HUB = "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """What a registry says about an image."""

    digest: str
    """The manifest's digest for this machine's architecture: it names exactly these bytes."""
    size_bytes: int
    """The size of the compressed layers."""


class _Platform(msgspec.Struct):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct):
    digest: str = ""
    size: int = 0
    platform: _Platform | None = None


class _Manifest(msgspec.Struct):
    manifests: list[_Descriptor] = []
    layers: list[_Descriptor] = []


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


def find_remote(source: str, scheme: str = "https") -> RemoteImage | None:
    """The image that `docker://…` names. None when the registry does not answer, or is private."""
    registry, name, reference = parse_name(source)
    try:
        with httpx2.Client(timeout=_TIMEOUT_S, follow_redirects=True) as client:
            answer = _get(client, f"{scheme}://{registry}/v2/{name}/manifests/{reference}", name)
            manifest = msgspec.json.decode(answer.content, type=_Manifest)
            digest = answer.headers.get("Docker-Content-Digest", reference if ":" in reference else "")
            if manifest.manifests:
                digest = _for_this_platform(manifest).digest
                answer = _get(client, f"{scheme}://{registry}/v2/{name}/manifests/{digest}", name)
                manifest = msgspec.json.decode(answer.content, type=_Manifest)
    except (httpx2.HTTPError, msgspec.MsgspecError, LookupError):
        return None
    size = sum(layer.size for layer in manifest.layers)
    return RemoteImage(digest, size) if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) and size else None


def parse_name(source: str) -> tuple[str, str, str]:
    """(registry, repository, tag or digest) of `docker://…`, with Docker Hub's defaults."""
    rest = source.removeprefix("docker://")
    name, at, digest = rest.partition("@")
    head, slash, tail = name.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost"):
        registry, repository = head, tail
    else:
        registry, repository = _DOCKER_HUB, name if slash else f"library/{name}"
    repository, colon, tag = repository.partition(":")
    return registry, repository, digest if at else (tag if colon else "latest")


def pinned(source: str, digest: str) -> str:
    """`docker://…` with the digest in place of the tag, because the tag may move before the build."""
    name = source.removeprefix("docker://").partition("@")[0]
    head, slash, tail = name.rpartition("/")
    return f"docker://{head}{slash}{tail.partition(':')[0]}@{digest}"


def _get(client: httpx2.Client, url: str, name: str) -> httpx2.Response:
    answer = client.get(url, headers={"Accept": _ACCEPT})
    if answer.status_code == 401:
        challenge = dict(re.findall(r'(\w+)="([^"]*)"', answer.headers.get("WWW-Authenticate", "")))
        query = {"service": challenge.get("service", ""), "scope": challenge.get("scope", f"repository:{name}:pull")}
        token = msgspec.json.decode(
            client.get(challenge["realm"], params=query).raise_for_status().content, type=_Token
        )
        bearer = f"Bearer {token.token or token.access_token}"
        answer = client.get(url, headers={"Accept": _ACCEPT, "Authorization": bearer})
    return answer.raise_for_status()


def _for_this_platform(index: _Manifest) -> _Descriptor:
    machine = platform.machine()
    wanted = ("linux", _ARCHITECTURES.get(machine, machine))
    for each in index.manifests:
        if each.platform is not None and (each.platform.os, each.platform.architecture) == wanted:
            return each
    raise LookupError("no image for {}/{}".format(*wanted))
