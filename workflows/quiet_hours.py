"""Quiet hours: when an agent begins no turn, save for what may always disturb it. Pure.

    quiet_hours: {from: "22:00", to: "07:00", time_zone: Europe/Lisbon, days: mon-fri, except: [store.payment.*]}

`look` says whether it is quiet at a time, and until when that stays so. It needs the rules of a time zone, which are in
files and change: a workflow has `look` called as an activity, and goes by the answer until it has run out.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from workflows.schedule import days_of_week

TimeOfDay = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
"""HH:MM, in quotes: YAML takes 22:00 for a number."""

_A_DAY = timedelta(days=1)
_A_SECOND = timedelta(seconds=1)
_AHEAD = 9  # days in which something changes for certain: a week, and one on either side


class QuietHours(BaseModel):
    """When the agent is not to be disturbed, by the clock on the wall."""

    model_config = ConfigDict(frozen=True, serialize_by_alias=True, validate_by_name=True)

    start: TimeOfDay = Field(alias="from")
    end: TimeOfDay = Field(alias="to")
    """On the next day, if it is not later than `from`."""
    time_zone: str = "UTC"
    """An IANA name."""
    days: str = "*"
    """On which days it begins: `mon-fri`, `sat,sun`; `*`: every day."""
    excepted: tuple[str, ...] = Field((), alias="except")
    """Types of events that are taken nevertheless; `*` stands for any text. Questions by people always are."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if len(self.weekdays) == 7 and self.start == self.end:  # noqa: PLR2004  # days of the week
            raise ValueError("from and to are the same on every day: it would be quiet for ever")
        return self

    @property
    def weekdays(self) -> set[int]:
        """The days on which it begins; 0 is Sunday."""
        return days_of_week(self.days)

    def lets_pass(self, event_type: str) -> bool:
        """Whether an event of this type is taken nevertheless."""
        return any(fnmatchcase(event_type, pattern) for pattern in self.excepted)


class Hush(BaseModel):
    """Whether it is quiet, and how long that stays as it is."""

    model_config = ConfigDict(frozen=True)

    hours: QuietHours
    quiet: bool
    until: datetime


class LookRequest(BaseModel):
    """Is it quiet then?"""

    model_config = ConfigDict(frozen=True)

    hours: QuietHours
    at: datetime


def look(hours: QuietHours, at: datetime, zone: tzinfo) -> Hush:
    """Whether it is quiet at a time, and until when.

    Where a clock is put forward over `from` or `to`, that is the time of the change; where one is put back, it is quiet
    from the first `from` to the last `to`.
    """
    until, quiet = None, False
    for start, end in _periods(hours, at.astimezone(zone).date(), zone):
        if until is not None and start > until:
            break  # it ends before the next begins
        if start <= (until or at) < end or start == until:
            until, quiet = end, True
        elif start > at:
            return Hush(hours=hours, quiet=False, until=start)
    assert until is not None, "within a week it begins, or ends"
    return Hush(hours=hours, quiet=quiet, until=until)


def _periods(hours: QuietHours, today: date, zone: tzinfo) -> Iterator[tuple[datetime, datetime]]:
    """The quiet times from yesterday's on, in order."""
    start, end = time.fromisoformat(hours.start), time.fromisoformat(hours.end)
    for number in range(-1, 2 * _AHEAD):
        day = today + number * _A_DAY
        if day.isoweekday() % 7 in hours.weekdays:
            begins = _instant(datetime.combine(day, start), zone, last=False)
            ends = _instant(datetime.combine(day + _A_DAY if end <= start else day, end), zone, last=True)
            if begins < ends:
                yield begins, ends


def _instant(wall: datetime, zone: tzinfo, *, last: bool) -> datetime:
    """When a clock on the wall shows this time; if it never does, when it is put forward over it."""
    first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first <= second:
        return second if last else first
    low, high = second, first  # the clock is put forward between these
    before = low.astimezone(zone).utcoffset()
    while high - low > _A_SECOND:
        middle = low + (high - low) / 2
        if middle.astimezone(zone).utcoffset() == before:
            low = middle
        else:
            high = middle
    return high.replace(microsecond=0)
