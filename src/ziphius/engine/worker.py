"""The entry of a rank's process: it reads its WorkerSpec, loads, and serves until it is told to stop.

It never outlives its parent: it ends at once when stdin is closed, or by the kernel's parent-death signal. Rank 0 talks
to the frontend and runs the engine; the others follow it. All ranks send beats to the frontend.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ziphius import log
from ziphius.errors import EngineFailed, RankLost, ZiphiusError
from ziphius.ipc.messages import Fatal, LoadProgress
from ziphius.ipc.sockets import EngineChannel
from ziphius.ranks.heartbeat import SERVING, STARTING, Heartbeat, beat_interval
from ziphius.ranks.spec import WorkerSpec, cpu_threads, decode_spec

if TYPE_CHECKING:
    from ziphius.engine.loading import LoadedRank
    from ziphius.engine.team import Team

_log = logging.getLogger("ziphius.engine.worker")  # __name__ is __main__ here, which says nothing in a log

_PR_SET_PDEATHSIG = 1
_PROGRESS_INTERVAL_S = 0.1


def main() -> int:
    """Exit codes: 0 after Shutdown, 1 after a Fatal, 2 when stdin held no WorkerSpec."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the frontend decides.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    line, rest = _read_line(sys.stdin.fileno())
    try:
        spec = decode_spec(line)
    except msgspec.MsgspecError as error:
        print(f"ziphius.engine.worker: no WorkerSpec on stdin: {error}", file=sys.stderr)
        return 2
    if not rest:
        threading.Thread(target=_watch_parent, args=(sys.stdin.fileno(),), name="parent-watch", daemon=True).start()
    log.configure(spec.config.log_level)
    code = _run(spec)
    if spec.config.tp > 1:
        # Skip the interpreter's own shutdown: threads of torch.distributed that wait for a lost rank would block it.
        logging.shutdown()
        os._exit(code)
    return code


def _run(spec: WorkerSpec) -> int:
    heart = Heartbeat(spec.beats, spec.rank, beat_interval(spec.config.rank_timeout)) if spec.beats else None
    channel = EngineChannel(spec.address) if spec.rank == 0 else None
    if heart is not None:
        heart.start()
    try:
        _serve(spec, channel, heart)
        return 0
    except RankLost as error:
        _log.warning("%s", error.message)  # this is a consequence, and the frontend reports the cause
        _tell(error, channel, heart)
    except ZiphiusError as error:
        _log.error("rank %d failed: %s: %s", spec.rank, type(error).__name__, error.message)
        _tell(error, channel, heart)
    except Exception as error:  # noqa: BLE001 - told to the frontend
        _log.exception("rank %d failed: %s: %s", spec.rank, type(error).__name__, error)
        _tell(EngineFailed(f"{type(error).__name__}: {error}"), channel, heart)
    finally:
        if channel is not None:
            channel.close()
        if heart is not None:
            heart.stop()
    return 1


def _tell(error: ZiphiusError, channel: EngineChannel | None, heart: Heartbeat | None) -> None:
    """Send this rank's last message to the frontend."""
    if channel is not None:
        channel.send(Fatal(error=type(error).__name__, message=error.message))
    if heart is not None:
        heart.fail(error)


def _serve(spec: WorkerSpec, channel: EngineChannel | None, heart: Heartbeat | None) -> None:
    report = _Reporter(channel, heart)
    report(LoadProgress(phase=STARTING, detail="importing torch"))
    # Imported late, because torch takes seconds: beats are sent, and the parent's death is noticed, before that.
    import torch

    from ziphius.engine.precision import resolve_precision
    from ziphius.engine.team import join_team, select_device

    torch.set_num_threads(cpu_threads(spec.config))
    select_device(spec)
    if spec.config.tp > 1:
        report(LoadProgress(phase="joining", detail="the other ranks"))
    with join_team(spec, resolve_precision(spec.config).device) as team:
        if heart is not None:
            heart.collectives = lambda: team.parallel.count.entered
        loaded = _load(spec, report, team)
        if channel is None:
            follower = loaded.make_follower()
            _serving(heart, lambda: follower.busy)
            follower.run()
        else:
            engine = loaded.make_engine(channel)
            _serving(heart, lambda: not engine.idle)
            channel.send(loaded.ready)
            engine.run()
        loaded.leave()


def _load(spec: WorkerSpec, report: _Reporter, team: Team) -> LoadedRank:
    import torch

    from ziphius.checkpoint.checkpoint import open_checkpoint
    from ziphius.engine.loading import load_rank
    from ziphius.installation import ziphius_home
    from ziphius.kernels.cpu.cache import kernel_cache_folder

    home = ziphius_home(os.environ)
    kernels = kernel_cache_folder(home)
    if kernels is not None:
        os.environ.setdefault("NUMBA_CACHE_DIR", str(kernels))  # numba reads this variable when it is imported
    checkpoint = open_checkpoint(spec.model_path, home, load_format=spec.config.load_format)
    loaded = load_rank(spec.config, checkpoint, report, team)
    if loaded.own_threads:
        # After each parallel operation torch's threads spin for a while, on cores that the model's threads need.
        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # These objects stay for ever, so the garbage collector need not look at them in the middle of a step.
    return loaded


def _serving(heart: Heartbeat | None, busy: Callable[[], bool]) -> None:
    if heart is not None:
        heart.phase, heart.busy = SERVING, busy


class _Reporter:
    """Sends progress, but not more than a person can read. The last message of a phase is always sent.

    Rank 0's progress is shown. The other ranks send their phase with their beats.
    """

    def __init__(self, channel: EngineChannel | None, heart: Heartbeat | None) -> None:
        self._channel = channel
        self._heart = heart
        self._phase = ""
        self._due = 0.0

    def __call__(self, progress: LoadProgress) -> None:
        if self._heart is not None:
            self._heart.phase = progress.phase
        if self._channel is None:
            return
        now = time.monotonic()
        if progress.phase != self._phase or now >= self._due or progress.done == progress.total:
            self._channel.send(progress)
            self._phase, self._due = progress.phase, now + _PROGRESS_INTERVAL_S


def _die_with_parent() -> None:
    """On Linux, ask to be killed when the thread that started us ends. Elsewhere the end of stdin must suffice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_line(fd: int) -> tuple[bytes, bool]:
    """Returns (the first line, whether stdin has ended). It is unbuffered, so that the watcher sees what follows."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = os.read(fd, 1)
        if not chunk:
            return bytes(line), True
        line += chunk
    return bytes(line), False


def _watch_parent(fd: int) -> None:
    while os.read(fd, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
