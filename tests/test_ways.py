"""What vLLM's own code is given of a request's terms, on stand-ins of its objects."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("uvicorn")

from vllm.exceptions import VLLMValidationError

from scalellm_plugins.frontends import attach, counting, ways
from scalellm_plugins.frontends.bound import Bound
from scalellm_plugins.frontends.engine_refusals import HEADERS_S, Held
from scalellm_plugins.frontends.tenants import Tenant
from scalellm_plugins.scheduling.terms import DEADLINE, TENANT, TPOT, TTFT, WEIGHT

pytestmark = pytest.mark.vllm

ACME = Bound(Tenant(name="acme", priority=7, ttft_ms=400.0, isolate_prefix=True))
DEFAULT = Bound(Tenant(name="default"))


class Engine:
    """As much of vLLM's engine client as is wrapped: what it was given, and nothing comes back."""

    def __init__(self) -> None:
        self.added: list[Any] = []
        self.output_processor = SimpleNamespace(add_request=self._add)

    def _add(self, request: Any, _text: Any = None) -> None:
        self.added.append(request)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str = "x") -> Any:
        # As vLLM: the parameters are cloned, and children of one request share theirs.
        made = copy.copy(sampling_params)
        for number in range(sampling_params.n):
            self.output_processor.add_request(
                SimpleNamespace(
                    request_id=f"{number}_{request_id}",
                    sampling_params=made,
                    priority=prompt.get("priority", 0),
                    cache_salt=prompt.get("salt"),
                )
            )
        for output in ():
            yield output


class Serving:
    """As much of the handler of responses: whether it was called."""

    def __init__(self) -> None:
        self.called = 0

    async def create_responses(self, _request: Any, _raw: Any = None) -> str:
        self.called += 1
        return "answer"


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    ways.install(made, SimpleNamespace(), lambda: None)
    return made


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Nobody's request, until a test says whose."""
    tokens = ways._current.set(None), counting.current.set(None)
    yield
    ways._current.reset(tokens[0])
    counting.current.reset(tokens[1])


def params(n: int = 1, **extra: Any) -> Any:
    return SimpleNamespace(n=n, extra_args=extra or None)


async def asked(engine: Engine, given: Any, **prompt: Any) -> Any:
    """What the engine gets of a request."""
    async for _ in engine.generate(prompt, given):
        pass
    first, *others = engine.added
    for other in others:
        assert other.sampling_params.extra_args == first.sampling_params.extra_args
        assert (other.priority, other.cache_salt) == (first.priority, first.cache_salt)
    assert len(engine.added) == given.n
    return first


def by_headers(*headers: tuple[bytes, bytes]) -> Held:
    """The headers of the request that is served from now on."""
    held = Held(None, anthropic=False)
    ways._current.set(ways.Exchange(list(headers), held))
    return held


def by_pass(bound: Bound | None) -> None:
    """The pass of the request that is served from now on."""
    counting.current.set(SimpleNamespace(bound=bound))  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 3])
async def test_headers_come_before_the_body(engine: Engine, n: int) -> None:
    by_headers((b"x-scalellm-tenant", b"head"), (b"x-scalellm-ttft-ms", b"5"))
    given = params(n, mine=1, **{TENANT: "body", DEADLINE: 9})
    got = await asked(engine, given, priority=3, salt="own")
    expected = {"mine": 1, TENANT: "head", DEADLINE: 9, TTFT: 5.0}
    assert got.sampling_params.extra_args == expected
    assert (got.priority, got.cache_salt) == (3, "own")
    assert given.extra_args == {"mine": 1, TENANT: "body", DEADLINE: 9}, "the client's own object"


async def test_who_says_nothing_gets_nothing(engine: Engine) -> None:
    by_headers((b"accept", b"*/*"))
    assert (await asked(engine, params())).sampling_params.extra_args is None


@pytest.mark.parametrize("n", [1, 2])
async def test_a_tenants_entry_has_the_last_word(engine: Engine, n: int) -> None:
    by_headers((b"x-scalellm-tenant", b"other"), (b"x-scalellm-tpot-ms", b"5"))
    by_pass(ACME)
    got = await asked(engine, params(n, **{WEIGHT: 9}))
    told = {TENANT: "acme", WEIGHT: 1.0, TTFT: 400.0, TPOT: 5.0}
    assert got.sampling_params.extra_args == told
    assert (got.priority, got.cache_salt) == (7, ACME.salted(None))


async def test_what_it_leaves_open_is_the_requests(engine: Engine) -> None:
    by_headers((b"x-scalellm-ttft-ms", b"5"))
    by_pass(ACME)
    got = await asked(engine, params(), priority=-1, salt="own")
    assert got.sampling_params.extra_args[TTFT] == 5.0
    assert (got.priority, got.cache_salt) == (-1, ACME.salted("own"))


async def test_a_pass_without_a_file_binds_nothing(engine: Engine) -> None:
    by_pass(None)
    got = await asked(engine, params(**{TENANT: "mine"}))
    assert got.sampling_params.extra_args == {TENANT: "mine"}


async def test_nobody_names_a_tenant_where_a_file_does() -> None:
    """Not on a route that no pass is for, either."""
    engine = Engine()
    ways.install(engine, SimpleNamespace(), lambda: DEFAULT)
    got = await asked(engine, params(other=1, **{TENANT: "acme"}))
    assert got.sampling_params.extra_args == {"other": 1, **DEFAULT.extra}


@pytest.mark.parametrize("wrong", ["body", "header"])
def test_mistakes_are_found_before_an_answer_begins(engine: Engine, wrong: str) -> None:
    """In the call itself: by the generator's first step a stream's status is out."""
    if wrong == "header":
        by_headers((b"x-scalellm-weight", b"0"))
    given = params(**({WEIGHT: -1} if wrong == "body" else {}))
    with pytest.raises(VLLMValidationError) as error:
        engine.generate({}, given)
    field = "vllm_xargs.scalellm_weight" if wrong == "body" else "X-Scalellm-Weight"
    assert error.value.parameter == field
    assert str(error.value).count(field) == 1, "vLLM would add it once more"
    assert engine.added == []


async def test_responses_are_looked_at_before_they_are_queued() -> None:
    serving = Serving()
    ways.install(Engine(), SimpleNamespace(openai_serving_responses=serving), lambda: None)
    for bad in ({WEIGHT: -1}, {"scalellm_x": 1}):
        with pytest.raises(VLLMValidationError):
            await serving.create_responses(SimpleNamespace(vllm_xargs=bad))
    assert serving.called == 0
    assert await serving.create_responses(SimpleNamespace(vllm_xargs={WEIGHT: 1})) == "answer"
    assert await serving.create_responses(SimpleNamespace()) == "answer"


@pytest.mark.parametrize("bound", [None, ACME])
def test_a_streams_headers_wait_by_what_it_says(engine: Engine, bound: Bound | None) -> None:
    held = by_headers((b"x-scalellm-deadline-ms", b"2000"))
    engine.generate({}, params())
    assert held.wait_s == 2.5
    held = by_headers()
    by_pass(bound)
    engine.generate({}, params())
    assert held.wait_s == (HEADERS_S if bound is None else 0.9)


async def test_tasks_of_a_request_are_of_that_request(engine: Engine) -> None:
    """Two at once, and the application makes tasks of its own for each."""
    got: dict[str, Any] = {}

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        async def work() -> None:
            generated = engine.generate({}, params(), scope["path"])
            await asyncio.sleep(0)
            async for _ in generated:
                pass

        await asyncio.create_task(work())

    async def one(name: str) -> None:
        headers = [(b"x-scalellm-tenant", name.encode())]
        await ways.carried(app)({"path": name, "headers": headers}, None, None)

    await asyncio.gather(one("a"), one("b"))
    for request in engine.added:
        got[request.request_id] = request.sampling_params.extra_args[TENANT]
    assert got == {"0_a": "a", "0_b": "b"}


@pytest.mark.parametrize(
    ("on", "wrapped"),
    [({"scheduler"}, True), ({"scheduler", "frontend"}, False), ({"status"}, False)],
)
async def test_vllms_own_frontend_checks_for_our_scheduler(
    monkeypatch: pytest.MonkeyPatch, on: set[str], wrapped: bool
) -> None:
    monkeypatch.setattr(attach.activation, "is_on", lambda name: name in on)
    engine = Engine()
    await attach.TermsEndpoint().init_state(engine, SimpleNamespace(), None)  # type: ignore[arg-type]
    assert ("generate" in vars(engine)) == wrapped
    await attach.TermsEndpoint().init_state(None, SimpleNamespace(), None)  # type: ignore[arg-type]
    strange = SimpleNamespace()
    await attach.TermsEndpoint().init_state(strange, SimpleNamespace(), None)  # type: ignore[arg-type]
