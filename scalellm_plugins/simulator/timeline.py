"""The simulated GPU's clock: when each step ends, and a future that waits for it. Pure.

A prototype that slept inside a worker thread lost 1.5 ms per step: a thread hand-off per result, a
sleep that started only when the engine got round to submitting, and 50 µs of timer slack each time.
Here nothing runs beside the engine. `Timeline.submit` fixes the deadline of a step when it is
submitted, after the step before it (a late submission shows up as an idle device, as on a GPU, and
errors do not add up), and the thread that asks for the result sleeps until that deadline.
"""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")

_PR_SET_TIMERSLACK = 29


class Clock(Protocol):
    """Where the timeline gets the time from."""

    def now(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""

    def sleep_until(self, deadline: float) -> None:
        """Return when `now()` is at least `deadline`."""


class SystemClock:
    """The monotonic clock, with sleeps that end within a few µs of the deadline.

    The kernel wakes a sleeper late: 30-100 µs on a virtual machine even without timer slack. So a
    sleep ends `margin` before the deadline, and what is left is spun. `margin` follows the lower
    quartile of the lateness seen, hence three wake-ups in four are already due and spin nothing;
    the mean spin is a few µs per step, below 0.1 % of a 6 ms step. Both bounds are measured by
    `python -m scalellm_plugins.benchmarks.sim_clock`.
    """

    MAX_MARGIN_S = 150e-6
    """Bound on the spin, whatever the machine does."""

    _GAIN_S = 2e-6

    def __init__(self) -> None:
        self._margin = 50e-6
        self._thread = 0

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def sleep_until(self, deadline: float) -> None:
        """Sleep, then spin for at most `MAX_MARGIN_S`, until `deadline`."""
        now = time.monotonic()
        wake = deadline - self._margin
        if wake > now:
            if threading.get_ident() != self._thread:
                self._drop_timer_slack()
            # One call to clock_nanosleep with an absolute deadline (CPython 3.11 on Linux).
            time.sleep(wake - now)
            now = time.monotonic()
            # Stochastic lower quartile: moves down three times as fast as up.
            if now - wake < self._margin:
                self._margin = max(0.0, self._margin - 0.75 * self._GAIN_S)
            else:
                self._margin = min(self.MAX_MARGIN_S, self._margin + 0.25 * self._GAIN_S)
        while now < deadline:
            now = time.monotonic()

    def _drop_timer_slack(self) -> None:
        """Ask the kernel not to coalesce this thread's timers (50 µs by default); best effort."""
        self._thread = threading.get_ident()
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
        except (OSError, AttributeError):  # not Linux: sleeps are coarser, deadlines still hold
            return


class VirtualClock:
    """A clock that only sleeping moves: for tests, and for runs faster than real time."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def sleep_until(self, deadline: float) -> None:
        """Move to `deadline` at once."""
        self._now = max(self._now, deadline)


class Timeline:
    """The order of steps on one simulated device. Steps run one after the other, gaplessly if the
    next is submitted before the last has ended.
    """

    def __init__(self, clock: Clock | None = None, speed: float = 1.0) -> None:
        self.clock: Clock = clock or SystemClock()
        self._pace = 1.0 / speed
        self.free_at = 0.0
        """When the device has done everything submitted so far, s on `clock`."""
        self.busy_s = 0.0
        """Seconds that the device has been, or will be, busy."""
        self.steps = 0

    def submit(self, seconds: float) -> float:
        """Queue a step that takes `seconds` of a device at speed 1; return when it ends."""
        seconds *= self._pace
        self.free_at = max(self.free_at, self.clock.now()) + seconds
        self.busy_s += seconds
        self.steps += 1
        return self.free_at


class StepFuture(Future[T], Generic[T]):
    """The result of a step, available from `deadline` on. Nobody completes it: asking does.

    `add_done_callback` before the deadline starts a timer thread, since nothing else would call
    back; the engine does not use it.
    """

    def __init__(self, value: T, deadline: float, clock: Clock) -> None:
        super().__init__()
        self._value = value
        self._deadline = deadline
        self._clock = clock
        self._timer: threading.Timer | None = None

    def done(self) -> bool:
        """Whether the step has ended; does not block."""
        if not super().done() and self._clock.now() >= self._deadline:
            self._finish()
        return super().done()

    def running(self) -> bool:
        """A submitted step can no longer be cancelled."""
        return not self.done()

    def cancel(self) -> bool:
        """False: nothing takes a step back from a device."""
        return False

    def result(self, timeout: float | None = None) -> T:
        """Wait in this thread until the step has ended.

        Raises:
            TimeoutError: `timeout` seconds passed before that.
        """
        # Nothing is marked as finished here: `done()` asks the clock, and the base class's locking
        # would be 2 µs of cold code in front of every token.
        self._wait(timeout)
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """None, once the step has ended: simulated steps do not fail."""
        self._wait(timeout)
        return None

    def add_done_callback(self, fn: Any) -> None:
        """Call `fn(self)` when the step has ended, from a timer's thread if that is later."""
        if not self.done() and self._timer is None:
            delay = max(0.0, self._deadline - self._clock.now())
            self._timer = threading.Timer(delay, self._complete)
            self._timer.daemon = True
            self._timer.start()
        super().add_done_callback(fn)

    def _wait(self, timeout: float | None) -> None:
        if timeout is not None:
            until = self._clock.now() + timeout
            if until < self._deadline:
                self._clock.sleep_until(until)
                raise TimeoutError(f"the simulated step has not ended after {timeout} s")
        self._clock.sleep_until(self._deadline)

    def _complete(self) -> None:
        """The timer's thread: wait, then call back."""
        self._clock.sleep_until(self._deadline)
        self._finish()

    def _finish(self) -> None:
        if not super().done():
            with suppress(InvalidStateError):  # another thread asked at the same moment
                self.set_result(self._value)
