"""What an image is built from, what is asked of a registry, and how a failure is told; nothing is built here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ziphius.errors import ConfigError, ImageError
from ziphius.launchers.image import (
    DEFAULT_SOURCE,
    ImageRecord,
    build_command,
    build_trouble,
    checked_source,
    read_record,
    record_path,
    source_bytes,
)
from ziphius.launchers.registry import find_remote, parse_name, pinned
from ziphius.manager import image_build, process

DIGEST = "sha256:" + "a" * 64
ARM64, AMD64 = "sha256:" + "c" * 64, "sha256:" + "b" * 64


class Registry(BaseHTTPRequestHandler):
    """Wants a token, has one image for two platforms."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        host = self.headers["Host"]
        if self.path.startswith("/token"):
            self._say(200, {"token": "t"})
        elif self.headers.get("Authorization") != "Bearer t":
            challenge = f'Bearer realm="http://{host}/token",service="s",scope="repository:a/b:pull"'
            self._say(401, {}, {"WWW-Authenticate": challenge})
        elif self.path == "/v2/a/b/manifests/v1":
            platforms = [("arm64", ARM64), ("amd64", AMD64)]
            index = [{"digest": d, "size": 1, "platform": {"os": "linux", "architecture": a}} for a, d in platforms]
            self._say(200, {"manifests": index}, {"Docker-Content-Digest": DIGEST})
        elif self.path in (f"/v2/a/b/manifests/{AMD64}", f"/v2/a/b/manifests/{ARM64}"):
            self._say(200, {"layers": [{"digest": "x", "size": 10}, {"digest": "y", "size": 20}]})
        else:
            self._say(404, {"errors": []})

    def _say(self, code: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("machine", "digest"), [("x86_64", AMD64), ("aarch64", ARM64)])
def test_a_registry_tells_digest_and_size(
    registry: str, machine: str, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    found = find_remote(f"docker://{registry}/a/b:v1", scheme="http")
    assert found is not None
    assert (found.digest, found.size_bytes) == (digest, 30)


def test_a_registry_without_an_image_for_this_machine(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert find_remote(f"docker://{registry}/a/b:v1", scheme="http") is None


def test_a_registry_that_does_not_tell(registry: str) -> None:
    assert find_remote(f"docker://{registry}/a/b:v2", scheme="http") is None
    assert find_remote("docker://127.0.0.1:9/a/b:v2", scheme="http") is None


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (DEFAULT_SOURCE, ("registry-1.docker.io", "lmsysorg/sglang", "v0.5.23")),
        ("docker://python", ("registry-1.docker.io", "library/python", "latest")),
        ("docker://host:5000/a/b:c", ("host:5000", "a/b", "c")),
        (f"docker://quay.io/a/b@{DIGEST}", ("quay.io", "a/b", DIGEST)),
    ],
)
def test_names(source: str, parts: tuple[str, str, str]) -> None:
    assert parse_name(source) == parts


def test_a_tag_becomes_a_digest() -> None:
    assert pinned("docker://host:5000/a/b:c", DIGEST) == f"docker://host:5000/a/b@{DIGEST}"
    assert pinned(f"docker://a/b@{AMD64}", DIGEST) == f"docker://a/b@{DIGEST}"
    assert pinned("docker://python", DIGEST) == f"docker://python@{DIGEST}"


class TestSource:
    def test_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.tar").write_bytes(b"x" * 100)
        (tmp_path / "x.def").write_text("Bootstrap: scratch")
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "file").write_bytes(b"x" * 50)
        assert checked_source("docker://a/b:c") == "docker://a/b:c"
        assert checked_source("docker-archive:x.tar") == f"docker-archive:{tmp_path / 'x.tar'}"
        assert checked_source("x.def") == str(tmp_path / "x.def")
        assert checked_source("root") == str(tmp_path / "root")
        assert source_bytes(f"docker-archive:{tmp_path / 'x.tar'}") == 100
        assert source_bytes(str(tmp_path / "root")) == 50
        assert source_bytes(str(tmp_path / "x.def")) is None

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("lmsysorg/sglang:v1", "docker://lmsysorg/sglang:v1"),
            ("no.def", "there is no"),
            ("docker-archive:no.tar", "there is no"),
            ("x.tar", "docker-archive:x.tar"),
        ],
    )
    def test_what_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.tar").touch()
        with pytest.raises(ConfigError, match=reason):
            checked_source(source)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("FATAL:   While making image from oci registry: dial tcp: lookup registry-1.docker.io: no such host",
         "registry cannot be reached"),
        ("FATAL:   While making image from oci registry: manifest unknown", "no such image or tag"),
        ("FATAL:   requested access to the resource is denied", "the registry refuses"),
        ("FATAL:   toomanyrequests: You have reached your pull rate limit", "fewer requests"),
        ("FATAL:   While performing build: while creating squashfs: mksquashfs command failed: exit status 1",
         "mksquashfs failed"),
        ("FATAL:   packer failed to pack: write /tmp/x: no space left on device", "a disk is full"),
        ("FATAL:   something new", "^something new$"),
        ("", "it said nothing"),
    ],
)  # fmt: skip
def test_troubles_are_one_line(output: str, reason: str) -> None:
    import re

    told = build_trouble("INFO:    Starting build...\n" + output if output else "")
    assert re.search(reason, told)
    assert "\n" not in told


def test_the_command() -> None:
    assert build_command("apptainer", "docker://a/b", Path("/x/y.sif")) == (
        "apptainer", "build", "--mksquashfs-args", "-comp zstd -Xcompression-level 3", "/x/y.sif", "docker://a/b",
    )  # fmt: skip


class TestRecord:
    def test_none_and_broken(self, tmp_path: Path) -> None:
        image = tmp_path / "x.sif"
        assert read_record(image) is None
        record_path(image).write_text("{")
        with pytest.raises(ImageError, match="no record of an image"):
            read_record(image)

    def test_read_back(self, tmp_path: Path) -> None:
        record = ImageRecord(
            source="docker://a", digest=DIGEST, sglang_version="0.5.23", built_at="2026-01-01T00:00:00Z",
            apptainer_version="1.4.5", size_bytes=5,
        )  # fmt: skip
        partial, image = tmp_path / "partial", tmp_path / "x.sif"
        partial.write_text("12345")
        image_build.put_image(partial, image, record)
        assert read_record(image) == record
        assert image.read_text() == "12345"


class TestBuild:
    """With a program in Apptainer's place."""

    @pytest.fixture
    def env(self, tmp_path: Path) -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        (tmp_path / "root").mkdir()
        return {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}

    def program(self, tmp_path: Path, script: str) -> None:
        path = tmp_path / "bin" / "apptainer"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def test_what_is_there_is_not_replaced(self, tmp_path: Path, env: dict[str, str]) -> None:
        self.program(tmp_path, "exit 0")
        (tmp_path / "x.sif").write_text("old")
        with pytest.raises(ConfigError, match="--force"):
            image_build.build(str(tmp_path / "root"), tmp_path / "x.sif", env, lambda _: None, replace=False)

    def test_a_full_disk_is_told_with_numbers(
        self, tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.program(tmp_path, "exit 0")
        import shutil

        usage = shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]
        monkeypatch.setattr(image_build.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ImageError, match=r"has 0\.0 GB free, and the image needs about 1\.1 GB"):
            image_build.build(str(tmp_path / "root"), tmp_path / "x.sif", env, lambda _: None, replace=False)

    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
    def test_an_interrupted_build_leaves_nothing(self, tmp_path: Path, env: dict[str, str], how: int) -> None:
        """Of Apptainer neither, which has programs of its own at work and gigabytes unpacked."""
        work = tmp_path / "work"
        self.program(
            tmp_path,
            f"""
            touch "$4"; mkdir "$APPTAINER_TMPDIR/rootfs"; trap "" TERM
            sleep 300 & echo $$ $! >{tmp_path}/pids.new; mv {tmp_path}/pids.new {tmp_path}/pids; wait""",
        )
        words = ["image", "build", "--from", str(tmp_path / "root"), "--out", str(tmp_path / "x.sif")]
        started = subprocess.Popen(
            [sys.executable, "-m", "ziphius", *words], env={**env, "APPTAINER_TMPDIR": str(work)}
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "pids").exists():
            assert time.monotonic() < deadline
            assert started.poll() is None
            time.sleep(0.05)
        started.send_signal(how)
        assert started.wait(60) == 128 + how
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert [pid for pid in pids if process.identity(pid) is not None] == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "pids", "root", "work"]
        assert list(work.iterdir()) == []
