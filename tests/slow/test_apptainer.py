"""Real Apptainer: images, and a stand-in for SGLang in one that forks workers which ignore every signal."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ziphius.errors import ImageError, StartFailed
from ziphius.ipc.messages import LoadProgress
from ziphius.launchers.image import build_trouble, read_record
from ziphius.manager import image_build, process
from ziphius.manager.instance import State

if TYPE_CHECKING:
    from conftest import SglangBench

SECRET = "hf_secretsecret"


def quiet(_: object) -> None:
    pass


def seen(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/seen")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    return found


def marked(bench: SglangBench) -> list[psutil.Process]:
    """The living processes that carry the last start's mark, wherever they are."""
    run_id, found = bench.record().run_id, []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if each.environ().get("ZIPHIUS_RUN_ID") == run_id and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def gone(bench: SglangBench, pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while [pid for pid in pids if process.identity(pid) is not None] or marked(bench):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.05)


class TestImage:
    def test_what_it_was_built_from_is_on_record(self, image: Path, root: Path, apptainer_env: dict[str, str]) -> None:
        record = read_record(image)
        assert record is not None
        assert (record.source, record.digest, record.sglang_version) == (str(root), None, "0.0.1")
        assert record.apptainer_version[0].isdigit()
        assert record.size_bytes == image.stat().st_size
        assert sorted(path.name for path in image.parent.iterdir()) == ["sglang.sif", "sglang.sif.json"]
        info = [sys.executable, "-m", "ziphius", "image", "info", str(image)]
        told = subprocess.run(info, env=apptainer_env, capture_output=True, text=True, timeout=300, check=True).stdout
        assert "0.0.1" in told

    def test_a_failed_build_leaves_what_was_there(
        self, root: Path, tmp_path: Path, apptainer_env: dict[str, str]
    ) -> None:
        target = tmp_path / "x.sif"
        target.write_text("the one of before")
        broken = tmp_path / "broken.tar"
        broken.write_text("no archive")
        with pytest.raises(ImageError, match="could not be built"):
            image_build.build(f"docker-archive:{broken}", target, apptainer_env, quiet, replace=True)
        assert target.read_text() == "the one of before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.tar", "x.sif"]

    def test_from_a_definition_file(
        self, root: Path, image: Path, tmp_path: Path, apptainer_env: dict[str, str]
    ) -> None:
        definition = tmp_path / "x.def"
        definition.write_text(f"Bootstrap: localimage\nFrom: {image}\n\n%environment\n    export FROM_DEFINITION=yes\n")
        phases: list[str] = []
        target = tmp_path / "x.sif"

        def progress(told: LoadProgress) -> None:
            phases.append(told.phase)

        image_build.build(str(definition), target, apptainer_env, progress, replace=False)
        shown = ["apptainer", "exec", str(target), "python3", "-c", "import os; print(os.environ['FROM_DEFINITION'])"]
        done = subprocess.run(shown, env=apptainer_env, capture_output=True, text=True, timeout=300, check=True)
        assert done.stdout == "yes\n"
        assert phases

    def test_without_a_network_there_is_one_clear_line(self, tmp_path: Path, apptainer_env: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        with pytest.raises(ImageError, match="the registry cannot be reached"):
            image_build.build(
                f"docker://127.0.0.1:{port}/a/b:c", tmp_path / "x.sif", apptainer_env, quiet, replace=False
            )
        assert list(tmp_path.iterdir()) == []

    def test_without_mksquashfs(self, root: Path, tmp_path: Path, apptainer_env: dict[str, str]) -> None:
        told = (
            'FATAL:   While performing build: while searching for mksquashfs: "mksquashfs": executable file not found'
        )
        assert "squashfs-tools" in build_trouble(told)


class TestServer:
    def test_runs_until_stopped_and_leaves_no_orphan(self, bench: SglangBench, image: Path) -> None:
        manager = bench.manager()
        resolved = bench.resolved("--stand-in-workers", "2", runtime="apptainer", image=str(image), drain_timeout=5)
        status = manager.start(resolved, quiet).status
        assert status.state is State.RUNNING
        assert (status.kv_tokens, status.running) == (5000, 1)
        assert status.pid is not None
        assert os.getsid(status.pid) == status.pid
        pids = [each.pid for each in marked(bench)]
        assert len(pids) == 3  # the server and its workers; apptainer itself has dropped the mark
        assert status.pid not in pids
        assert any("fired up" in line for line in manager.log_tail("default", 100))
        manager.stop("default", None, quiet)
        gone(bench, pids)
        assert manager.status("default").state is State.STOPPED
        socket.create_server(("127.0.0.1", resolved.config.port)).close()
        assert any("SIGTERM received" in line for line in manager.log_tail("default", 100))

    def test_a_server_and_workers_that_ignore_term(self, bench: SglangBench, image: Path) -> None:
        manager = bench.manager()
        arguments = ("--stand-in-workers", "3", "--stand-in-ignore-term")
        manager.start(bench.resolved(*arguments, runtime="apptainer", image=str(image)), quiet)
        pids = [each.pid for each in marked(bench)]
        manager.stop("default", 0.2, quiet)
        gone(bench, pids)

    def test_kill_9_of_the_main_process_takes_everything_along(self, bench: SglangBench, image: Path) -> None:
        manager = bench.manager()
        resolved = bench.resolved("--stand-in-workers", "2", runtime="apptainer", image=str(image))
        pid = manager.start(resolved, quiet).status.pid
        assert pid is not None
        pids = [each.pid for each in marked(bench)]
        os.kill(pid, signal.SIGKILL)
        gone(bench, pids)
        assert manager.status("default").state is State.FAILED
        assert manager.start(resolved, quiet).status.state is State.RUNNING

    def test_what_it_sees(self, bench: SglangBench, image: Path, tmp_path: Path) -> None:
        """Odd paths and values arrive as they are; the image and the model are read-only, the caches are not."""
        odd = tmp_path / 'a, "b": c'
        odd.mkdir()
        (odd / "config.json").write_text("{}")
        value = 'a,b=c "d" {"e": [1, 2]} $HOME `id` \\ $(id)'
        compiled = tmp_path / "jit"
        bench.env.update({"NCCL_X": value, "HF_TOKEN": SECRET, "PYTHONPATH": "/host", "LD_LIBRARY_PATH": "/host",
                          "HF_HOME": str(tmp_path / "hf"), "PRIVATE": "stays out"})  # fmt: skip
        resolved = bench.resolved(
            "--stand-in-json", '{"a": "b,c"}', runtime="apptainer", image=str(image), model=str(odd), api_key="the-key",
            cache_dir=str(compiled),
        )  # fmt: skip
        bench.manager().start(resolved, quiet)
        found = seen(resolved.config.port)
        env = found["env"]
        assert env["NCCL_X"] == value
        assert env["HF_TOKEN"] == SECRET
        assert env["TRITON_CACHE_DIR"] == str(compiled / "triton")
        assert env["HF_HUB_CACHE"] == str(tmp_path / "hf" / "hub")
        # HF_HOME: what is there beside the hub's cache, and must be written, has no mount.
        assert {"PYTHONPATH", "PRIVATE", "ZIPHIUS_HOME", "HF_HOME"}.isdisjoint(env)
        assert "/host" not in env.get("LD_LIBRARY_PATH", "")
        assert found["others"][-2:] == ["--stand-in-json", '{"a": "b,c"}']
        assert found["model"] == ["config.json"]
        assert found["writable"] == {"/": False, str(compiled / "triton"): True, str(odd): False}
        for each in marked(bench):
            line = " ".join(each.cmdline())
            assert SECRET not in line
            assert "the-key" not in line
        assert SECRET not in (bench.home / "instances/default/server.log").read_text()

    def test_a_failed_start(self, bench: SglangBench, image: Path) -> None:
        resolved = bench.resolved("--stand-in-fail", "memory", "--stand-in-workers", "2", runtime="apptainer",
                                  image=str(image))  # fmt: skip
        with pytest.raises(StartFailed, match="Raise --mem-fraction"):
            bench.manager().start(resolved, quiet)
        gone(bench, [])

    def test_an_image_that_is_none(self, bench: SglangBench, image: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.sif"
        broken.write_text("no image")
        with pytest.raises(StartFailed, match="Apptainer could not run the image"):
            bench.manager().start(bench.resolved(runtime="apptainer", image=str(broken)), quiet)
