"""GPUs' memory and the port, after a stop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from ziphius.errors import InstanceError
from ziphius.manager.release import HeldMemory, held_memory, wait_for_memory, wait_for_port
from ziphius.planner.hardware import Gpu, GpuProcess, Host


def host(free_mib: int, *processes: tuple[int, int | None], index: int = 0) -> Host:
    gpu = Gpu(
        index=index,
        name="NVIDIA H200",
        memory_total_mib=143771,
        memory_free_mib=free_mib,
        compute_capability=(9, 0),
        processes=tuple(GpuProcess(pid=pid, name="x", used_mib=used) for pid, used in processes),
    )
    return Host(gpus=(gpu,))


def probe(*hosts: Host) -> Callable[[], Host]:
    """Tells one after the other, the last for ever."""
    left = list(hosts)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


HELD = (HeldMemory(0, frozenset({5}), 110_000, 30_000),)


def test_what_these_processes_hold() -> None:
    assert held_memory([5], probe(host(30_000, (5, 110_000), (6, 3_000)))) == HELD
    assert held_memory([7], probe(host(30_000, (5, 110_000)))) == ()
    assert held_memory([5], probe(Host())) == ()


def test_waits_until_the_driver_has_it_back() -> None:
    seen: list[int] = []
    hosts = [host(30_000, (5, 110_000)), host(30_000), host(90_000), host(140_000)]

    def next_one() -> Host:
        seen.append(1)
        return hosts[min(len(seen), len(hosts)) - 1]

    wait_for_memory(HELD, next_one)
    assert len(seen) == 4


def test_what_others_took_meanwhile_is_not_waited_for() -> None:
    wait_for_memory(HELD, probe(host(130_000, (6, 9_000))))


def test_memory_that_stays_taken_is_told_with_numbers() -> None:
    with pytest.raises(InstanceError, match=r"GPU 0: 10000 of 110000 MiB are back"):
        wait_for_memory(HELD, probe(host(40_000)), timeout_s=0)


def test_where_the_driver_tells_no_sizes_the_pid_must_go() -> None:
    held = held_memory([5], probe(host(30_000, (5, None))))
    assert held[0].used_mib == 0
    with pytest.raises(InstanceError):
        wait_for_memory(held, probe(host(30_000, (5, None))), timeout_s=0)
    wait_for_memory(held, probe(host(30_000)))


def test_nothing_held_asks_nobody() -> None:
    def never() -> Host:
        raise AssertionError

    wait_for_memory((), never)


def test_a_port_that_is_closed_a_moment_later() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    threading.Thread(target=lambda: (time.sleep(0.3), listening.close())).start()
    wait_for_port("0.0.0.0", port)
    socket.create_server(("127.0.0.1", port)).close()
