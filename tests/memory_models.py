"""All orders in which loads and stores of two processes can take effect, tried one by one.

A process here is the real code with its memory replaced: each load, store and fence asks the model.
It is a function of what its loads returned, so it is brought to any point by running it again
with the same answers, and two orders that have led to the same state are continued once.

`StoreBuffers` is x86-64 (TSO; Owens, Sarkar, Sewell, "A better x86 memory model", 2009): each
processor's stores wait in a queue, which its own loads see first and a fence empties. `Views` is
weaker than AArch64 in all but one point: every word keeps its history, and a load may return any
store that is not older than what its process has seen of this word, unless a fence on either side
orders them (the view machine of Kang et al., "A promising semantics", 2017, without promises: so no
store is seen before a load that stands before it).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from operator import sub
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from scalellm_plugins.ipc import ring

LOAD, STORE, FENCE, SIGNAL, WAIT = "load", "store", "fence", "signal", "wait"
Operation = tuple[Any, ...]
Outcome = tuple[Any, Any]
"""What the operation returns, and the state after it."""


class Frontier(BaseException):
    """A process has come to an operation without an answer."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation)
        self.operation = operation


class Port:
    """A process's way to the memory: answers, as far as they are known."""

    def __init__(self, answers: tuple[Any, ...]) -> None:
        self._answers = iter(answers)

    def __call__(self, *operation: Any) -> Any:
        for answer in self._answers:
            return answer
        raise Frontier(operation)

    def fence(self) -> None:
        self(FENCE)


class Words:
    """In place of a ring's words."""

    def __init__(self, port: Port) -> None:
        self._port = port

    def __getitem__(self, index: int) -> Any:
        return self._port(LOAD, index)

    def __setitem__(self, index: int, value: int) -> None:
        self._port(STORE, index, value)


class Payload:
    """In place of a view of the ring: whole words, which are written and read one by one."""

    def __init__(self, port: Port, place: slice) -> None:
        self._words = Words(port)
        self._indices = range(place.start >> 3, place.stop + 7 >> 3)

    def write(self, value: int) -> None:
        for index in self._indices:
            self._words[index] = value

    def read(self) -> list[int]:
        found: list[int] = []
        for index in self._indices:
            value = self._words[index]
            found.append(value)
        return found


class Bytes:
    """In place of a ring's bytes."""

    def __init__(self, port: Port) -> None:
        self._port = port

    def __getitem__(self, place: slice) -> Payload:
        return Payload(self._port, place)


Side = TypeVar("Side", ring.Producer, ring.Consumer)


def attach(side: type[Side], port: Port, capacity: int, wake: Callable[[], Any]) -> Side:
    """Make a side of a ring of `capacity` bytes, however small, over the model."""
    made: Any = side(mmap.mmap(-1, ring.size_of(4096)), wake)
    made.capacity, made._mask, made.longest = capacity, capacity - 1, capacity - 8
    made._words, made._bytes, made._fence = Words(port), Bytes(port), port.fence
    return made  # type: ignore[no-any-return]


class StoreBuffers(NamedTuple):
    """x86-64: memory, one queue of stores per process, and what was signalled to each."""

    memory: Mapping[int, int] = {}
    queues: tuple[tuple[tuple[int, int], ...], ...] = ((), ())
    signals: tuple[bool, ...] = (False, False)

    def key(self) -> Any:
        return frozenset(self.memory.items()), self.queues, self.signals

    def perform(self, process: int, operation: Operation) -> Iterator[Outcome]:
        what, *rest = operation
        queue = self.queues[process]
        if what == LOAD:
            for index, value in reversed(queue):
                if index == rest[0]:
                    yield value, self
                    return
            yield self.memory.get(rest[0], 0), self
        elif what == STORE:
            yield None, self._queued(process, (*queue, (rest[0], rest[1])))
        elif not queue:  # the others wait until it is empty
            if what == FENCE:
                yield None, self
            elif what == SIGNAL:
                yield None, self._signalled(rest[0], True)
            elif self.signals[process]:
                yield None, self._signalled(process, False)

    def unasked(self) -> Iterator[Any]:
        """What happens by itself: a queue's first store reaches memory."""
        for process, queue in enumerate(self.queues):
            if queue:
                (index, value), *others = queue
                memory = {**self.memory, index: value}
                yield self._replace(memory=memory)._queued(process, tuple(others))

    def _queued(self, process: int, queue: tuple[tuple[int, int], ...]) -> StoreBuffers:
        queues = list(self.queues)
        queues[process] = queue
        return self._replace(queues=tuple(queues))

    def _signalled(self, process: int, value: bool) -> StoreBuffers:
        signals = list(self.signals)
        signals[process] = value
        return self._replace(signals=tuple(signals))


WORDS = 16
View = tuple[int, ...]
"""Of each word, the number of the oldest of its stores that may still be seen."""

_NOTHING: View = (0,) * WORDS


def _number(index: int) -> int:
    """Number a ring's words: those in use of the control page, then the records'."""
    return index >> 3 if index < ring.CONTROL >> 3 else 5 + index - (ring.CONTROL >> 3)


def _join(*views: View) -> View:
    return tuple(map(max, *views))


def _set(view: View, word: int, number: int) -> View:
    return (*view[:word], number, *view[word + 1 :])


class _Seen(NamedTuple):
    """Of one process: nothing older than `now`; what a fence would add; what it passes on."""

    now: View = _NOTHING
    after_fence: View = _NOTHING
    passed_on: View = _NOTHING


class Views(NamedTuple):
    """Weaker than AArch64: histories of all words, and what each process has seen of them.

    What both have seen is forgotten, and stores are counted from there, so that states that differ
    in nothing else are the same.
    """

    history: tuple[tuple[tuple[int, View], ...], ...] = (((0, _NOTHING),),) * WORDS
    seen: tuple[_Seen, ...] = (_Seen(), _Seen())
    fenced: View = _NOTHING
    """What fences have ordered so far, for all."""
    signals: tuple[View | None, ...] = (None, None)

    def key(self) -> Any:
        return self

    def perform(self, process: int, operation: Operation) -> Iterator[Outcome]:
        for answer, after in self._perform(process, operation):
            yield answer, after._shortened()

    def _perform(self, process: int, operation: Operation) -> Iterator[tuple[Any, Views]]:
        what, *rest = operation
        now, after_fence, passed_on = self.seen[process]
        if what == LOAD:
            word = _number(rest[0])
            stores = self.history[word]
            for number in range(now[word], len(stores)):
                value, view = stores[number]
                seen = _Seen(_set(now, word, number), _join(after_fence, view), passed_on)
                yield value, self._with(process, seen)
        elif what == STORE:
            word = _number(rest[0])
            number = len(self.history[word])
            stores = (*self.history[word], (rest[1], _set(passed_on, word, number)))
            history = (*self.history[:word], stores, *self.history[word + 1 :])
            seen = _Seen(_set(now, word, number), after_fence, passed_on)
            yield None, self._replace(history=history)._with(process, seen)
        elif what == FENCE:
            yield None, self._fence(process, _NOTHING)
        elif what == SIGNAL:  # the kernel's lock orders what was before it
            done = self._fence(process, _NOTHING)
            view = _join(self.signals[rest[0]] or _NOTHING, done.seen[process].now)
            yield None, done._signalled(rest[0], view)
        elif (view := self.signals[process]) is not None:
            yield None, self._signalled(process, None)._fence(process, view)

    def unasked(self) -> Iterator[Any]:
        return iter(())

    def _fence(self, process: int, view: View) -> Views:
        seen = self.seen[process]
        all_ = _join(seen.now, seen.after_fence, self.fenced, view)
        return self._replace(fenced=all_)._with(process, _Seen(all_, _NOTHING, all_))

    def _with(self, process: int, seen: _Seen) -> Views:
        other = self.seen[1 - process]
        return self._replace(seen=(other, seen) if process else (seen, other))

    def _signalled(self, process: int, view: View | None) -> Views:
        other = self.signals[1 - process]
        return self._replace(signals=(other, view) if process else (view, other))

    def _shortened(self) -> Views:
        old = tuple(map(min, self.seen[0].now, self.seen[1].now))
        if not any(old):
            return self

        def newer(view: View) -> View:
            return view if view == _NOTHING else tuple(map(max, map(sub, view, old), _NOTHING))

        return Views(
            tuple(
                tuple([(value, newer(view)) for value, view in stores[past:]])
                for stores, past in zip(self.history, old, strict=True)
            ),
            tuple(_Seen(*map(newer, seen)) for seen in self.seen),
            newer(self.fenced),
            tuple(None if view is None else newer(view) for view in self.signals),
        )


class Deadlock(AssertionError):
    """Somebody sleeps, and nobody will wake them."""


def explore(start: Any, programs: tuple[Callable[[Port], None], ...]) -> int:
    """Run the programs in every order from `start`; return the number of states.

    Raises:
        Deadlock: there is an order after which a program waits for ever.
        Exception: what a program raises in some order.
    """
    points: dict[Any, _Point] = {}

    def follow(process: int, before: _Point | None, answer: Any) -> _Point:
        key = process, before and before.local, answer
        if key not in points:
            answers = () if before is None else (*before.answers, answer)
            points[key] = _run(programs[process], answers)
        return points[key]

    done: set[Any] = set()
    stack = [(start, tuple(follow(process, None, None) for process in range(len(programs))))]
    while stack:
        state, at = stack.pop()
        key = state.key(), tuple(point.local for point in at)
        if key in done:
            continue
        done.add(key)
        before = len(stack)
        for process, point in enumerate(at):
            if point.operation is not None:
                for answer, after in state.perform(process, point.operation):
                    reached = list(at)
                    reached[process] = follow(process, point, answer)
                    stack.append((after, tuple(reached)))
        stack.extend((after, at) for after in state.unasked())
        if len(stack) == before and any(point.operation is not None for point in at):
            raise Deadlock([point.local for point in at], state)
    return len(done)


class _Point(NamedTuple):
    """Where a program is: one way to get there, what it does next, and all that it knows."""

    answers: tuple[Any, ...]
    operation: Operation | None
    local: Any


def _run(program: Callable[[Port], None], answers: tuple[Any, ...]) -> _Point:
    try:
        program(Port(answers))
    except Frontier as frontier:
        return _Point(answers, frontier.operation, _known(frontier.__traceback__))
    return _Point(answers, None, None)


def _known(traceback: TracebackType | None) -> Any:
    """A program's place and variables: all values of loads must be in variables, not on the way."""
    known: list[Any] = []
    at = traceback and traceback.tb_next  # without our own frame
    while at is not None:
        known.append(at.tb_lasti)
        for value in at.tb_frame.f_locals.values():
            sided = isinstance(value, ring.Producer | ring.Consumer)
            known += [_plain(one) for one in vars(value).values()] if sided else [_plain(value)]
        at = at.tb_next
    return tuple(known)


def _plain(value: Any) -> Any:
    """What of a value can differ between two ways to the same place."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value if isinstance(value, int) else None
