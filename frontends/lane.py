"""The fast lane of one API server process: two hot routes without tasks, queues or pydantic.

`take` turns a complete HTTP request into a request of the engine, or declines, and then vLLM's own
application serves the same bytes. `on_outputs` takes the lane's outputs out of a step before vLLM's
output processor sees them: one pass, no task switch, one write per stream.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from scalellm_plugins.engine.holding import COUNTS
from scalellm_plugins.scheduling.refused import Refused

from .accounting import Accounting
from .answers import Answer, StreamedAnswer
from .client_errors import unfit
from .detokenize import Detokenizer
from .engine_refusals import HEADERS_S, exception
from .engine_rings import Columns
from .headers import HeaderReader
from .latency import StepLatencies
from .link import Link
from .requests import RequestMaker
from .routes import Ask, ChatRoute, CompletionRoute, Route
from .segments import Plan
from .tally import Tally
from .timing import Stages
from .whole_answer import WholeAnswer

if TYPE_CHECKING:
    from .connection import FastLaneProtocol

logger = logging.getLogger("vllm.scalellm")

INLINE_CHARS = 8192
"""Prompts with fewer characters to tokenize do it in the event loop: ~1 ms at 0.1 µs each."""

SETTLE_S = 0.1
"""How long the end of an exchange waits to be counted; see bookkeeping.py for why."""


class Lane:
    """See the module. `routes` by path; `states` is vLLM's `OutputProcessor.request_states`."""

    def __init__(
        self,
        engine_client: Any,
        routes: Iterable[Route],
        detokenizer: Detokenizer,
        headers: HeaderReader,
        accounting: Accounting,
    ) -> None:
        self.engine_client = engine_client
        self.routes = {route.path: route for route in routes}
        tasks = engine_client._supported_tasks
        self.makers = {
            path: RequestMaker(engine_client, route, tasks) for path, route in self.routes.items()
        }
        self.detokenizer = detokenizer
        self.headers = headers
        self.accounting = accounting
        self.processor = engine_client.output_processor
        self.states: dict[str, Any] = self.processor.request_states
        self.loop = asyncio.get_running_loop()
        self.threads = concurrent.futures.ThreadPoolExecutor(1, "scalellm-tokenize")
        self.latencies = StepLatencies(engine_client)
        self.stages = Stages()
        self.tally = Tally(self)
        self.server_interval: int = engine_client.vllm_config.scheduler_config.stream_interval
        self.link: Link | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._fresh: list[Answer] = []
        self._flushing = False
        self._headless: list[StreamedAnswer] = []
        self._ended: list[tuple[Answer, int, float]] = []
        self._upstream: Callable[..., Any] = self.processor.process_outputs
        from vllm.exceptions import MaxQueuedTokensError
        from vllm.v1.engine import FinishReason
        from vllm.v1.engine.output_processor import OutputProcessorOutput
        from vllm.v1.metrics.stats import RequestStateStats

        self._nothing = OutputProcessorOutput
        self._stop = FinishReason.STOP
        self._error = FinishReason.ERROR
        self._full = MaxQueuedTokensError
        self._stats: Any = RequestStateStats if self.processor.log_stats else None

    # Requests

    def may_take(self, cycle: Any) -> bool:
        """Whether a request, of which only the headers are known, could be for the lane."""
        scope = cycle.scope
        return (
            scope["path"] in self.routes
            and scope["method"] == "POST"
            and not cycle.waiting_for_100_continue
        )

    def take(self, connection: FastLaneProtocol, cycle: Any) -> bool:
        """Serve a complete request; False to leave it to vLLM. Never raises."""
        route = self.routes[cycle.scope["path"]]
        try:
            taken = self._take(connection, cycle, route)
        except Exception:
            logger.exception("the fast lane failed on a request; vLLM's own code serves it")
            taken = False
        if taken is not None:
            self.accounting.routed(route.path, fast=taken)
        return taken is not False

    def _take(self, connection: FastLaneProtocol, cycle: Any, route: Route) -> bool | None:
        """Do what `take` says; None for a long prompt, of which it is not known yet."""
        arrived = time.monotonic()
        asked = self.headers.read(cycle.scope["headers"])
        if asked is None or self.engine_client.errored:
            return False
        raw = bytes(cycle.body)
        ask = route.read(raw, asked, os.urandom(8).hex())
        if ask is None or not self.headers.serves(ask.body.model):
            return False
        plan = route.plan(ask)
        if plan is None:
            return False
        answer = self._answer(connection, cycle, ask)
        answer.clock.arrived = arrived
        if isinstance(plan, Plan) and plan.missing_chars > INLINE_CHARS:
            connection.answer = answer
            self._spawn(self._admit_long(answer, plan))
            return None
        if isinstance(plan, Plan):
            ids = plan.encode()
            plan.commit()
        else:
            ids = plan
        return self._admit(answer, ids)

    def _answer(self, connection: FastLaneProtocol, cycle: Any, ask: Ask) -> Answer:
        if ask.kind is None:
            return WholeAnswer(self, connection, cycle, ask, ask.route.full)
        interval = max(ask.body.stream_interval or 1, self.server_interval)
        return StreamedAnswer(self, connection, cycle, ask, ask.route.streams[ask.kind], interval)

    async def _admit_long(self, answer: Answer, plan: Plan) -> None:
        """Tokenize a long prompt in a thread (the tokenizer lets go of the GIL), then go on."""
        try:
            ids = await self.loop.run_in_executor(self.threads, plan.encode)
            plan.commit()
            # Over: its client has left.
            taken = answer.over or self._admit(answer, ids)
        except Exception:
            logger.exception("the fast lane failed on a long prompt; vLLM's own code serves it")
            taken = answer.over
        self.accounting.routed(answer.ask.route.path, fast=taken)
        if not taken:
            answer.over = True
            answer.connection.pass_on(answer.cycle)

    def _admit(self, answer: Answer, ids: list[int]) -> bool:
        """Make vLLM's request of it and hand it to the engine; False when vLLM refuses it."""
        answer.clock.tokenized = time.monotonic()
        route = answer.ask.route
        if not 0 < len(ids) < route.max_model_len:
            return False
        admitted = answer.connection.admitted
        bound = None if admitted is None else admitted.bound
        request = self.makers[route.path].make(answer.ask, ids, answer.hold, bound)
        if request is None:
            return False
        if admitted is not None and not admitted.admit_prompt(answer.connection, len(ids)):
            answer.over = True
            return True
        stats = self._stats and self._stats(arrival_time=request.arrival_time)
        answer.prompt_len = len(ids)
        try:
            self.states[request.request_id] = answer
        except self._full:  # by another worker, since it was checked
            return False
        self.processor.external_req_ids[request.external_req_id].append(request.request_id)
        answer.connection.answer = answer
        try:
            answer.admitted(request, stats)
        except Exception:
            self._forget(answer)  # vLLM serves it: nothing of it may stay here
            raise
        self.accounting.entered(answer)
        self._send(answer, request)
        return True

    def _send(self, answer: Answer, request: Any) -> None:
        if self.link is None:
            self._spawn(self._send_by_vllm(answer, request))
            return
        try:
            self.link.add(request, answer)
        except Exception as error:
            self._forget(answer)
            answer.put(unfit(error))

    async def _send_by_vllm(self, answer: Answer, request: Any) -> None:
        try:
            await self.engine_client.engine_core.add_request_async(request)
        except Exception as error:
            self._forget(answer)
            answer.put(unfit(error))

    def _spawn(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    # Outputs

    def on_outputs(
        self,
        outputs: list[Any],
        timestamp: Any = None,
        stats: Any = None,
        **others: Any,
    ) -> Any:
        """Stand in for `OutputProcessor.process_outputs`: ours here, the rest to vLLM's."""
        states = self.states
        rest = []
        aborts: list[str] = []
        tally, latencies = self.tally, self.latencies
        fresh = self._fresh
        for output in outputs:
            answer = states.get(output.request_id)
            if not isinstance(answer, Answer):
                if answer is None and output.request_id == COUNTS:
                    tally.carried(output, stats)
                else:
                    rest.append(output)
                continue
            try:
                token_ids = output.new_token_ids
                reason = output.finish_reason
                if answer.fresh:
                    answer.catch_up()
                if answer.hold is not None:
                    tally.held(answer, output, timestamp, stats)
                elif stats is not None:
                    if answer.is_prefilling or output.events is not None:
                        tally.unusual(answer, output, timestamp, stats)
                    else:
                        # What IterationStats.update_from_output does in the steady state.
                        known = answer.stats
                        stats.num_generation_tokens += len(token_ids)
                        known.num_generation_tokens += len(token_ids)
                        latencies.add(timestamp, known.last_token_ts, stats)
                        known.last_token_ts = timestamp
                    answer.last = timestamp
                elif answer.is_prefilling:
                    tally.first(answer, output)
                matched = answer.advance(token_ids, stopped=reason is self._stop)
                if reason is not None or matched is not None:
                    self._finished(answer, output, matched, stats, aborts)
                if not answer.waiting:
                    answer.waiting = True
                    fresh.append(answer)
            except Exception as error:
                self._failed(answer, error, aborts)
        latencies.close(timestamp)
        if fresh and not self._flushing:
            # After the steps that are already here: a worker that is late makes larger events.
            self._flushing = True
            self.loop.call_soon(self.flush)
        if rest:
            result = self._upstream(rest, timestamp, stats, **others)
        else:
            result = self._nothing(request_outputs=[], reqs_to_abort=[])
        if aborts:
            result.reqs_to_abort.extend(aborts)
        return result

    def on_columns(self, step: Columns, stats: Any) -> tuple[list[tuple[str, int]], list[str]]:
        """Take a step's columns: one token each, of requests that are in their steady state.

        Returns (request, token) of what is not the lane's, and requests to abort.
        """
        others = []
        aborts: list[str] = []
        timestamp = step.timestamp
        # A worker that is late makes larger events: only the last step is written at once.
        direct = not step.more
        groups: list[tuple[float, int]] = []
        group, count, taken = -1.0, 0, 0
        for answer, token in zip(step.receivers, step.tokens, strict=True):
            if not isinstance(answer, Answer):
                if answer is not None:
                    others.append((answer, token))
                continue
            taken += 1
            # As `latencies.add`, and without a look at `answer.stats`, which is cold.
            if answer.last != group:
                groups.append((timestamp - group, count))
                group, count = answer.last, 0
            count += 1
            answer.last = timestamp
            answer.fresh += 1
            try:
                if not (direct and answer.show(token)):
                    self._push(answer, token, stats, aborts)
            except Exception as error:
                self._failed(answer, error, aborts)
        if stats is not None and taken:
            groups.append((timestamp - group, count))
            self.latencies.add_groups(groups[1:], stats)  # the first is that of nobody
            stats.num_generation_tokens += taken
        return others, aborts

    def _push(self, answer: Answer, token: int, stats: Any, aborts: list[str]) -> None:
        """Give an answer one token, to be written at the end of the turn."""
        matched = answer.push(token)
        if matched is not None:
            self._finished(answer, None, matched, stats, aborts)
        if not answer.waiting:
            answer.waiting = True
            self._fresh.append(answer)

    def _failed(self, answer: Answer, error: Exception, aborts: list[str]) -> None:
        """Give up a request on whose output the lane itself failed."""
        logger.exception("the fast lane failed on an output of %s", answer.request_id)
        aborts.append(answer.request_id)
        self._forget(answer)
        answer.put(error)

    def _finished(
        self, answer: Answer, output: Any, matched: str | None, stats: Any, aborts: list[str]
    ) -> None:
        if answer.fresh:
            answer.catch_up()
        reason = self._stop if matched is not None else output.finish_reason
        if matched is not None and (output is None or output.finish_reason is None):
            aborts.append(answer.request_id)  # the engine does not know about stop strings
        self.processor._finish_request(answer)
        self.processor._update_stats_from_finished(answer, reason, stats)
        if reason is self._error:
            from vllm.exceptions import GenerationError

            refused = Refused.of(output.stop_reason)
            answer.fail(exception(refused) if refused else GenerationError("Internal server error"))
            return
        answer.end(str(reason), matched if matched is not None else output.stop_reason)

    def flush(self) -> None:
        """Write what the steps since the last time have brought."""
        self._flushing = False
        fresh, self._fresh = self._fresh, []
        for answer in fresh:
            try:
                answer.flush()
            except Exception:
                logger.exception("the fast lane could not write to a client")
                answer.connection.transport.abort()

    # Endings

    def abort(self, answer: Answer) -> None:
        """Free what the engine holds for a request that nobody waits for."""
        if not self._forget(answer):
            return
        if self.link is not None:
            self.link.abort([answer.request_id])
        else:
            self._spawn(self.engine_client.engine_core.abort_requests_async([answer.request_id]))

    def _forget(self, answer: Answer) -> bool:
        if self.states.pop(answer.request_id, None) is None:
            return False
        ids = self.processor.external_req_ids.get(answer.external_req_id)
        if ids and answer.request_id in ids:
            ids.remove(answer.request_id)
            if not ids:
                del self.processor.external_req_ids[answer.external_req_id]
        return True

    def start(self, answer: Answer, status: int, content_type: bytes, body: bytes | None) -> bytes:
        """Begin an answer as uvicorn does; return status line and headers."""
        cycle = answer.cycle
        cycle.response_started = True
        self.accounting.started(cycle, status)
        return self.headers.answer(answer, status, content_type, body)

    def hold_back(self, answer: StreamedAnswer, wait_s: float) -> None:
        """Send this answer's headers in a while, should its first token take so long."""
        if wait_s > HEADERS_S:  # with a deadline; the others share a timer
            answer.head_timer = self.loop.call_later(wait_s, answer.send_headers)
            return
        if not self._headless:
            self.loop.call_later(HEADERS_S, self._send_headers)
        self._headless.append(answer)

    def _send_headers(self) -> None:
        waiting, self._headless = self._headless, []
        for answer in waiting:
            answer.send_headers()

    def stages_of(self, answer: Answer) -> dict[str, float] | None:
        """Return how long a finished request took in each stage; None where vLLM keeps no times."""
        known = answer.stats
        if known is None or not known.first_token_ts or not answer.clock.tokenized:
            return None
        return answer.clock.stages(known)

    def closed(self, answer: Answer, status: int) -> None:
        """Note the end of an exchange; it is counted in a while, together with others."""
        self.accounting.left(answer)
        answer.clock.done = answer.clock.done or time.monotonic()
        if not self._ended:
            self.loop.call_later(SETTLE_S, self.settle)
        self._ended.append((answer, status, time.time() - answer.ask.arrival_time))

    def catch_up(self) -> None:
        """Count everything that waits to be counted: somebody is about to look."""
        self.settle()
        if self.link is not None:
            self.link.book.flush()

    def settle(self) -> None:
        """Count the exchanges that have ended."""
        ended, self._ended = self._ended, []
        for answer, status, seconds in ended:
            stages = answer.stages
            if stages is None and status == 200:
                stages = self.stages_of(answer)
            if stages is not None:
                self.stages.count(stages)
            self.accounting.ended(answer, status, seconds)
            if self.accounting.own_log and answer.cycle.access_log:
                self.accounting.log(
                    answer.cycle.scope,
                    status,
                    seconds,
                    request_id=answer.ask.request_id,
                    stages=stages,
                    tokens=(answer.prompt_len, answer.num_tokens),
                )


def build_routes(state: Any, prompts: Any) -> list[Route]:
    """Return the routes for which this server has a handler."""
    routes: list[Route] = []
    chat = getattr(state, "openai_serving_chat", None)
    if chat is not None and chat.parser_cls is None and prompts.chat_off is None:
        routes.append(ChatRoute(chat, prompts))
    completion = getattr(state, "openai_serving_completion", None)
    if completion is not None:
        routes.append(CompletionRoute(completion, prompts))
    return routes
