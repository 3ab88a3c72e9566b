"""What a soak's seed says: the same faults and mail each time, often enough, and none that spoil one another."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from chaos import AT_ONCE, LINKS, LONGEST_PAUSE, NAPPER_SPEC, STORE_TOPIC, Fault, Kind, plan, post
from hypothesis import given
from hypothesis import strategies as st
from stack import STORE

from workers.embedded import BROKER, TEMPORAL
from workers.operations import known_specs
from workers.records import Routes
from workers.tally import expect

SECONDS = 90
seeds = st.integers(0, 1_000_000)


@given(seeds, st.booleans())
def test_the_same_seed_is_the_same_plan(seed: int, broker_remembers: bool) -> None:
    first, second = (plan(seed, SECONDS, broker_remembers=broker_remembers) for _ in range(2))
    assert first == second
    assert first != plan(seed + 1, SECONDS, broker_remembers=broker_remembers)


@given(seeds)
def test_a_longer_soak_begins_as_a_shorter_one(seed: int) -> None:
    longer = plan(seed, SECONDS, broker_remembers=True)
    assert [fault for fault in longer if fault.at < 60] == plan(seed, 60, broker_remembers=True)


@given(seeds, st.booleans())
def test_a_fault_begins_every_few_seconds(seed: int, broker_remembers: bool) -> None:
    faults = plan(seed, SECONDS, broker_remembers=broker_remembers)
    begun = [0, *(fault.at for fault in faults), SECONDS]
    assert begun == sorted(begun)
    for before, after in itertools.pairwise(begun):
        present = [fault for fault in faults if fault.at <= before and fault.end > before]
        assert after - before <= LONGEST_PAUSE or len(present) == AT_ONCE


@given(seeds, st.booleans())
def test_faults_do_not_spoil_one_another(seed: int, broker_remembers: bool) -> None:
    """One fault at a time of a process or link, no more than three of all, and people find their servers there."""
    faults = plan(seed, SECONDS, broker_remembers=broker_remembers)
    for fault in faults:
        others = [other for other in faults if other is not fault and _overlap(fault, other)]
        assert all(fault.holds.isdisjoint(other.holds) for other in others)
        assert sum(other.at <= fault.at for other in others) < AT_ONCE
        if fault.kind in {Kind.REDRIVE, Kind.REPLAY}:
            assert BROKER in fault.holds
            assert (TEMPORAL in fault.holds) == (fault.kind is Kind.REPLAY)


def _overlap(one: Fault, other: Fault) -> bool:
    return one.at < other.end and other.at < one.end


def test_a_broker_that_forgets_is_left_alone_and_one_that_remembers_is_not() -> None:
    for seed in range(20):
        assert all(fault.target != BROKER for fault in plan(seed, SECONDS, broker_remembers=False))
    assert any(fault.target == BROKER for fault in plan(0, SECONDS, broker_remembers=True))


def test_ten_minutes_bring_faults_of_every_kind_upon_everything() -> None:
    faults = plan(1, 600, broker_remembers=True)
    assert {fault.kind for fault in faults} == set(Kind)
    assert {fault.target for fault in faults} >= {*LINKS, "ingest-1", "ingest-2", "ingest-3", "agent", "model", BROKER}


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_is_the_same_mail(seed: int) -> None:
    first, second = (list(itertools.islice(post(seed), 500)) for _ in range(2))
    assert first == second


def test_the_mail_is_of_all_sorts(tmp_path: Path) -> None:
    """To many agents and a few hot ones; twice at once and much later; poison of many kinds; what nobody wants."""
    for spec in STORE.glob("*.yaml"):
        (tmp_path / spec.name).write_text(spec.read_text())
    (tmp_path / "napper.yaml").write_text(NAPPER_SPEC)
    routes = Routes(known_specs(tmp_path) or [])
    mail = list(itertools.islice(post(1), 2000))
    lines = [(letters.topic, value or b"") for letters in mail for value in letters.values]
    expected = expect(lines, routes)
    agents = Counter(pair.workflow_id for pair in expected.pairs)
    assert len(agents) > 80
    (_, hottest), (_, second), (_, third), *_ = agents.most_common()
    assert hottest > second > 4 * third
    assert expected.repeated > 100
    assert expected.skipped > 10
    assert {topic for topic, _ in lines} == {"agents.events", STORE_TOPIC}
    poison = {lines[index][1] for index in expected.rejects}
    assert len(poison) > 10
    assert all(letters.key for letters in mail if letters.values[0] in poison), "it goes where good mail goes"
    later = Counter(value for letters in mail if not letters.key for value in set(letters.values))
    assert sum(times > 1 for times in later.values()) > 20
    assert all(json.loads(value or b"") for letters in mail if not letters.key for value in letters.values)
