"""What the host of a policy counts: blocks that become free, tokens, and how long steps take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from scalellm_plugins.scheduling.policy import Policy, Verdict, Work  # noqa: E402

from .host_parts import Clock, Run, expected, stop_clocks  # noqa: E402


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_clocks(monkeypatch)


class Books(Policy):
    """The least priority gives way; keeps books of what was made."""

    preempts = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.paid: dict[str, int] = {}
        self.gave_way: list[tuple[int, int]] = []

    def order(self, work: Work) -> int:
        return work.priority

    def account(self, works: Iterable[Work], now: float) -> None:
        self.paid.update((work.id, work.made) for work in works)

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        lower = [one for one in running if one.priority > work.priority]
        return lower[-1] if lower else None

    def preempted(self, work: Work, now: float) -> None:
        self.gave_way.append((self.paid.get(work.id, 0), work.made))


def test_what_was_made_is_accounted_before_its_maker_gives_way(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch, Books, sequences=1)
    run.add("low", most=30, priority=5)
    for _ in range(8):
        run.step()
    run.add("urgent", most=2, priority=0)
    run.step()
    ((paid, made),) = run.scheduler._host.policy.gave_way
    assert paid == made > 0
    run.finish()


def test_blocks_that_others_use_too_are_not_freed(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two with the same prompt: one alone has too few of its own for whose turn it is."""
    run = Run(monkeypatch, Books, sequences=8, blocks=13, block_size=4, longest=48)
    for name in ("low-a", "low-b"):
        request = run.request(name, 16, 20, prompt_of="low", priority=5)
        run.scheduler.add_request(request)
        for _ in range(2):
            run.step()
    manager = run.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    tables = [{one.block_id for one in manager.req_to_blocks[f"low-{name}"]} for name in "ab"]
    assert tables[0] & tables[1], "they share blocks"
    run.add("urgent", 32, 4, priority=0)
    output = run.step()
    assert "urgent" in output.num_scheduled_tokens
    assert run.running() == ["urgent"]
    run.finish()


def test_room_that_one_takes_is_not_the_next_ones(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free blocks are enough for one of two; for the other somebody has to go."""
    run = Run(monkeypatch, Books, sequences=8, blocks=13, block_size=4, longest=48)
    run.add("low", 18, 20, priority=5)
    for _ in range(3):
        run.step()
    for number in range(2):
        run.add(f"urgent-{number}", 20, 4, priority=0)
    output = run.step()
    assert {"urgent-0", "urgent-1"} <= output.num_scheduled_tokens.keys()
    run.finish()
    assert run.got["low"] == expected("low", 18, 20)


class Hurried(Policy):
    """Wants short steps, and so learns how long they take."""

    paces = True

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        return 0.001


def test_a_step_begins_when_the_one_before_has_ended(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduled ahead, it waits for the device: that is not its own time."""
    run = Run(monkeypatch, Hurried, options={"policy": "fair"})
    seen = []
    monkeypatch.setattr(
        type(run.scheduler._host.times), "observe", lambda _self, *step: seen.append(step[-1])
    )
    run.add("one", most=10)
    run.driver.schedule()
    run.driver.schedule()
    for _ in range(2):
        clock.now += 1.0
        run.hear(run.driver.update())
    assert seen == [1.0, 1.0]
    run.finish()


def test_decodes_are_not_taken_off_what_prompts_get(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(
        monkeypatch,
        Hurried,
        options={"policy": "fair"},
        asynchronous=False,
        block_size=4,
        budget=512,
    )
    monkeypatch.setattr(
        type(run.scheduler._host.times),
        "predict",
        lambda _self, prefill, decodes, _context: 1e-4 * (prefill + decodes),
    )
    for number in range(9):
        run.add(f"short-{number}", 4, 60)
    run.step()
    run.add("long", 200, 4)
    floor = run.scheduler._host._budget.floor
    for _ in range(3):
        tokens = run.step().num_scheduled_tokens
        assert tokens["long"] == floor
        assert len(tokens) == 10
    run.finish()


class Late(Books):
    """Ten seconds after the beginning few make it any more."""

    gives_up = True

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        late = now > 1010.0 and work.most != 6
        return Verdict("too late", drop=True) if late else None


def test_who_stands_far_behind_is_given_up_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its turn comes: its client need not wait for that."""
    run = Run(monkeypatch, Late, sequences=1)
    run.add("busy", most=60)
    run.step()
    for number in range(60):
        run.add(f"waits-{number:02}", most=6 if number < 40 else 5)
    run.step()
    assert not run.ends
    clock.now = 1011.0
    run.step()
    assert len(run.ends) == 20
    run.finish()
    assert run.got["busy"] == expected("busy", 8, 60)


def test_who_has_said_something_is_not_given_up(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave way, and its client reads already."""
    run = Run(monkeypatch, Late, sequences=1)
    run.add("low", most=20, priority=5)
    for _ in range(6):
        run.step()
    run.add("urgent", most=10, priority=0)
    run.step()
    assert run.running() == ["urgent"]
    clock.now = 1011.0
    run.finish()
    assert run.got["low"] == expected("low", 8, 20)


def test_a_turn_that_was_not_used_is_not_a_seat(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes a request out and puts it back, where its grammar is not ready yet."""
    run = Run(monkeypatch, options={"policy": "fcfs"}, tenants=True)
    run.add("one", scalellm_tenant="a", scalellm_max_running=1)
    queue = run.scheduler.waiting
    for _ in range(3):
        taken = queue.pop_request()
        assert not queue
        queue.prepend_requests([taken])
        assert queue, "its tenant may still run one"
    run.finish()
    assert run.got["one"] == expected("one", 8, 10)
