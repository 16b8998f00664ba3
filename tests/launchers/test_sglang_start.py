"""`--engine sglang --runtime local` against a stand-in server: start, progress, status, stop, crash."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ziphius.errors import ConfigError, StartFailed
from ziphius.ipc.messages import LoadProgress
from ziphius.manager import process
from ziphius.manager.instance import State

if TYPE_CHECKING:
    from conftest import SglangBench


def quiet(_: object) -> None:
    pass


def seen(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/seen")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def test_runs_until_stopped(bench: SglangBench) -> None:
    manager = bench.manager()
    resolved = bench.resolved(api_key="the-key", served_model_name="m", drain_timeout=5)
    status = manager.start(resolved, quiet).status
    assert status.state is State.RUNNING
    assert (status.model, status.running, status.queued) == ("m", 1, 2)
    assert (status.kv_tokens, status.kv_tokens_used, status.generated_tokens_per_s) == (5000, 37, 12.5)
    assert status.pid is not None
    assert os.getsid(status.pid) == status.pid
    address = manager.address("default")
    assert address.api_key == "the-key"

    manager.stop("default", None, quiet)
    assert process.identity(status.pid) is None
    assert manager.status("default").state is State.STOPPED
    socket.create_server(("127.0.0.1", resolved.config.port)).close()
    assert any("SIGTERM received" in line for line in manager.log_tail("default", 50))


def test_the_key_is_on_no_command_line_and_in_no_shown_log(bench: SglangBench) -> None:
    manager = bench.manager()
    manager.start(bench.resolved(api_key="the-key"), quiet)
    for pid in bench.pids():
        assert "the-key" not in " ".join(psutil.Process(pid).cmdline())
    assert "the-key" not in "\n".join(manager.log_tail("default", 1000))
    assert "'api_key': '********'" in "\n".join(manager.log_tail("default", 1000))
    file = bench.home / "instances" / "default" / "sglang.yaml"
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_callers_environment_reaches_it(bench: SglangBench) -> None:
    bench.env.update({"MY_SETTING": 'a,b "c" {"d": 1}', "ZIPHIUS_API_KEY": "secret", "HF_TOKEN": "hf_secret"})
    resolved = bench.resolved("--stand-in-x", "two words", threads=1)
    bench.manager().start(resolved, quiet)
    found = seen(resolved.config.port)
    assert found["env"]["MY_SETTING"] == 'a,b "c" {"d": 1}'
    assert found["env"]["HF_TOKEN"] == "hf_secret"
    assert found["env"]["OMP_NUM_THREADS"] == "1"
    assert found["env"]["PYTHONPATH"] == bench.env["PYTHONPATH"]
    assert "ZIPHIUS_API_KEY" not in found["env"]
    assert found["argv"][-2:] == ["--stand-in-x", "two words"]
    assert found["model"] == ["config.json"]
    assert not any("hf_secret" in word for word in found["argv"])


def test_progress_is_read_from_the_log(bench: SglangBench) -> None:
    heard: list[LoadProgress] = []
    bench.manager().start(bench.resolved("--stand-in-load-seconds", "2"), heard.append)
    loading = [p for p in heard if p.phase == "loading" and p.total]
    assert loading
    assert {p.total for p in loading} == {4}
    assert [p.done for p in loading] == sorted(p.done for p in loading)


def test_a_failed_start_tells_cause_and_remedy(bench: SglangBench) -> None:
    manager = bench.manager()
    with pytest.raises(StartFailed, match=r"no KV cache is left\. Raise --mem-fraction"):
        manager.start(bench.resolved("--stand-in-fail", "memory", "--stand-in-workers", "2"), quiet)
    assert bench.pids() == []
    status = manager.status("default")
    assert status.state is State.FAILED
    assert "Raise --mem-fraction" in (status.reason or "")


def test_an_unknown_failure_is_told_by_its_exception(bench: SglangBench) -> None:
    with pytest.raises(StartFailed, match="something that nobody has seen before"):
        bench.manager().start(bench.resolved("--stand-in-fail", "unknown"), quiet)


def test_a_stop_ends_workers_that_left_the_session_and_ignore_signals(bench: SglangBench) -> None:
    manager = bench.manager()
    manager.start(bench.resolved("--stand-in-workers", "2", "--stand-in-ignore-term"), quiet)
    pids = bench.pids()
    assert len(pids) == 3
    manager.stop("default", None, quiet)
    assert [pid for pid in pids if process.identity(pid) is not None] == []


def test_a_killed_server_has_failed_and_leaves_no_worker_to_the_next_start(bench: SglangBench) -> None:
    manager = bench.manager()
    resolved = bench.resolved("--stand-in-workers", "1")
    pid = manager.start(resolved, quiet).status.pid
    assert pid is not None
    before = bench.pids()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while manager.status("default").state is not State.FAILED:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    manager.start(resolved, quiet)
    assert set(before) & set(bench.pids()) == set()


def test_a_server_that_computes_a_long_prompt_is_unhealthy_and_not_starting(bench: SglangBench) -> None:
    manager = bench.manager()
    resolved = bench.resolved("--stand-in-hang-in-health")
    manager.start(resolved, quiet)
    connection = http.client.HTTPConnection("127.0.0.1", resolved.config.port, timeout=60)
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    connection.request("POST", "/v1/chat/completions", body)
    connection.getresponse().read()
    connection.close()
    status = manager.status("default")
    assert status.state is State.UNHEALTHY
    assert "long prompt" in (status.reason or "")


def test_a_python_that_is_not_there(bench: SglangBench) -> None:
    with pytest.raises(ConfigError, match="there is no such program"):
        bench.manager().start(bench.resolved(python="/no/such/python"), quiet)


def test_a_python_without_sglang(bench: SglangBench) -> None:
    del bench.env["PYTHONPATH"]
    with pytest.raises(StartFailed, match=r"That Python has no SGLang\. Name one that has with --python"):
        bench.manager().start(bench.resolved(), quiet)


def test_a_restart_keeps_what_was_given(bench: SglangBench) -> None:
    manager = bench.manager()
    first = manager.start(bench.resolved("--stand-in-x"), quiet).status
    second = manager.restart("default", {"served_model_name": "other"}, quiet, quiet).status
    assert second.pid != first.pid
    assert second.model == "other"
    assert seen(bench.record().resolved.config.port)["argv"][-1] == "--stand-in-x"
