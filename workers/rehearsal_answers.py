"""What the rehearsal endpoint answers: as a message directs, else by the rules, else something sensible. Pure.

    decision = decide(request, rules)       # Decision: the answer, and how it is given

A turn is what was told since the last final answer. What was called in it is read from the conversation, so nothing
is kept here. Directives stand in the text of a message, or anywhere in an event's data:

    [[latency 2.5]]                 answer after so many seconds ("0.1-0.4" for a range)
    [[error 429 retry-after=2 times=3]]     an error, the first three times for one Idempotency-Key; else always
    [[cut]]  [[hang]]               break off in the middle of the body; never answer (both know `times` too)
    [[say some text]]               the answer
    [[empty]]                       an answer that says nothing; when it was sent back, what `again` says, if it does
    [[again some text]]             the answer when that was sent back; another one, when that was too, and so on
    [[call tool {"json": "args"} x5]]       call this tool, five times one after the other, then answer
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import JsonValue

from activities.conversation import CANCELLED, INTERRUPTED, SUM_UP, SUMMARY
from workers.rehearsal_forms import in_form, schema_asked_for
from workers.rehearsal_protocol import Answer, Call, ChatMessage, ChatRequest, Function
from workers.rehearsal_rules import Before, Result, ResultOf, Rules, Told, read_event, read_result, reported
from workflows import names, repair

_MOST_STEPS = 100
"""So many times a turn calls tools; then it answers, whatever it was told."""
_QUOTED_CHARACTERS = 300

_DIRECTIVE = re.compile(r"\[\[(latency|error|cut|hang|say|empty|again|call)\b\s*")
_ERROR = re.compile(r"([45]\d\d)(?:\s+retry-after=(\d+(?:\.\d+)?))?(?:\s+times=(\d+))?")
_TIMES = re.compile(r"(?:times=(\d+))?")
_CALL = re.compile(r"([\w.-]+)\s*")
_REPEATED = re.compile(r"\s*(?:x(\d+))?\s*\]\]")
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)(?:\s*-\s*(\d+(?:\.\d+)?))?")
_REMEMBER = re.compile(r"\b(remember|earlier|before)\b", re.IGNORECASE)
_SUM_UP = SUM_UP.partition("{")[0]
_INTERRUPTED = INTERRUPTED.partition("{")[0]
_CANCELLED = CANCELLED.partition("{")[0]
_LONGEST_SECONDS = 3600.0


class DirectiveError(ValueError):
    """A directive or a latency can't be understood; the message says which and what is expected."""


@dataclass(frozen=True)
class Latency:
    """How long an answer takes: anything between these seconds."""

    least: float
    most: float

    @classmethod
    def parse(cls, text: str) -> Latency:
        """Read `0.05` or `0.1-0.4`.

        Raises:
            DirectiveError: it is neither.
        """
        found = _LATENCY.fullmatch(text.strip())
        least = float(found[1]) if found else -1.0
        most = float(found[2]) if found and found[2] else least
        if not 0 <= least <= most <= _LONGEST_SECONDS:
            raise DirectiveError(
                f"latency {text.strip()!r}: seconds such as 0.05, or a range such as 0.1-0.4, are expected "
                f"(at most {_LONGEST_SECONDS:.0f})"
            )
        return cls(least, most)


@dataclass(frozen=True)
class Failure:
    """Instead of an answer: an error status, or, when that is None, a broken or a hanging connection."""

    kind: str
    """`error`, `cut` or `hang`."""
    times: int | None = None
    """How often for one key; None: always."""
    status: int = 0
    retry_after: str | None = None


@dataclass(frozen=True)
class Decision:
    """What is answered, and how."""

    answer: Answer
    latency: Latency | None = None
    failures: Sequence[Failure] = ()

    def failure(self, asked: int) -> Failure | None:
        """What the answer fails with when it is asked for the `asked`-th time; each failure has its times in turn."""
        for failure in self.failures:
            if failure.times is None or asked <= failure.times:
                return failure
            asked -= failure.times
        return None


@dataclass
class _Directives:
    """Those of one message."""

    latency: Latency | None = None
    failures: list[Failure] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    empty: bool = False
    again: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@dataclass
class _Turn:
    """What was told since the last final answer that was taken, and which calls have results.

    `before` grows while its messages are answered, one after the other.
    """

    before: Before
    told: list[str]
    steps: int
    results: dict[str, deque[Result]]
    called: set[str]
    sent_back: int = 0
    """How often an answer in it was sent back."""

    def result_of(self, call: Call) -> Result | None:
        """The result of a call; each result is given once, the first one first."""
        self.before.called[call.tool] += 1
        waiting = self.results.get(_identity(call.tool, call.arguments))
        return waiting.popleft() if waiting else None


def decide(request: ChatRequest, rules: Rules) -> Decision:
    """What to answer to a conversation.

    Raises:
        DirectiveError: it holds a directive that can't be understood.
    """
    if request.messages[-1].content.startswith(_SUM_UP):
        return Decision(Answer(_summed_up(request.messages[:-1])))
    turn = _turn(request.messages)
    tools_allowed = request.tools_allowed and turn.steps < _MOST_STEPS
    latencies: list[Latency] = []
    failures: list[Failure] = []
    calls: list[Call] = []
    said: list[str] = []
    as_directed = False
    for content in turn.told:
        if content.startswith(_INTERRUPTED):  # what it waited for, it waits for no more
            latencies, failures = [], []
        told = read_event(content)
        if told is None:
            continue
        directives = _Directives()
        told = told.without(partial(_collect, directives))
        answer = _answer(request, rules, told, directives, turn, tools_allowed=tools_allowed)
        latencies += [directives.latency] if directives.latency else []
        failures += directives.failures
        as_directed = as_directed or bool(directives.said) or directives.empty
        calls += answer.calls
        said.append(answer.text)
        turn.before.messages.append(told.text or content)
    schema = None if as_directed else schema_asked_for(_instructions(request))
    text = in_form(schema, said) if schema else "\n\n".join(filter(None, said))
    if not (text or said):
        text = _NOTHING
    return Decision(
        answer=Answer(calls=calls) if calls else Answer(text),
        latency=max(latencies, key=lambda latency: latency.most, default=None),
        failures=failures,
    )


_NOTHING = "I was told nothing."


def _instructions(request: ChatRequest) -> str:
    return "\n".join(message.content for message in request.messages if message.role in {"system", "developer"})


def _answer(  # noqa: PLR0913  # what an answer is made of
    request: ChatRequest,
    rules: Rules,
    told: Told,
    directives: _Directives,
    turn: _Turn,
    *,
    tools_allowed: bool,
) -> Answer:
    """The answer to one message of the turn."""
    if directives.calls or directives.said or directives.empty:
        if turn.sent_back and directives.again:
            directives.said = [directives.again[min(turn.sent_back, len(directives.again)) - 1]]
        return _as_directed(directives, turn.result_of, tools_allowed=tools_allowed)
    functions = [tool.function for tool in request.tools]
    applied = rules.find(told, {function.name for function in functions} | turn.called, turn.before)
    if applied:
        return applied.answer(turn.result_of, tools_allowed=tools_allowed)
    if told.is_question and _REMEMBER.search(told.text):
        return Answer(_remembered(turn.before.messages))
    call = _fitting_call(functions, told)
    if call:
        result = turn.result_of(call)
        if result is not None:
            return Answer(f"I called {call.tool} with {_json(call.arguments)}. {reported([(call.tool, result.value)])}")
        if tools_allowed:
            return Answer(calls=[call])
    return Answer(f"{_told(told)} I am the rehearsal endpoint: no model, and no rule for this.")


# The turn ------------------------------------------------------------------------------------------------------------


def _turn(messages: Sequence[ChatMessage]) -> _Turn:
    final = [
        number
        for number, message in enumerate(messages)
        if message.role == "assistant" and not message.tool_calls and not _is_sent_back(messages, number)
    ]
    final += [number for number, message in enumerate(messages) if message.content.startswith(_CANCELLED)]
    begin = max(final) + 1 if final else 0
    called = Counter(call.function.name for message in messages[:begin] for call in message.tool_calls)
    past = ((content, read_event(content)) for content in _users(messages[:begin]))
    before = Before([told.text or content for content, told in past if told], called)
    turn = _Turn(before=before, told=_users(messages[begin:]), steps=0, results={}, called=set())
    turn.sent_back = sum(content.startswith(repair.WRONG) for content in _users(messages[begin:]))
    identities: dict[str, str] = {}
    for message in messages[begin:]:
        turn.steps += bool(message.tool_calls)
        for call in message.tool_calls:
            turn.called.add(call.function.name)
            identities[call.id] = _identity(call.function.name, read_result(call.function.arguments or "{}"))
        if message.role == "tool" and message.tool_call_id:
            result = Result(read_result(message.content))
            turn.results.setdefault(identities[message.tool_call_id], deque()).append(result)
    return turn


def _is_sent_back(messages: Sequence[ChatMessage], number: int) -> bool:
    """Whether a message is an answer after which it is said that it does not fit."""
    return messages[number].role == "assistant" and any(
        message.role == "user" and message.content.startswith(repair.WRONG)
        for message in messages[number + 1 : number + 2]
    )


def _users(messages: Sequence[ChatMessage]) -> list[str]:
    return [message.content for message in messages if message.role == "user"]


def _identity(tool: str, arguments: JsonValue) -> str:
    """Equal for calls that ask the same."""
    return f"{tool} {json.dumps(arguments, sort_keys=True)}"


# Directives ----------------------------------------------------------------------------------------------------------


def _collect(found: _Directives, text: str) -> str:
    """Add the directives in a text to what was found; the text without them."""
    kept: list[str] = []
    position = 0
    while begun := _DIRECTIVE.search(text, position):
        kept.append(text[position : begun.start()])
        position = _read_directive(text, begun, found)
    return "".join([*kept, text[position:]]).strip() if kept else text


def _read_directive(text: str, begun: re.Match[str], found: _Directives) -> int:
    """Read one directive; where the text goes on."""
    if begun[1] == "call":
        return _read_call(text, begun, found)
    end = text.find("]]", begun.end())
    if end < 0:
        raise DirectiveError(f"{_excerpt(text, begun)}: the directive has no end; `]]` is expected")
    argument = text[begun.end() : end].strip()
    match begun[1]:
        case "latency":
            found.latency = Latency.parse(argument)
        case "empty" if not argument:
            found.empty = True
        case "say":
            found.said.append(argument)
        case "again":
            found.again.append(argument)
        case "error":
            error = _ERROR.fullmatch(argument)
            if not error:
                raise DirectiveError(f"[[error {argument}]]: expected is [[error 429 retry-after=2 times=3]] or less")
            found.failures.append(Failure("error", int(error[3]) if error[3] else None, int(error[1]), error[2]))
        case kind:
            times = _TIMES.fullmatch(argument)
            if not times:
                raise DirectiveError(f"[[{kind} {argument}]]: expected is [[{kind}]] or [[{kind} times=3]]")
            found.failures.append(Failure(kind, int(times[1]) if times[1] else None))
    return end + 2


def _read_call(text: str, begun: re.Match[str], found: _Directives) -> int:
    expected = f'{_excerpt(text, begun)}: expected is [[call tool {{"argument": "value"}} x5]] or less'
    tool = _CALL.match(text, begun.end())
    if not tool:
        raise DirectiveError(expected)
    arguments: Any = {}
    position = tool.end()
    if text.startswith("{", position):
        try:
            arguments, position = json.JSONDecoder().raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DirectiveError(f"{expected} ({error})") from error
    repeated = _REPEATED.match(text, position)
    if not repeated or (repeated[1] and not 1 <= int(repeated[1]) <= _MOST_STEPS):
        raise DirectiveError(f"{expected}, at most x{_MOST_STEPS}")
    found.calls += [Call(tool[1], arguments)] * int(repeated[1] or 1)
    return repeated.end()


def _excerpt(text: str, begun: re.Match[str]) -> str:
    return text[begun.start() : begun.start() + 60]


def _as_directed(directives: _Directives, result_of: ResultOf, *, tools_allowed: bool) -> Answer:
    """The next of the calls that were asked for, and after the last one the answer."""
    results: list[tuple[str, JsonValue]] = []
    for call in directives.calls:
        result = result_of(call)
        if result is not None:
            results.append((call.tool, result.value))
        elif tools_allowed:
            return Answer(calls=[call])
    if directives.empty and not directives.said:
        return Answer()
    return Answer(" ".join(directives.said) or reported(results) or _NOTHING)


# Without a rule ------------------------------------------------------------------------------------------------------


def _fitting_call(functions: Sequence[Function], told: Told) -> Call | None:
    """A call whose arguments can be found in what was told: of the first tool that has some, else of one without."""
    fitting = [
        Call(function.name, arguments)
        for function in functions
        if function.name != names.READ_RESULT and (arguments := _arguments(function.parameters, told)) is not None
    ]
    return next((call for call in fitting if call.arguments), next(iter(fitting), None))


def _arguments(schema: dict[str, JsonValue], told: Told) -> dict[str, JsonValue] | None:
    """The arguments of a tool, None unless all that are required are found."""
    properties, needed = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, dict) else {}
    required = [str(name) for name in needed] if isinstance(needed, list) else []
    found = {name: value for name, kind in properties.items() for value in _found(name, kind, told, required)}
    return found if all(name in found for name in required) else None


def _found(name: str, kind: JsonValue, told: Told, required: Sequence[str]) -> Iterator[JsonValue]:
    """What was told that an argument of this name can be, if there is something."""
    kind = kind.get("type") if isinstance(kind, dict) else None
    if not told.is_question and isinstance(told.data, dict) and _is_of(told.data.get(name), kind):
        yield told.data[name]
    elif kind in {"string", None} and told.text and name in required:
        word = re.search(rf"\b{re.escape(name.removesuffix('_id'))}-\w+", told.text, re.IGNORECASE)
        if name.endswith("_id") and word:
            yield word[0]
        elif len(required) == 1 and not name.endswith("_id"):
            yield told.text


_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def _is_of(value: JsonValue, kind: JsonValue) -> bool:
    if value is None or not isinstance(kind, str):
        return value is not None
    return isinstance(value, _KINDS.get(kind, (object,))) and (kind == "boolean") == isinstance(value, bool)


def _remembered(before: Sequence[str]) -> str:
    if not before:
        return "I was shown no message before this one."
    count = "1 message" if len(before) == 1 else f"{len(before)} messages"
    return f"I was shown {count} before this one. The last was: {_quoted(before[-1])}"


def _summed_up(messages: Sequence[ChatMessage]) -> str:
    """What is kept of a conversation: how much it was, and the last of it, after what was kept of it before."""
    earlier = [content for content in _users(messages) if content.startswith(SUMMARY)]
    told = [content for content in _users(messages) if read_event(content)]
    lines = [one.removeprefix(SUMMARY).strip() for one in earlier[-1:]]
    return "\n".join([*lines, f"{len(told)} more messages. The last was: {_quoted(told[-1])}" if told else _NOTHING])


def _told(told: Told) -> str:
    if told.is_question:
        return f"You told me: {_quoted(told.text)}."
    about = f" about {told.subject}" if told.subject else ""
    return f"I was told of {told.type}{about}: {_quoted(_json(told.data))}."


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= _QUOTED_CHARACTERS else f'"{text[:_QUOTED_CHARACTERS]}..."'


def _json(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)
