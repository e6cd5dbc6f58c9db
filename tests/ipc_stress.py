"""Two processes and a ring, for a long time; and two processes of which one is killed, many times.

    python tests/ipc_stress.py records --count 10000000
    python tests/ipc_stress.py kills --count 500

A program of its own, because it forks: it imports nothing that has threads. Prints one line of JSON
with what it saw; whatever is wrong ends it with an exception. `--seed` repeats a round of kills, as
far as chance had no part in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from scalellm_plugins import ipc
from scalellm_plugins.ipc import memory, peers, ring
from scalellm_plugins.ipc.channel import Channel, Message, frames_of

_RECORD = struct.Struct("<QI")
"""Of every record: its number and the checksum of what follows."""

STUCK_S = 60.0
"""Nobody sleeps for so long who has anything to do."""


def fork(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(eventfd: int, pidfd: int) -> None:
    """Sleep until this side is woken, or its peer ends."""
    ready = select.select([eventfd, pidfd], [], [], STUCK_S)[0]
    if eventfd not in ready:
        raise AssertionError("its peer has ended" if ready else "asleep: a wake-up is lost")
    os.eventfd_read(eventfd)


# Many records


def bodies(capacity: int) -> list[bytes]:
    """Mostly short ones, some as long as the ring."""
    dice = random.Random(1)
    sizes = [dice.randrange(100) for _ in range(1000)]
    sizes += [dice.randrange(capacity - 24) for _ in range(20)] + [capacity - 24 + 4]
    dice.shuffle(sizes)
    return [dice.randbytes(size) for size in sizes]


def write_records(producer: ring.Producer, count: int, eventfd: int, pidfd: int) -> None:
    content = bodies(producer.capacity)
    for number in range(count):
        body = content[number % len(content)]
        while (view := producer.reserve(_RECORD.size + len(body))) is None:
            wait(eventfd, pidfd)
        _RECORD.pack_into(view, 0, number, zlib.crc32(body, number & 0xFFFF))
        view[_RECORD.size :] = body
        producer.publish(number % 11)


def read_records(consumer: ring.Consumer, count: int, eventfd: int, pidfd: int) -> int:
    """Return how often it slept."""
    slept = number = 0
    while number < count:
        record = consumer.read()
        if record is None:
            consumer.release()
            if consumer.park():
                slept += 1
                wait(eventfd, pidfd)
            consumer.unpark()
            continue
        said, checksum = _RECORD.unpack_from(record.data)
        if said != number or record.kind != number % 11:
            raise AssertionError(f"record {number}: says {said}, kind {record.kind}")
        if zlib.crc32(record.data[_RECORD.size :], number & 0xFFFF) != checksum:
            raise AssertionError(f"record {number} is torn")
        number += 1
        if number % 13 == 0:
            consumer.release()
    return slept


def records(count: int, capacity: int) -> dict[str, Any]:
    fd = memory.create(ring.size_of(capacity))
    wakes = [os.eventfd(0) for _ in range(2)]
    parent = os.pidfd_open(os.getpid())

    def write() -> None:
        producer = ring.Producer(memory.attach(fd, ring.size_of(capacity)), ring.signal(wakes[1]))
        write_records(producer, count, wakes[0], parent)

    started = time.monotonic()
    pid = fork(write)
    consumer = ring.Consumer(memory.attach(fd, ring.size_of(capacity)), ring.signal(wakes[0]))
    slept = read_records(consumer, count, wakes[1], os.pidfd_open(pid))
    assert os.waitpid(pid, 0)[1] == 0
    seconds = time.monotonic() - started
    return {
        "records": count,
        "capacity": capacity,
        "times_around": consumer._next // capacity,
        "slept": slept,
        "seconds": round(seconds, 1),
        "us_per_record": round(seconds / count * 1e6, 2),
    }


def words(count: int) -> dict[str, Any]:
    """Whether a word is ever seen half-written: half of one value, half of another."""
    fd = memory.create(4096)
    values = (0x0123456789ABCDEF, 0xFEDCBA9876543210)

    def write() -> None:
        shared = memoryview(memory.attach(fd, 4096)).cast("Q")
        for _ in range(count):
            shared[9] = values[0]
            shared[9] = values[1]
        shared[9] = 1

    pid = fork(write)
    shared = memoryview(memory.attach(fd, 4096)).cast("Q")
    seen: Counter[int] = Counter()
    while (value := shared[9]) != 1:
        seen[value] += 1
    assert os.waitpid(pid, 0)[1] == 0
    assert set(seen) <= {0, *values}, seen
    return {"stores": 2 * count, "seen": [seen[value] for value in values]}


# Many deaths

TRYING, SENT, READ, DIED_AT = range(4)
"""What a victim tells, in memory that outlives it."""


class Side:
    """One end of a connection: sends numbered messages, and checks those that it reads."""

    def __init__(self, channel: Channel, eventfd: int, dice: random.Random, told: memoryview):
        self.channel = channel
        self.eventfd = eventfd
        self.dice = dice
        self.told = told
        self.read = 0
        self.seen: Counter[str] = Counter()
        self._next = self._message(0)
        if dice.random() < 0.3:  # few descriptors fit into its queue
            channel.peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def _message(self, number: int) -> list[bytes]:
        large = self.channel.large
        size = self.dice.choice(
            [self.dice.randrange(100)] * 6
            + [self.dice.randrange(large - 80, large + 80), self.dice.randrange(6 * large)]
        )
        body = self.dice.randbytes(size)
        cut = self.dice.randrange(size + 1)
        return [_RECORD.pack(number, zlib.crc32(body)), body[:cut], body[cut:]]

    def send(self) -> bool:
        """Send the next message, if there is room for it."""
        number = self.told[SENT]
        self.told[TRYING] = number + 1
        if not self.channel.send(number % 7, self._next):
            self.seen["full"] += 1
            return False
        self.told[SENT] = number + 1
        self._next = self._message(number + 1)
        return True

    def receive(self) -> bool:
        """Read and check one message, if there is any."""
        message = self.channel.receive()
        if message is None:
            return False
        self.check(message)
        self.read += 1
        self.told[READ] = self.read
        self.seen["borrowed" if message.borrowed else "segments"] += 1
        if self.dice.random() < 0.5:
            self.channel.release()
        return True

    def check(self, message: Message) -> None:
        head, *parts = frames_of(message)
        number, checksum = _RECORD.unpack(head)
        if number != self.read or message.kind != number % 7:
            raise AssertionError(f"message {self.read}: is number {number}, kind {message.kind}")
        if zlib.crc32(b"".join(parts)) != checksum:
            raise AssertionError(f"message {number} is torn")

    def turn(self) -> bool:
        """Do something of what can be done; False when all there is to do is to sleep."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        consumer = self.channel.consumer
        consumer.unpark()
        sent = [self.send() for _ in range(self.dice.randrange(4))]
        read = [self.receive() for _ in range(self.dice.randrange(6))]
        if any(sent) or any(read):
            return True
        if self.send() or self.receive():
            return True
        self.channel.release()
        if not consumer.park():
            return True
        self.seen["slept"] += 1
        return False


def die_at_bytecode(left: int, told: memoryview) -> None:
    """Have this process killed before so many more bytecodes of the library's `ipc`."""
    folder = str(Path(ipc.__file__).parent)

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if not left:
                told[DIED_AT] = time.monotonic_ns()
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        ours = frame.f_code.co_filename.startswith(folder)
        return count(frame, event, argument) if ours else None

    sys.settrace(enter)


def engine(address: str, eventfd: int, ends: list[int]) -> peers.Peer | None:
    """Accept a frontend; None when it ended before it came."""
    listener = peers.listen(address, 0)
    try:
        if listener not in select.select([listener, *ends], [], [], STUCK_S)[0]:
            return None
        peer = peers.accept(listener, 0, 0)
    finally:
        listener.close()
    try:
        peers.welcome(peer, 0, eventfd)
    except OSError:
        peer.close()
        raise
    return peer


def frontend(
    address: str, eventfd: int, ends: list[int], sizes: tuple[int, int]
) -> peers.Peer | None:
    """Connect to an engine, as soon as it listens; None when it ended before."""
    while True:
        peer = peers.connect(address, 0, 0, eventfd, sizes)
        if peer is not None or select.select(ends, [], [], 0.0005)[0]:
            return peer


class Round:
    """One victim: how it lived and died."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.address = f"chaos-{os.getpid()}-{seed}"
        self.victim_is_engine = self.dice.random() < 0.5
        self.sizes = (self.dice.choice([4096, 8192]), self.dice.choice([4096, 8192]))
        self.by_bytecode = self.dice.random() < 0.5
        self.limit = int(10 ** self.dice.uniform(0, 4.7))
        self.delay_s = self.dice.uniform(0, 0.05)
        self.shared = mmap.mmap(-1, 4096)
        self.told = memoryview(self.shared).cast("Q")
        self.mine = memoryview(bytearray(32)).cast("Q")
        self.killed_at = 0
        self.outcome = ""
        self.notice_s = 0.0
        self.seen: Counter[str] = Counter()

    def _connect(self, as_engine: bool, eventfd: int, ends: list[int]) -> peers.Peer | None:
        if as_engine:
            return engine(self.address, eventfd, ends)
        return frontend(self.address, eventfd, ends, self.sizes)

    def victim(self) -> NoReturn:
        parent = os.pidfd_open(os.getppid())
        if self.by_bytecode:
            die_at_bytecode(self.limit, self.told)
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        peer = self._connect(self.victim_is_engine, eventfd, [])
        assert peer is not None
        side = Side(Channel(peer), eventfd, random.Random(self.limit), self.told)
        while not select.select([parent], [], [], 0)[0]:
            if not side.turn():
                select.select([eventfd, parent], [], [])
        os._exit(1)

    def run(self) -> None:
        pid = fork(self.victim)
        pidfd = os.pidfd_open(pid)
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._meet(pid, pidfd, eventfd)
            assert select.select([pidfd], [], [], STUCK_S)[0], "the victim lives"
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        os.close(pidfd)
        os.close(eventfd)

    def _meet(self, pid: int, pidfd: int, eventfd: int) -> None:
        started = time.monotonic()
        if not self.by_bytecode and self.dice.random() < 0.2:  # also before and in the handshake
            time.sleep(self.dice.uniform(0, 0.003))
            self._kill(pid)
        try:
            peer = self._connect(not self.victim_is_engine, eventfd, [pidfd])
        except TimeoutError:
            raise AssertionError("a peer that died in the handshake was not noticed") from None
        except (peers.PeerError, OSError):
            self.outcome = "in the handshake"
            return
        if peer is None:
            self.outcome = "before the handshake"
        else:
            self._live(Channel(peer), eventfd, pid, started + self.delay_s)

    def _kill(self, pid: int) -> None:
        self.killed_at = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)

    def _live(self, channel: Channel, eventfd: int, pid: int, deadline: float) -> None:
        """Send and receive until the victim is gone; then read what it has left."""
        side = Side(channel, eventfd, self.dice, self.mine)
        watched = [eventfd, channel.peer.pidfd]
        moved = time.monotonic()
        while True:
            busy = side.turn()
            now = time.monotonic()
            if not self.by_bytecode and not self.killed_at and now >= deadline:
                self._kill(pid)
            rest = 0.0 if busy else 1.0 if self.by_bytecode else max(0.0, deadline - now)
            ready = select.select(watched, [], [], rest)[0]
            if channel.peer.pidfd in ready:
                break
            moved = now if busy or ready else moved
            assert now - moved < STUCK_S, "asleep: a wake-up is lost"
        self.notice_s = (time.monotonic_ns() - (self.killed_at or self.told[DIED_AT])) / 1e9
        while side.receive():
            pass
        assert self.told[SENT] <= side.read <= self.told[TRYING], (side.read, *self.told[:3])
        assert channel.consumer._next == channel.consumer._words[ring._TAIL], "not all was read"
        assert self.told[READ] <= self.mine[SENT]
        self.outcome = "later"
        self.seen = side.seen
        self.seen["wraps"] = channel.consumer._next // channel.consumer.capacity
        channel.close()


def left_open() -> list[str]:
    """Descriptors, mappings and files that are ours."""
    descriptors = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line]
    return sorted(descriptors) + mapped + [name for name in os.listdir("/dev/shm") if "sca" in name]


def kills(count: int, seed: int) -> dict[str, Any]:
    before = left_open()
    started = time.monotonic()
    outcomes: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    notices = []
    for number in range(count):
        one = Round(seed + number)
        try:
            one.run()
        except BaseException:
            print(f"round {seed + number}: {vars(one)}", file=sys.stderr)
            raise
        outcomes[one.outcome] += 1
        seen += one.seen
        if one.notice_s:
            notices.append(one.notice_s)
        del one
    assert left_open() == before, (left_open(), before)
    notices.sort()
    return {
        "kills": count,
        "seed": seed,
        "died": dict(outcomes),
        "survivors": dict(seen),
        "notice_ms": {
            "p50": round(notices[len(notices) // 2] * 1e3, 2),
            "p90": round(notices[len(notices) * 9 // 10] * 1e3, 2),
            "max": round(notices[-1] * 1e3, 2),
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["records", "words", "kills"])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.what == "records":
        report = records(options.count, options.capacity)
    elif options.what == "words":
        report = words(options.count)
    else:
        report = kills(options.count, options.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
