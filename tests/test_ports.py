"""The ports that tests get: free ones, and never those of another test process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests.ports import free_port


def test_ports_of_one_process_differ_and_can_be_bound() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_is_taken_is_passed_over() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        assert free_port() != port + 1


def test_processes_get_different_ports() -> None:
    """All of them at once: each asks for so many ports that it comes round to its first ones again."""
    code = "from tests.ports import free_port; print(*[free_port() for _ in range(300)], flush=True); input()"
    argv = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    pipe = subprocess.PIPE
    others = [subprocess.Popen(argv, cwd=root, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    given = [{free_port()}]
    for other in others:
        assert other.stdout is not None
        given.append(set(map(int, other.stdout.readline().split())))
    for other in others:
        other.communicate("\n")
    assert sum(map(len, given)) == len(set().union(*given))
    assert min(map(len, given[1:])) > 100
