"""`ScheduleSpec`: what comes to an agent again and again, by the clock. Pure.

    schedules:
      - name: morning-review
        cron: "0 8 * * mon-fri"
        time_zone: Europe/Lisbon
        key: all
        text: What came in over night?

It is kept as a Temporal Schedule (`workers.schedules`), which starts an `OccurrenceWorkflow` each time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints, model_validator

from workflows import names
from workflows.durations import duration

_DAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}
_MONTHS = {
    name: number
    for number, name in enumerate(
        ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1
    )
}
_SPAN = re.compile(r"(?P<start>\*|\w+)(?:-(?P<end>\w+))?(?:/(?P<step>[0-9]{1,4}))?", re.ASCII)
_SHORTHANDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")


class Span(NamedTuple):
    """Numbers from start to end, both included, a step apart."""

    start: int
    end: int
    step: int


class _Field(NamedTuple):
    """What a field of a calendar may hold."""

    low: int
    high: int
    words: Mapping[str, int] = {}


_CALENDAR = {
    "second": _Field(0, 59),
    "minute": _Field(0, 59),
    "hour": _Field(0, 23),
    "day_of_month": _Field(1, 31),
    "month": _Field(1, 12, _MONTHS),
    "day_of_week": _Field(0, 6, _DAYS),
    "year": _Field(2000, 2100),
}
_CRON = (*(_CALENDAR[name] for name in ("minute", "hour", "day_of_month", "month")), _Field(0, 7, _DAYS))


def spans(text: str, field: _Field) -> list[Span]:
    """What a field of a calendar or a cron line says: `*`, `5`, `1-5`, `*/10`, `mon-fri`, `1,15`.

    Raises:
        ValueError: it says nothing of that kind.
    """
    return [_span(part.strip().lower(), field) for part in text.split(",")]


def days_of_week(text: str) -> set[int]:
    """The days that a field says; 0 is Sunday.

    Raises:
        ValueError: it says none.
    """
    found = spans(text, _CALENDAR["day_of_week"])
    return {day for span in found for day in range(span.start, span.end + 1, span.step)}


def _span(text: str, field: _Field) -> Span:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number, a range such as 1-5, or * with or without a step such as */10")
    if match["start"] == "*":
        if match["end"]:
            raise ValueError(f"{text!r} is no range")
        start, end = field.low, field.high
    else:
        start = _number(match["start"], field)
        end = _number(match["end"], field) if match["end"] else field.high if match["step"] else start
    step = int(match["step"] or 1)
    if end < start or not step:
        raise ValueError(f"{text!r} is no range that holds anything")
    return Span(start, end, step)


def _number(text: str, field: _Field) -> int:
    if text in field.words:
        return field.words[text]
    if not text.isdecimal() or not field.low <= int(text[:9]) <= field.high:
        words = f", or {', '.join(field.words)}" if field.words else ""
        raise ValueError(f"{text!r} is not between {field.low} and {field.high}{words}")
    return int(text)


class Overlap(StrEnum):
    """What becomes of an occurrence while the agent has not answered the one before."""

    SKIP = "skip"
    """It is left out."""
    BUFFER_ONE = "buffer_one"
    """It waits; one waits at most."""
    BUFFER_ALL = "buffer_all"
    """It waits, as do all."""
    ALLOW_ALL = "allow_all"
    """It is handed to the agent anyway, whose mailbox has them in order."""


def _text(written: Any) -> Any:
    return str(written) if isinstance(written, int) and not isinstance(written, bool) else written


def _seconds(written: Any) -> Any:
    if isinstance(written, int | float | str) and not isinstance(written, bool):
        try:
            return duration(str(written))
        except OverflowError:
            raise ValueError(f"{written!r} is too long") from None
    return written


_Part = Annotated[str, BeforeValidator(_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalendarSpec(_Strict):
    """The times that all of these fit: `{hour: 8, minute: "0,30", day_of_week: mon-fri}`."""

    second: _Part = "0"
    minute: _Part = "0"
    hour: _Part = "0"
    day_of_month: _Part = "*"
    month: _Part = "*"
    day_of_week: _Part = "*"
    """0 or sun to 6 or sat."""
    year: _Part = "*"

    @model_validator(mode="after")
    def _holds(self) -> Self:
        _ = self.fields
        return self

    @property
    def fields(self) -> dict[str, list[Span]]:
        """What each field says.

        Raises:
            ValueError: one says nothing.
        """
        found = {}
        for name, field in _CALENDAR.items():
            try:
                found[name] = spans(getattr(self, name), field)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return found


def _cron(text: str) -> str:
    text = " ".join(text.split())
    parts = text.split()
    if text in _SHORTHANDS:
        return text
    if len(parts) != len(_CRON):
        raise ValueError(
            f"{text!r} has {len(parts)} fields; a cron line has five: minute, hour, day of month, month, day of week "
            f"(or it is one of {', '.join(_SHORTHANDS)})"
        )
    for part, field in zip(parts, _CRON, strict=True):
        spans(part, field)
    return text


class ScheduleSpec(_Strict):
    """An event that comes to the agent by the clock."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    """Tells the agent's schedules apart."""
    cron: str | None = None
    """Five fields, as in crontab(5), or @daily and the like."""
    calendar: CalendarSpec | None = None
    """Or the fields of the times by name."""
    every: Annotated[timedelta, BeforeValidator(_seconds)] | None = None
    """Or at intervals, counted from 1970: `6 hours`, or seconds."""
    time_zone: str = "UTC"
    """An IANA name, of `cron` and `calendar`. In the hour that a clock is put forward over, nothing comes."""
    jitter_seconds: float = Field(0, ge=0, le=86_400)
    """Each comes up to so much later, by chance: many at a time are spread."""
    overlap: Overlap = Overlap.SKIP
    """What becomes of an occurrence while the agent has not answered the one before."""
    wait_seconds: float = Field(86_400, ge=1, le=366 * 86_400)
    """How long an answer is waited for; then the occurrence no longer counts for `overlap`. Its event stays valid."""
    catch_up_seconds: float = Field(86_400, ge=10, le=366 * 86_400)
    """What was missed while Temporal was down is made up for, as far back as this."""
    key: str = Field("main", min_length=1, max_length=200)
    """The key of the agent that it comes to."""
    type: str = Field(names.SCHEDULE_TYPE, min_length=1, max_length=200)
    """The event's type."""
    text: str = Field("", max_length=10_000)
    """What the agent is told: `data.text` of the event."""
    data: dict[str, JsonValue] = Field(default_factory=dict)
    """More of the event's data."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        given = [name for name in ("cron", "calendar", "every") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of cron, calendar and every; given are: {', '.join(given) or 'none'}")
        if self.every is not None and self.every < timedelta(seconds=1):
            raise ValueError("every is a second at least")
        if self.cron is not None:
            object.__setattr__(self, "cron", _cron(self.cron))
        return self

    @property
    def when(self) -> str:
        """The times, in words."""
        zone = "" if self.time_zone == "UTC" else f" ({self.time_zone})"
        if self.cron is not None:
            return f"{self.cron}{zone}"
        if self.calendar is not None:
            parts = self.calendar.model_dump(exclude_defaults=True)
            return " ".join(f"{name}={value}" for name, value in parts.items()) + zone
        return f"every {self.every}"
