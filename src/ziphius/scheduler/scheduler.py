"""Scheduler: which requests take part in the next step, and what each has after it.

The loop around it: `schedule`, run the batch, `update` (or `fail`). The next `schedule` may come before that
`update`, so that scheduling costs no time while the step runs: a request in flight is scheduled again without
its newest token, which the ranks have. Batches run, and are updated, in the order in which they were scheduled.

Order is arrival. Requests are admitted strictly first come, first served, the youngest is preempted first and
returns to the front of the queue; so every running request is older than every waiting one, and the oldest
always makes progress. Decoding never waits for prompts, nor prompts for decoding, because the budget of a step counts
prompt tokens only.
"""

from __future__ import annotations

from collections import deque

import msgspec

from ziphius.ipc.messages import AddRequest, EngineStats, Finish, RequestOutput, ScheduledBatch, TokenLogprob
from ziphius.scheduler.request import NO_ROW, Request, RequestState
from ziphius.scheduler.request_pages import RequestPages
from ziphius.scheduler.request_queue import RequestQueue
from ziphius.scheduler.step import Sampled, StepPlan, StepResult

__all__ = ["Sampled", "Scheduler", "StepResult"]


class Scheduler:
    """Continuous batching over a paged KV cache: chunked prefill, prefix reuse, preemption. For one thread.

    num_pages, page_size: the KV cache, in pages and in tokens a page.
    max_running_requests: rows of the ranks' table; rows are 0..max_running_requests-1.
    chunked_prefill_size: the most prompt tokens in a step, over all requests.
    context_length: the most tokens of a request, prompt and answer, and never more than the cache holds.
    reserved_tokens: another request is admitted only if the running ones can still decode so many tokens.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_running_requests: int,
        chunked_prefill_size: int,
        context_length: int,
        eos_token_ids: tuple[int, ...] | list[int],
        prefix_cache: bool = True,
        reserved_tokens: int = 16,
    ) -> None:
        self._pages = RequestPages(num_pages, page_size, prefix_cache)
        self._page_size = page_size
        self._chunked_prefill_size = chunked_prefill_size
        self._reserved_tokens = reserved_tokens
        # So any request fits when it is alone, and when pages run out there is always a request to preempt.
        self._context_length = min(context_length, num_pages * page_size)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._requests: dict[str, Request] = {}  # waiting or running
        self._queue = RequestQueue()
        self._running: dict[int, Request] = {}  # by row, oldest first
        self._draining: dict[int, Request] = {}  # by row: finished requests that are still part of a step in flight
        self._free_rows = list(range(max_running_requests - 1, -1, -1))
        self._in_flight: deque[StepPlan] = deque()
        self._outputs: list[RequestOutput] = []  # not yet returned
        self._totals = EngineStats(pages_total=num_pages, page_size=page_size)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, a step is in flight, or an output has not been taken."""
        return bool(self._requests or self._in_flight or self._outputs)

    def add(self, request: AddRequest) -> None:
        """Queue a request. A request that can never run ends with `error` in the next outputs."""
        prompt_length = len(request.prompt_ids)
        if request.rid in self._requests:
            self._refuse(request.rid, f"request id {request.rid} is in use")
        elif prompt_length == 0:
            self._refuse(request.rid, "the prompt has no tokens")
        elif prompt_length > self._context_length:
            self._refuse(request.rid, f"the prompt has {prompt_length} tokens; at most {self._context_length} fit")
        else:
            queued = Request.from_message(request, self._context_length, self._eos_token_ids)
            self._requests[queued.rid] = queued
            self._queue.append(queued)

    def abort(self, rid: str, message: str | None = None) -> None:
        """End a request with `abort` in the next outputs. Nothing happens when it has ended already."""
        request = self._requests.get(rid)
        if request is not None:
            self._outputs.append(self._finish(request, Finish(kind="abort", message=message)))

    def abort_all(self, message: str | None = None) -> None:
        for rid in list(self._requests):
            self.abort(rid, message)

    def take_outputs(self) -> list[RequestOutput]:
        """Return the outputs that no `update` has returned yet: of aborts, and of requests that `add` refused."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def schedule(self) -> ScheduledBatch | None:
        """The next step. None when there is no request, or none can go on before a step in flight is updated."""
        plan = StepPlan(self._totals.steps + 1)
        pages_suffice = self._plan_decodes(plan)
        budget = self._plan_started_prompts(plan, self._chunked_prefill_size)
        if pages_suffice:
            self._plan_admissions(plan, budget)
        if not plan.work:
            return None
        self._totals.steps = plan.step
        self._in_flight.append(plan)
        return plan.batch()

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[RequestOutput]:
        """Take in what the oldest step in flight computed. KeyError when a sampled token is missing."""
        outputs = self.take_outputs()
        for launch in self._landing(batch).launches:
            request = launch.request
            request.land(launch)
            if request.state is RequestState.FINISHED:
                self._release_if_landed(request)
                continue
            if result.prompt_logprobs and request.wants_prompt_logprobs:
                request.prompt_logprobs += result.prompt_logprobs.get(launch.row, ())
            if launch.samples:
                outputs.append(self._take_token(request, result.sampled[launch.row]))
            elif request.computed == request.prefill_end == request.max_length:
                outputs.append(self._finish(request, Finish(kind="length")))
            if request.state is RequestState.RUNNING and request.computed == request.prefill_end:
                self._pages.share(request)
        return outputs

    def fail(self, batch: ScheduledBatch, message: str) -> list[RequestOutput]:
        """The oldest step in flight raised. Its requests end with `error`, and their pages are never cached."""
        outputs = self.take_outputs()
        for launch in self._landing(batch).launches:
            request = launch.request
            request.keeps_prefix = False
            request.land(launch)
            if request.state is RequestState.FINISHED:
                self._release_if_landed(request)
            else:
                outputs.append(self._finish(request, Finish(kind="error", message=message)))
        return outputs

    def flush_cache(self) -> bool:
        """Empty the prefix cache; False, and nothing happens, while requests run."""
        if self._running or self._draining:
            return False
        self._pages.flush()
        return True

    def stats(self) -> EngineStats:
        """Totals and gauges. A cached page that a running request reads counts as neither free nor cached."""
        return msgspec.structs.replace(
            self._totals,
            running=len(self._running),
            queued=len(self._queue),
            pages_free=self._pages.num_free,
            pages_cached=self._pages.num_reclaimable,
        )

    def check_pages(self) -> None:
        """RuntimeError unless free + cached + held are all pages. O(rows)."""
        self._pages.check([*self._running.values(), *self._draining.values()])

    def page_owners(self) -> list[int]:
        """Every page once for each owner it has, for checks. O(pages)."""
        return self._pages.owners([*self._running.values(), *self._draining.values()])

    def _plan_decodes(self, plan: StepPlan) -> bool:
        """Plan one token for each request that decodes, oldest first. False when the pages do not suffice."""
        pages_suffice = True
        for request in list(self._running.values()):
            if request.state is not RequestState.RUNNING:
                break  # it was preempted for an older request, as all after it were
            if request.is_prefilling or request.last_token_is_in_flight:
                continue
            new_pages: list[int] | None = []
            if not self._pages.has_room(request):
                new_pages = self._pages.grow(request)
            if new_pages is None:
                pages_suffice = False
                new_pages = self._preempt_for(request)
            if new_pages is not None:
                plan.add_decode(request, new_pages)
        return pages_suffice

    def _plan_started_prompts(self, plan: StepPlan, budget: int) -> int:
        """Plan the next chunks of prompts that an earlier step began, oldest first. Returns the rest of the budget."""
        for request in self._running.values():
            if budget and request.is_prefilling:
                budget -= plan.add_chunk(request, budget, [])
        return budget

    def _plan_admissions(self, plan: StepPlan, budget: int) -> None:
        """Admit requests from the front of the queue while budget, rows and pages last. No request overtakes another.

        The pages that running requests will need next are reserved, so that a new request does not preempt one at once.
        """
        if not (budget and self._free_rows and self._queue):
            return
        reserve = sum(self._pages.expected_growth(other, self._reserved_tokens) for other in self._running.values())
        while budget and self._free_rows:
            request = self._queue.head
            # A preempted request with a step in flight will get one more token.
            if request is None or request.steps_in_flight:
                return
            holding = self._pages.admit(request, reserve)
            if holding is None:
                return
            self._start(request, holding.num_shared * self._page_size)
            reserve += self._pages.expected_growth(request, self._reserved_tokens)
            plan.add_row(request, holding.pages[: holding.num_shared])
            budget -= plan.add_chunk(request, budget, holding.pages[holding.num_shared :])

    def _start(self, request: Request, cached_tokens: int) -> None:
        if request.cached_tokens is None:
            self._totals.prompt_tokens += request.prompt_length
            self._totals.cached_tokens += cached_tokens
        self._queue.remove(request)
        request.begin(self._free_rows.pop(), cached_tokens)
        self._running[request.row] = request

    def _preempt_for(self, request: Request) -> list[int] | None:
        """A page for `request`, taken from the youngest. None when it must wait a step, or is the youngest itself."""
        while not self._draining:  # finished requests give back pages with the next update, so waiting is cheaper
            _, youngest = self._running.popitem()
            self._release(youngest)
            youngest.requeue()
            self._queue.push_front(youngest)
            self._totals.preemptions += 1
            if youngest is request:
                return None
            new_pages = self._pages.grow(request)
            if new_pages is not None:
                return new_pages
        return None

    def _landing(self, batch: ScheduledBatch) -> StepPlan:
        if not self._in_flight or self._in_flight[0].step != batch.step:
            raise RuntimeError(f"step {batch.step} is not the oldest step in flight")
        return self._in_flight.popleft()

    def _take_token(self, request: Request, sampled: Sampled) -> RequestOutput:
        token_id, logprob = sampled
        request.tokens.append(token_id)
        self._totals.generated_tokens += 1
        finish = request.finish_after(token_id)
        if finish is not None:
            return self._finish(request, finish, [token_id], sampled.logprob)
        return request.output([token_id], logprob)

    def _refuse(self, rid: str, message: str) -> None:
        self._outputs.append(RequestOutput(rid=rid, finish=Finish(kind="error", message=message)))

    def _finish(
        self, request: Request, finish: Finish, token_ids: list[int] | None = None, logprob: TokenLogprob | None = None
    ) -> RequestOutput:
        """End a request; returns its terminal output. A step in flight keeps its row and pages until it lands."""
        del self._requests[request.rid]
        if request.state is RequestState.WAITING:
            self._queue.remove(request)
        else:
            del self._running[request.row]
            self._draining[request.row] = request
        request.state = RequestState.FINISHED
        self._release_if_landed(request)
        return request.output(token_ids or [], logprob, finish)

    def _release_if_landed(self, request: Request) -> None:
        """Free what a finished request still has, unless a step in flight uses it."""
        if request.row != NO_ROW and request.steps_in_flight == 0:
            del self._draining[request.row]
            self._release(request)

    def _release(self, request: Request) -> None:
        """Take row and pages from a request. They are freed nowhere else."""
        self._pages.release(request)
        self._free_rows.append(request.row)
        request.row = NO_ROW
