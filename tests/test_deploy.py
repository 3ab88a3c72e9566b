"""What deploy/ ships: the specs load, and the demo's events are what the demo says they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from activities.demo_store import list_orders, look_up_order
from activities.specs import load_agent, load_specs
from activities.tools import ToolCallContext, call_context
from workers.flow import Limits
from workers.records import Decoded, Record, Rejected, Routes, decode
from workflows import names
from workflows.events import Event
from workflows.names import Address

DEPLOY = Path(__file__).parents[1] / "deploy"
SPECS = load_specs(DEPLOY / "agents")
LINES = (DEPLOY / "demo" / "events.jsonl").read_bytes().splitlines()
TOPIC = "store.events"


@dataclass(frozen=True)
class Accepted:
    """An event of the file, and the one agent that takes it."""

    line: int
    event: Event
    address: Address


def read() -> Iterator[Accepted | Rejected]:
    """What ingest makes of each line."""
    routes = Routes(SPECS.agents)
    headers = (("content-type", b"application/cloudevents+json"),)
    for number, line in enumerate(LINES):
        decoded = decode(Record(TOPIC, 0, number, -1, None, line, headers), max_bytes=Limits().event_bytes)
        if isinstance(decoded, Decoded):
            route = routes.route(decoded.event, TOPIC)
            if route.rejected is None:
                (address,) = route.addresses
                yield Accepted(number, decoded.event, address)
            else:
                yield route.rejected
        else:
            yield decoded


ALL = list(read())
ACCEPTED = [one for one in ALL if isinstance(one, Accepted)]
FIRST = list({one.event.digest: one for one in reversed(ACCEPTED)}.values())[::-1]
"""Without the duplicates."""


@pytest.mark.parametrize("path", sorted((DEPLOY / "agents").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_spec_loads_under_the_name_of_its_file(path: Path) -> None:
    """With its tools, which describe themselves and each of their arguments to the model."""
    agent = load_agent(path)
    assert (agent.spec.tenant, agent.spec.name) == ("store", path.stem)
    assert {name: tool.description for name, tool in agent.tools.items() if not tool.description} == {}
    for definition in agent.definitions:
        arguments = definition.parameters["properties"]
        assert isinstance(arguments, dict)
        assert all("description" in argument for argument in arguments.values() if isinstance(argument, dict))
        assert arguments or definition.name == names.LIST_WAKE_UPS


def test_the_company_is_complete() -> None:
    """All agents; what can't be recognised when it is repeated is not repeated."""
    assert {spec.name for spec in SPECS.agents} == {"customer-service", "logistics", "print-room", "security"}
    assert SPECS.topics == ["agents.events", TOPIC]
    tools = {
        (spec.name, definition.name): definition.repeatable
        for spec in SPECS.agents
        if (agent := SPECS.get(spec.tenant, spec.name))
        for definition in agent.definitions
    }
    assert [tool for tool, repeatable in tools.items() if not repeatable] == [("security", "send_text_message")]
    assert [agent for agent, tool in tools if tool == "refund"] == ["customer-service"]


def test_the_events_are_as_many_as_the_demo_says() -> None:
    """The demo's summary is compared with these numbers."""
    dead = Counter(one.reason.value for one in ALL if isinstance(one, Rejected))
    assert (len(LINES), len(ACCEPTED), len(FIRST)) == (256, 244, 230)
    assert dead == {
        "not_json": 3,
        "missing_attribute": 2,
        "bad_attribute": 2,
        "no_key": 2,
        "not_an_object": 1,
        "specversion": 1,
        "bad_time": 1,
    }
    assert Counter(address.agent for address in {one.address for one in FIRST}) == {
        "customer-service": 40,
        "logistics": 40,
        "security": 20,
    }


def test_duplicates_come_after_their_event_and_reach_the_same_agent() -> None:
    """10 are the very same line; 4 differ in their time alone. Otherwise, no id is used twice."""
    first = {one.event.digest: one for one in FIRST}
    again = [one for one in ACCEPTED if one is not first[one.event.digest]]
    assert len(again) == len({one.event.digest for one in again}) == 14
    assert sum(LINES[one.line] == LINES[first[one.event.digest].line] for one in again) == 10
    for one in again:
        original = first[one.event.digest]
        assert one.line > original.line
        assert one.address == original.address
        assert one.event.model_copy(update={"time": None}) == original.event.model_copy(update={"time": None})
    assert len({one.event.id for one in FIRST}) == len(FIRST)


def test_an_agents_events_share_a_partition() -> None:
    """The subject, by which records are keyed, is the agent's key; so they come in the order of the file."""
    assert [one for one in ACCEPTED if one.event.subject != one.address.key] == []


def test_the_events_are_varied() -> None:
    """Every kind, three languages, and customers who write again."""
    kinds = Counter(one.event.type for one in FIRST)
    assert set(kinds) == {
        *(f"store.customer.{kind}" for kind in ("message", "refund_requested", "review")),
        *(f"store.order.{kind}" for kind in ("placed", "packed", "shipped", "delayed", "lost", "delivered")),
        *(f"store.security.{kind}" for kind in ("login_failed", "new_device", "address_changed", "card_declined")),
    }
    assert min(kinds.values()) >= 5
    written = [one.event.data for one in FIRST if one.address.agent == "customer-service"]
    languages = Counter(data["lang"] for data in written if isinstance(data, dict))
    assert set(languages) == {"en", "fr", "es"}
    assert min(languages.values()) >= 30
    texts = [str(data.get("text") or data.get("reason")) for data in written if isinstance(data, dict)]
    assert len(set(texts)) == len(texts)
    per_agent = Counter(one.address for one in FIRST)
    assert sum(count >= 2 for count in per_agent.values()) >= 60
    assert max(per_agent.values()) <= 5


def test_the_events_are_about_the_stores_customers_and_orders(tmp_path: Path) -> None:
    """All but those that a tool has to refuse: three orders that do not exist, and one that is another customer's."""
    refused = set()
    for one in FIRST:
        data = one.event.data
        assert isinstance(data, dict)
        workflow_id = f"agent/store/{one.address.agent}/{one.address.key}"
        with call_context(ToolCallContext("key", tmp_path, workflow_id, 1)):
            if "customer_id" in data:
                assert list_orders(str(data["customer_id"]))
            if "order_id" in data:
                try:
                    look_up_order(str(data["order_id"]))
                except ValueError:
                    refused.add((one.address.key, data["order_id"]))
    assert refused == {
        ("customer-23", "order-1009"),
        ("customer-30", "order-1402"),
        ("customer-40", "order-9999"),
        ("order-7777", "order-7777"),
    }


def test_refunds_asked_for_are_of_each_kind(tmp_path: Path) -> None:
    """To be paid at once, to be decided by a colleague (over 200 EUR), and more than was paid."""
    kinds = Counter[str]()
    for one in FIRST:
        data = one.event.data
        if isinstance(data, dict) and isinstance(amount := data.get("amount_cents"), int) and "reason" in data:
            if one.address.agent != "customer-service":
                continue
            with call_context(ToolCallContext("key", tmp_path, f"agent/store/customer-service/{one.address.key}", 1)):
                paid = look_up_order(str(data["order_id"])).paid_cents
            kinds["too much" if amount > paid else "colleague" if amount > 20_000 else "at once"] += 1
    assert set(kinds) == {"too much", "colleague", "at once"}


def test_the_file_is_easy_to_read_and_to_compare() -> None:
    """UTF-8, one event a line, no blank lines, no invisible characters that an editor would change."""
    text = (DEPLOY / "demo" / "events.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert all(line.strip() == line and line for line in text.splitlines())
    assert re.search(r"[\x00-\x09\x0b-\x1f\u2028\u2029\ufeff]", text) is None
    assert all(json.loads(LINES[one.line])["specversion"] == "1.0" for one in ACCEPTED)
    assert max(len(list(run)) for _, run in groupby(type(one) for one in ALL)) < 60  # the bad ones are spread
