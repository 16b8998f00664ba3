"""RequestQueue: the requests that wait, in the order in which they will be admitted."""

from __future__ import annotations

from collections import OrderedDict

from ziphius.scheduler.request import Request


class RequestQueue:
    """First come, first served; a preempted request goes back to the front. Every operation is O(1)."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def head(self) -> Request | None:
        return next(iter(self._requests.values()), None)

    def append(self, request: Request) -> None:
        self._requests[request.rid] = request

    def push_front(self, request: Request) -> None:
        self._requests[request.rid] = request
        self._requests.move_to_end(request.rid, last=False)

    def remove(self, request: Request) -> None:
        del self._requests[request.rid]
