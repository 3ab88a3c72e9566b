"""think: the agent's next step. Context from the ledger, one model call, one entry, one decision.

    model = Model(ledger, pools)
    Worker(client, task_queue=names.model_queue(queue), activities=[model.think])

The entry is keyed by (workflow id, turn, step), and looked up first, and once more in the moment of the call, since a
try that was frozen in between has been taken for dead: a step that is recorded is never paid for again, whatever dies
and whoever tries again (DESIGN.md, P6).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError
from typing_extensions import override

from activities import metrics
from activities.compaction import Conversations, summary_of
from activities.endpoints import Answer, FinalError, Listener, Pools
from activities.entries import Entry, MemoryMessage, Message
from activities.forms import Form
from activities.heartbeat import beating
from activities.ledger import Ledger
from activities.memory import Embedder, Memory
from activities.spend import Spending
from activities.steps import decision, entry_of, new_messages, references
from activities.stream import Put, Telling
from workflows import names
from workflows.budget import Cost, Limit, Refusal
from workflows.errors import Remedy, activity_error
from workflows.events import Event, EventReference
from workflows.interface import ModelActivities
from workflows.messages import CompactRequest, Decision, ThinkRequest, Usage
from workflows.spec import ResolvedSpec

log = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 3  # what is set aside of a budget is rather too much than too little
_SHARES = (1, 2, 4, 8)
"""Of the context, by which part it is shown: less and less if the model finds it too long. Tokens are an estimate."""


_Conversation = tuple[list[Entry], list[Message]]
"""The conversation so far, and what is new in it."""


class _RecordedError(Exception):
    """The step is recorded by now: its call is not to be made."""


class _RefusedError(Exception):
    """The call might break a limit of the budget: it is not to be made."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class _CrowdedError(Exception):
    """The conversation is to be summed up first."""


class Model(ModelActivities):
    """Makes model calls and records them."""

    def __init__(self, ledger: Ledger, pools: Pools, put: Put | None = None, embedder: Embedder | None = None) -> None:
        self._ledger = ledger
        self._conversations = Conversations(ledger)
        self._memory = Memory(ledger, embedder)
        self._spending = Spending(ledger)
        self._pools = pools
        self._put = put
        self._specs: dict[str, tuple[Form | None, bool]] = {}
        """What answers have to fit, and whether they are streamed, by the spec's digest: what the ledger has under it
        never changes."""

    @override
    @activity.defn(name="think")
    async def think(self, request: ThinkRequest) -> Decision:
        with await self._telling(request) as told:
            try:
                entry, cost = await self._recorded(request, lambda: self._step(request, told))
            except _CrowdedError:
                return Decision(head=request.head or "", compact=True)
            except _RefusedError as refused:
                return Decision(head=request.head or "", refused=refused.refusal)
            if entry.summary and request.may_compact:
                return Decision(head=request.head or "", compact=True)
            if entry.parent != request.head or [r.digest for r in entry.answers] != [e.digest for e in request.events]:
                raise _other_life(request)
            if told:
                told.finish(entry.answer.text if entry.answer else "")
        return decision(entry, await self._form(request.spec_digest), cost)

    @override
    @activity.defn(name="compact")
    async def compact(self, request: CompactRequest) -> Decision:
        try:
            entry, cost = await self._recorded(request, lambda: self._compaction(request))
        except _RefusedError as refused:
            return Decision(head=request.head, refused=refused.refusal)
        if entry.parent != request.head or entry.summary is None:
            raise _other_life(request)
        return decision(entry, cost=cost)

    async def _recorded(
        self, request: ThinkRequest | CompactRequest, make: Callable[[], Coroutine[Any, Any, tuple[Entry, Cost]]]
    ) -> tuple[Entry, Cost]:
        """The entry of the step, which is made and recorded unless it is there, and what its call has cost."""
        entry = await self._ledger.find(request.workflow_id, request.turn, request.step)
        if entry is None:
            async with beating():
                # Another try may have been first, if this one was taken for dead: what it recorded counts.
                try:
                    return await self._spending.record(*await make())
                except _RecordedError:
                    entry = await self._ledger.find(request.workflow_id, request.turn, request.step)
                    assert entry is not None, "it was just seen"
        return entry, await self._spending.cost([entry.id])

    async def _form(self, digest: str) -> Form | None:
        """What the answers of agents with this spec have to fit."""
        return (await self._known(digest))[0]

    async def _known(self, digest: str) -> tuple[Form | None, bool]:
        if digest not in self._specs:
            spec = await self._ledger.get_spec(digest)
            self._specs[digest] = Form(spec.reply.json_schema) if spec.reply else None, spec.stream
        return self._specs[digest]

    async def _telling(self, request: ThinkRequest) -> AbstractContextManager[Telling | None]:
        """Tells what the model says, if somebody is to be told."""
        _, streamed = await self._known(request.spec_digest)
        if self._put is None or not streamed:
            return nullcontext()
        return Telling(
            self._put,
            request.workflow_id,
            turn=request.turn,
            step=request.step,
            attempt=activity.info().attempt,
            answers=references(request),
        )

    async def _step(self, request: ThinkRequest, told: Telling | None) -> tuple[Entry, Cost]:
        """Make the call; what came of it, as an entry."""
        spec = await self._ledger.get_spec(request.spec_digest)
        form = await self._form(request.spec_digest)
        instructions = f"{spec.instructions}\n\n{form.instruction}" if form else spec.instructions
        messages = new_messages(request, await self._reminder(request, spec))

        async def conversation(share: int) -> _Conversation:
            shown = await self._conversations.load(request.workflow_id, request.head, spec.context, share=share)
            if request.may_compact and shown.crowded(messages):
                raise _CrowdedError
            return shown.entries, messages

        answer: Answer | None = None
        error: str | None = None
        try:
            answer = await self._ask(
                request, spec, instructions, conversation, tools_allowed=request.tools_allowed, listener=told
            )
        except FinalError as refused:
            error = str(refused)
        if request.events:
            await self._notice_repeated(request)
        made = _entry(request, [*messages, answer.message] if answer else messages, answer, error, references(request))
        if request.repair:
            metrics.reply_repair(_repaired(decision(made[0], form)))
        return made

    async def _compaction(self, request: CompactRequest) -> tuple[Entry, Cost]:
        """Have the older part of the conversation summed up; what came of it, as an entry."""
        spec = await self._ledger.get_spec(request.spec_digest)
        shown = await self._conversations.load(request.workflow_id, request.head, spec.context)
        through = ""

        async def conversation(share: int) -> _Conversation:
            nonlocal through
            older, question = shown.to_sum_up(share)
            through = older[-1].id
            return older, question

        answer: Answer | None = None
        error: str | None = None
        try:
            answer = await self._ask(request, spec, spec.instructions, conversation, tools_allowed=False)
        except FinalError as refused:
            error = str(refused)
        summary = summary_of(answer.message.text if answer else "", through, spec.context)
        if answer and not summary.text:
            error = "the model wrote nothing"
        metrics.compaction("failed" if error else "completed")
        return _entry(request, [summary], answer, error)

    async def _notice_repeated(self, request: ThinkRequest) -> None:
        """Count the events that the agent has taken before, and forgotten: they were sent again beyond its horizon."""
        taken = await self._ledger.taken(request.workflow_id, [event.digest for event in request.events])
        repeated = sum(turn != request.turn for turn in taken.values())
        if repeated:
            metrics.repeated(names.parse_workflow_id(request.workflow_id).agent, repeated)
            log.warning(
                "%s takes %d events in turn %d that it has taken before: they came again when more than "
                "`mailbox.remember_ids` others had been taken since",
                request.workflow_id,
                repeated,
                request.turn,
            )

    async def _reminder(self, request: ThinkRequest, spec: ResolvedSpec) -> list[Message]:
        """What the agent has kept that fits what arrives in this step. Recorded with it, it is the same on a retry."""
        if spec.memory is None or not request.events:
            return []
        facts = await self._memory.fitting(request.workflow_id, spec.memory, _query(request.events), team=spec.team)
        return [MemoryMessage(facts=facts)] if facts else []

    async def _ask(  # noqa: PLR0913  # what is asked, of whom, and who listens
        self,
        request: ThinkRequest | CompactRequest,
        spec: ResolvedSpec,
        instructions: str,
        conversation: Callable[[int], Awaitable[_Conversation]],
        *,
        tools_allowed: bool,
        listener: Listener | None = None,
    ) -> Answer:
        """Have the step answered, showing less of the conversation if it is too long.

        Raises:
            FinalError: the request was refused, and would be again.
            ApplicationError: no model can answer now.
            _RecordedError: another try has had it answered meanwhile.
            _RefusedError: it might break a limit of the budget.
        """
        key = names.call_key(request.workflow_id, request.turn, request.step)
        limits = spec.budget.limits if request.limits is None else request.limits
        for share in _SHARES:
            context, messages = await conversation(share)
            if limits and share == _SHARES[0]:
                sent = [*(one for entry in context for one in entry.messages), *messages]
                await self._reserve(request, spec, limits, sent)
            if not await self._ledger.begin_call(request.workflow_id, request.turn, request.step):
                if limits:
                    await self._spending.release(request.workflow_id, request.turn, request.step)
                raise _RecordedError
            try:
                return await self._pools.call(
                    spec.route,
                    instructions=instructions,
                    context=context,
                    messages=messages,
                    tools=spec.tools,
                    key=key if share == 1 else f"{key}/{share}",  # another request: it needs another key
                    tools_allowed=tools_allowed,
                    budgeted=bool(limits),
                    listener=listener,
                )
            except FinalError as error:
                if not error.too_long or not context or share == _SHARES[-1]:
                    raise
            except ApplicationError:
                if limits:  # nobody has answered: others may have the money until this is tried again
                    await self._spending.release(request.workflow_id, request.turn, request.step)
                raise
        raise AssertionError("the last share returns or raises")

    async def _reserve(
        self,
        request: ThinkRequest | CompactRequest,
        spec: ResolvedSpec,
        limits: Sequence[Limit],
        messages: Iterable[Message],
    ) -> None:
        """Set aside what the call may take.

        Raises:
            _RefusedError: it might break a limit of the budget.
            ApplicationError: RetryLater: other calls have to end first.
        """
        need = self._pools.need(spec.route, _tokens(spec, messages))
        need = need.model_copy(update={"turns": int(request.step == 1)})
        refused = await self._spending.reserve(request.workflow_id, request.turn, request.step, limits, need)
        if refused is not None:
            agent = names.parse_workflow_id(request.workflow_id).agent
            metrics.budget_refused(agent, refused.scope.value, refused.measure.value)
            raise _RefusedError(refused)


def _tokens(spec: ResolvedSpec, messages: Iterable[Message]) -> int:
    """About how many tokens a call with these messages sends."""
    sent = [spec.instructions, *(tool.model_dump_json() for tool in spec.tools)]
    sent += [one.model_dump_json() for one in messages]
    return sum(len(text.encode()) for text in sent) // _BYTES_PER_TOKEN


def _cost(workflow_id: str, answer: Answer | None) -> Cost:
    if answer is None:
        return Cost()
    if answer.micro_usd is None:
        return Cost(unpriced=1)
    metrics.spent(names.parse_workflow_id(workflow_id).agent, answer.pool, answer.micro_usd)
    return Cost(micro_usd=answer.micro_usd)


def _entry(
    request: ThinkRequest | CompactRequest,
    messages: list[Message],
    answer: Answer | None,
    error: str | None,
    answers: Sequence[EventReference] = (),
) -> tuple[Entry, Cost]:
    """What came of a step, as it is recorded, and what it has cost."""
    entry = entry_of(
        request,
        messages,
        answers=answers,
        model=answer.model if answer else "",
        rehearsal=bool(answer and answer.rehearsal),
        usage=answer.usage if answer else Usage(),
        error=error,
    )
    return entry, _cost(request.workflow_id, answer)


def _other_life(request: ThinkRequest | CompactRequest) -> Exception:
    return activity_error(
        Remedy.FINAL,
        f"Turn {request.turn}, step {request.step} of {request.workflow_id} is recorded with other events: its "
        "workflow was terminated or reset meanwhile. Send these events again.",
    )


def _query(events: Iterable[Event]) -> str:
    """What these events are about: all texts and numbers that they hold."""
    found: list[str] = []
    waiting: list[Any] = [[event.subject, event.type.replace(".", " "), event.data] for event in events][::-1]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += reversed(value.values() if isinstance(value, dict) else value)
        elif value is not None:
            found.append(str(value))
    return "\n".join(found)


def _repaired(decided: Decision) -> str:
    """What came of an answer that was sent back, as the metric names it."""
    if decided.faults or decided.empty:
        return "unfit"
    return "other" if decided.error or decided.tool_calls else "fits"
