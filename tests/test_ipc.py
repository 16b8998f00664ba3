"""Batches reach every rank, in order and while the sender goes on; beats reach the frontend."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from ziphius.errors import EngineFailed
from ziphius.ipc.messages import Beat, RankFailed, RankMessage, RowWork, ScheduledBatch, Shutdown
from ziphius.ipc.sockets import BatchReceiver, BatchSender, BeatReceiver, BeatSender


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="zi-") as name:  # not tmp_path: a Unix socket's path must be short
        yield Path(name)


def batch(step: int) -> ScheduledBatch:
    work = RowWork(row=0, position=step, token_ids=[step], new_pages=[], sample=True)
    return ScheduledBatch(step=step, new_rows=[], work=[work])


@pytest.mark.parametrize("address", ["ipc://{folder}/batches.sock", "tcp://127.0.0.1:*"])
def test_every_rank_gets_every_batch_in_order(folder: Path, address: str) -> None:
    sender = BatchSender(address.format(folder=folder))
    got: dict[int, list[ScheduledBatch | Shutdown]] = {1: [], 2: [], 3: []}

    def follow(rank: int) -> None:
        receiver = BatchReceiver(sender.endpoint)
        while not isinstance(message := receiver.receive(), Shutdown):
            got[rank].append(message)
        receiver.close()

    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in got]
    for thread in threads:
        thread.start()
    sender.wait_for(3)
    sent = [batch(step) for step in range(200)]
    for each in sent:
        sender.send(each)
    sender.send(Shutdown())
    for thread in threads:
        thread.join(60)
    sender.close()
    assert all(received == sent for received in got.values())


def test_a_lost_message_is_noticed(folder: Path) -> None:
    address = f"ipc://{folder}/batches.sock"
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind(address)
    receiver = BatchReceiver(address)
    publisher.recv()
    for number in (0, 2):
        publisher.send(msgspec.msgpack.encode(RankMessage(number, batch(number))))
    assert receiver.receive() == batch(0)
    with pytest.raises(EngineFailed, match="message 1 of rank 0 was lost"):
        receiver.receive()
    receiver.close()
    publisher.close(0)
    context.term()


def test_beats_and_last_words(folder: Path) -> None:
    async def talk() -> None:
        address = f"ipc://{folder}/beats.sock"
        receiver = BeatReceiver(address)
        senders = [BeatSender(address) for _ in range(2)]
        senders[0].send(Beat(rank=0, phase="serving", busy=True, collectives=5))
        assert await receiver.receive() == Beat(rank=0, phase="serving", busy=True, collectives=5)
        senders[1].send(RankFailed(rank=1, error="DoesNotFit", message="too big"))
        for sender in senders:
            sender.close()
        assert await receiver.receive() == RankFailed(rank=1, error="DoesNotFit", message="too big")
        receiver.close()

    asyncio.run(talk())


def test_a_frontend_that_takes_nothing_does_not_stop_a_rank(folder: Path) -> None:
    sender = BeatSender(f"ipc://{folder}/nobody.sock", linger_ms=0)
    for _ in range(3000):
        sender.send(Beat(rank=0, phase="serving"))
    sender.close()
