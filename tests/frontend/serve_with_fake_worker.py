"""`serve` with fake_worker.py for an engine: argv is the port, the model folder and the drain timeout."""

from __future__ import annotations

import sys
from pathlib import Path

from ziphius import log
from ziphius.config import resolve
from ziphius.errors import ZiphiusError
from ziphius.frontend import serve as launch
from ziphius.ranks import workers

log.configure("info")
workers.worker_command = lambda: [sys.executable, str(Path(__file__).with_name("fake_worker.py"))]
flags = {"port": int(sys.argv[1]), "model": sys.argv[2], "drain_timeout": float(sys.argv[3])}
try:
    sys.exit(launch.serve(resolve(flags, {})))
except ZiphiusError as e:
    print(type(e).__name__, e.message, file=sys.stderr)
    sys.exit(e.exit_code)
