"""The oracle of the fault tests: what is wrong with what came of a system's events, counted from the outside. Pure.

    assert not wrong(expected, tally, ...)

`workers/tally.py` counts; here stands what is true of any run, whatever was broken meanwhile (DESIGN.md, P1 to P4).
Every event that was sent has one fate, and the right one: it is accepted and answered once, or dropped as a duplicate,
or set aside as a dead letter, or skipped since no agent wants it; so accepted + duplicates + dead letters + skipped =
sent. There may be more duplicates than that: what is delivered again after a crash is dropped, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from traffic import Place, Sent

from activities.entries import Entry
from workers.flow import Partition
from workers.tally import Expected, Pair, Tally

_EXAMPLES = 5


def wrong(  # one argument for each place that is looked at
    expected: Expected,
    tally: Tally,
    *,
    sent: Sequence[Sent],
    recorded: Mapping[str, Sequence[Entry]],
    dead_letters: Collection[tuple[str, int, int]],
    committed: Mapping[Partition, int],
    ends: Mapping[Partition, int],
) -> list[str]:
    """Everything that is wrong, in words; nothing, when all promises are kept.

    Args:
        expected: what ought to have come of what was sent.
        tally: the figures.
        sent: the records, with their places.
        recorded: the agents' entries, oldest first.
        dead_letters: the places of the records that were set aside.
        committed: the offsets that the group has committed.
        ends: the ends of the partitions that it reads.
    """
    return [
        *_miscounted(tally, expected),
        *_unasked(expected, recorded),
        *_misjudged(expected, sent, dead_letters),
        *_out_of_order(expected, sent, recorded),
        *_behind(committed, ends),
    ]


def _miscounted(tally: Tally, expected: Expected) -> Iterator[str]:
    for name in ("lost", "answered_twice", "paid_twice"):
        if number := getattr(tally, name):
            yield f"{name}: {number}"
    if tally.duplicates < expected.repeated:
        yield f"{tally.duplicates} duplicates are reported, {expected.repeated} were sent"


def _unasked(expected: Expected, recorded: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    """Agents have answered what nobody has sent them."""
    answers = {Pair(agent, digest) for agent, entries in recorded.items() for digest in _answered(entries)}
    if ghosts := answers - expected.pairs.keys():
        yield f"never sent, and yet answered: {_some(ghosts)}"


def _misjudged(
    expected: Expected, sent: Sequence[Sent], dead_letters: Collection[tuple[str, int, int]]
) -> Iterator[str]:
    """The wrong records are set aside: P4 says which, and that no others are, whatever server was down."""
    rejects = {sent[index].place for index in expected.rejects}
    found = {Place(*place) for place in dead_letters}
    if stray := found - rejects:
        yield f"dead-lettered, and nothing is wrong with them: {_some(stray)}"
    if missing := rejects - found:
        yield f"not dead-lettered: {_some(missing)}"


def _out_of_order(expected: Expected, sent: Sequence[Sent], recorded: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    """An agent has taken events in another order than that of their partition; of one sent twice the first counts."""
    for agent, entries in recorded.items():
        newest: dict[Partition, tuple[int, str]] = {}
        for digest in _answered(entries):
            index = expected.pairs.get(Pair(agent, digest))
            partition = None if index is None else sent[index].partition
            if index is None or partition is None:
                continue
            before, of = newest.get(partition, (-1, ""))
            if index < before:
                yield f"{agent} has taken {of} before {digest}, which stands before it"
            else:
                newest[partition] = index, digest


def _behind(committed: Mapping[Partition, int], ends: Mapping[Partition, int]) -> Iterator[str]:
    for partition, end in ends.items():
        position = committed.get(partition, 0)
        if position != end:
            yield f"{partition.topic}/{partition.partition} ends at {end}, and {position} is committed"


def undurable(
    expected: Expected,
    *,
    sent: Sequence[Sent],
    committed: Mapping[Partition, int],
    accepted: Collection[Pair],
    dead_letters: Collection[tuple[str, int, int]],
) -> list[str]:
    """Records before a committed offset of which a part is neither with its agent nor a dead letter (P3).

    Args:
        expected: what ought to come of what was sent.
        sent: the records, with their places.
        committed: the offsets that the group had committed before it was asked for the rest.
        accepted: events that are with their agents.
        dead_letters: the places of the records that were set aside.
    """
    passed = {
        index
        for index, record in enumerate(sent)
        if record.partition and record.offset < committed.get(record.partition, 0)
    }
    set_aside = {Place(*place) for place in dead_letters}
    unaccepted = {index for pair, index in expected.pairs.items() if pair not in accepted}
    unburied = {index for index in expected.rejects if sent[index].place not in set_aside}
    return [f"record {index}, at {sent[index].place}" for index in sorted(passed & (unaccepted | unburied))]


def _answered(entries: Sequence[Entry]) -> list[str]:
    """The digests of the events that entries answer, in order, each once."""
    return list(dict.fromkeys(reference.digest for entry in entries for reference in entry.answers))


def _some(things: Collection[object]) -> str:
    shown = ", ".join(map(str, sorted(map(str, things))[:_EXAMPLES]))
    return shown if len(things) <= _EXAMPLES else f"{shown} and {len(things) - _EXAMPLES} more"
