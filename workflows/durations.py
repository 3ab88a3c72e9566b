"""Durations as people and models write them. Pure."""

from __future__ import annotations

import re
from datetime import timedelta

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_PART = re.compile(
    rf"(?P<number>{_NUMBER})\s*"
    r"(?P<unit>s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?|h(?:(?:ou)?rs?)?|d(?:ays?)?|w(?:eeks?)?)",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"\s*(?:,|and)?\s*", re.IGNORECASE)


def duration(text: str) -> timedelta:
    """A duration as people write it: `3 days`, `1h30m`, `2 weeks and 1 day`; a bare number is seconds.

    Raises:
        ValueError: it is none.
    """
    text = text.strip()
    if re.fullmatch(_NUMBER, text, re.ASCII):
        return timedelta(seconds=float(text))
    total, place = 0.0, 0
    while match := _PART.match(text, place):
        total += float(match["number"]) * _SECONDS[match["unit"][0].lower()]
        between = _BETWEEN.match(text, match.end())
        place = between.end() if between else match.end()
    if not text or place < len(text):
        raise ValueError(f'{text!r} is no duration; write it as in "3 days", "1 h 30 min", "2 weeks", or in seconds')
    return timedelta(seconds=total)
