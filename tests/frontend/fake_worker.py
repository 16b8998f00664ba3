"""An engine process without a model: reads its spec, reports progress, serves a FakeCore. Run by test_launch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import server_fakes as fakes

from ziphius.ipc.messages import Fatal, LoadProgress, Shutdown
from ziphius.ipc.sockets import EngineChannel
from ziphius.ranks.spec import decode_spec


def watch_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    spec = decode_spec(line)
    threading.Thread(target=watch_parent, daemon=True).start()
    channel = EngineChannel(spec.address)
    behaviour = os.environ.get("FAKE_ENGINE", "")
    channel.send(LoadProgress(phase="loading", done=1, total=2, unit="bytes"))
    if behaviour == "slow":
        time.sleep(600)
    if behaviour == "fatal":
        channel.send(Fatal(error="DoesNotFit", message="not enough memory for this model"))
        channel.close()
        sys.exit(1)
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    core = fakes.FakeCore()
    channel.send(fakes.ready_message())
    while True:
        for message in channel.receive(0.02):
            if isinstance(message, Shutdown):
                channel.close()
                return
            for answer in core.take(message):
                channel.send(answer)
        for answer in core.step():
            channel.send(answer)


main()
