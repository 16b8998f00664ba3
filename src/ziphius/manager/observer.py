"""What can be asked of the instances under one home folder without changing any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ziphius.errors import InstanceError
from ziphius.manager import logs
from ziphius.manager.instance import Instances, Record, State
from ziphius.manager.status import InstanceStatus, observe
from ziphius.manager.watch import WatchOf, watch_of


@dataclass(frozen=True, slots=True)
class Address:
    """Where an instance is reached, and with what key."""

    url: str
    api_key: str | None


class Observer:
    """The instances of one home folder. `watch_of`: how an engine that was started is asked, and its end explained."""

    def __init__(self, home: Path, watch_of: WatchOf = watch_of) -> None:
        self._instances = Instances(home)
        self._watch_of = watch_of

    def log_path(self, name: str) -> Path:
        return self._instances.log_path(name)

    def record(self, name: str) -> Record | None:
        return self._instances.read(name)

    def status(self, name: str) -> InstanceStatus:
        """The status that the record, the process that it names and the server's own answer give."""
        return observe(self._instances, name, self._watch_of)

    def statuses(self) -> list[InstanceStatus]:
        return [self.status(name) for name in self._instances.names()]

    def address(self, name: str) -> Address:
        """InstanceError, with what to do, unless the instance is RUNNING."""
        status = self.status(name)
        record = self._instances.read(name)
        if status.state is not State.RUNNING or record is None or status.url is None:
            remedy = "`ziphius status` tells more" if status.state.alive else "`ziphius start` starts it"
            raise InstanceError(f"instance {name} is {status.state}, not running; {remedy}")
        return Address(status.url, record.resolved.config.api_key)

    def log_tail(self, name: str, lines: int) -> list[str]:
        return [self._without_secrets(name, line) for line in logs.tail(self.log_path(name), lines)]

    def log_follow(self, name: str, lines: int) -> Iterator[str]:
        return (self._without_secrets(name, text) for text in logs.follow(self.log_path(name), lines))

    def _without_secrets(self, name: str, text: str) -> str:
        """SGLang writes all its settings into its log, the API key among them."""
        record = self._instances.read(name) if text else None
        key = None if record is None else record.resolved.config.api_key
        return text if not key else text.replace(key, "********")
