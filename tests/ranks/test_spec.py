"""What a worker is told, and with which environment it starts."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from ziphius.config import ServeConfig
from ziphius.ranks.spec import WorkerSpec, available_cores, cpu_threads, decode_spec, encode_spec, worker_environment


def test_a_spec_travels_as_one_line() -> None:
    spec = WorkerSpec(config=ServeConfig(context_length=77, api_key="a\nb"), model_path="/m", address="ipc:///x")
    line = encode_spec(spec)
    assert line.count(b"\n") == 1
    assert decode_spec(line) == spec
    for broken in (b"", b"{}\n", line[:-20]):
        with pytest.raises(msgspec.MsgspecError):
            decode_spec(broken)


def test_threads_are_the_cores_unless_told() -> None:
    assert cpu_threads(ServeConfig()) == available_cores() >= 1
    assert worker_environment(ServeConfig(threads=3))["OMP_NUM_THREADS"] == "3"


def test_the_frontend_can_import_it_without_torch() -> None:
    code = "import sys, ziphius.ranks.spec; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
