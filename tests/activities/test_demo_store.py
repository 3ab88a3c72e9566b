"""The demo's store: its tools do a thing once, say what they refuse, and keep customers apart."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from temporalio.testing import ActivityEnvironment

from activities.demo_store import (
    DATABASE,
    Order,
    Refund,
    effects,
    flag_shipment,
    list_orders,
    lock_account,
    look_up_order,
    recent_logins,
    refund,
    send_text_message,
)
from activities.ledger import Ledger
from activities.mcp_servers import Servers
from activities.tools import ToolCallContext, Tools, call_context, load_tool
from workflows.messages import ToolCall, ToolOutcome, ToolRequest, ToolResult

REPOSITORY = Path(__file__).parents[2]
ANYBODY = "agent/store/back-office/me"

PROCESS = """
import os, signal, sys
from pathlib import Path
from activities import demo_store
from activities.tools import ToolCallContext, call_context
workspace, key = Path(sys.argv[1]), sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
with call_context(ToolCallContext(key, workspace, "agent/store/customer-service/customer-04", 1)):
"""


def calling(workspace: Path, *, workflow_id: str = ANYBODY, key: str = "call-1") -> AbstractContextManager[None]:
    """As if this agent had made this call."""
    return call_context(ToolCallContext(key, workspace, workflow_id, turn=1))


def order(workspace: Path, order_id: str) -> Order:
    with calling(workspace):
        return look_up_order(order_id)


def process(workspace: Path, code: str, key: str = "call-1") -> subprocess.Popen[str]:
    """Another process that makes a call on the same workspace."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS + body, str(workspace), key],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_store_is_filled_on_first_use_and_always_with_the_same(tmp_path: Path) -> None:
    """Events name customers and orders of this data: 40 and 60 of them, whose sums are those of their items."""
    seen = []
    for workspace in (tmp_path / "new" / "one", tmp_path / "two"):
        with calling(workspace):
            orders = [found for n in range(1, 41) for found in list_orders(f"customer-{n:02}")]
            full = [look_up_order(f"order-{1001 + n}") for n in range(60)]
        assert {found.order_id for found in orders} == {found.order_id for found in full}
        assert all(sum(item.price_cents * item.quantity for item in one.items) == one.paid_cents for one in full)
        seen.append(full)
    assert seen[0] == seen[1]
    assert {one.status for one in seen[0]} == {"placed", "packed", "shipped", "delayed", "lost", "delivered"}
    assert all((one.days_late == 0) >= (one.status == "delivered") for one in seen[0])
    assert seen[0][1].days_late == 12
    assert all((one.carrier is None) == (one.status in {"placed", "packed"}) for one in seen[0])
    with closing(sqlite3.connect(tmp_path / "two" / DATABASE)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert dict(database.execute("SELECT lang, count(*) FROM customers GROUP BY lang")) == {
            "en": 15,
            "fr": 13,
            "es": 12,
        }


def test_an_order_shows_what_was_done_about_it(tmp_path: Path) -> None:
    """Refunds are summed, and problems listed, as the instructions say."""
    with calling(tmp_path, key="a"):
        refund("order-1004", 1000, "A part of it.")
    with calling(tmp_path, key="b"):
        refund("order-1004", 250, "Another part.")
    with calling(tmp_path, key="c"):
        assert flag_shipment("order-1004", "lost", "UPS gave up").case_id == "order-1004/1"
    with calling(tmp_path, key="d"):
        assert flag_shipment("order-1004", "other").case_id == "order-1004/2"
    found = order(tmp_path, "order-1004")
    assert (found.refunded_cents, found.problems) == (1250, ["lost: UPS gave up", "other: -"])


def test_a_refund_made_again_with_its_key_returns_the_first_result(tmp_path: Path) -> None:
    """P9: a retry changes nothing, also when its arguments or the order have changed in between."""
    with calling(tmp_path, key="a"):
        first = refund("order-1004", 18900, "Lost.")
        assert (
            refund("order-1004", 18900, "Lost.")
            == first
            == Refund(order_id="order-1004", refunded_cents=18900, left_cents=0)
        )
    assert order(tmp_path, "order-1004").refunded_cents == 18900
    (effect,) = effects(tmp_path / DATABASE)
    assert (effect.key, effect.kind, effect.order_id, effect.customer_id, effect.amount_cents) == (
        "a",
        "refund",
        "order-1004",
        "customer-04",
        18900,
    )
    assert Refund.model_validate_json(effect.result) == first


def test_no_more_is_refunded_than_was_paid(tmp_path: Path) -> None:
    """Not at once, and not in parts; the message says how much is left, and nothing is recorded."""
    with calling(tmp_path, key="a"), pytest.raises(ValueError, match=r"18900 were paid and 0 .* so 18900 are left"):
        refund("order-1004", 18901, "Too much.")
    with calling(tmp_path, key="b"):
        refund("order-1004", 18000, "Most of it.")
    with calling(tmp_path, key="c"), pytest.raises(ValueError, match="so 900 are left"):
        refund("order-1004", 901, "A cent too much.")
    assert len(effects(tmp_path / DATABASE)) == 1


def test_the_other_effects_are_made_once_as_well(tmp_path: Path) -> None:
    """The same key, the same result; an account that is locked stays locked for the first reason."""
    with calling(tmp_path, key="flag"):
        assert flag_shipment("order-1010", "lost") == flag_shipment("order-1010", "lost")
    with calling(tmp_path, key="lock"):
        lock = lock_account("customer-03", "Logins from afar.")
        assert lock_account("customer-03", "Logins from afar.") == lock
    with calling(tmp_path, key="lock again"):
        assert lock_account("customer-03", "Once more.") == lock
    with calling(tmp_path, key="text"):
        send_text_message("customer-03", "Tu cuenta está bloqueada.")
        with pytest.raises(sqlite3.IntegrityError):  # it is not repeatable: the runtime never makes it again
            send_text_message("customer-03", "Tu cuenta está bloqueada.")
    assert Counter(effect.kind for effect in effects(tmp_path / DATABASE)) == {
        "flag_shipment": 1,
        "lock_account": 1,
        "send_text_message": 1,
    }


def test_logins_show_the_stranger_who_got_in(tmp_path: Path) -> None:
    """Newest first: four failures from afar and a success, after weeks of the customer's own; or only the latter."""
    with calling(tmp_path):
        logins = recent_logins("customer-03")
        assert [login.succeeded for login in logins[:5]] == [True, False, False, False, False]
        assert {login.place for login in logins[:5]} == {"Lagos, Nigeria"}
        assert {login.place for login in logins[5:]} == {"Granada"}
        assert [login.at for login in logins] == sorted((login.at for login in logins), reverse=True)
        assert {login.place for login in recent_logins("customer-01")} == {"Leeds"}


@pytest.mark.parametrize(
    ("agent", "allowed", "refused"),
    [
        ("customer-service/customer-09", "order-1009", "order-1023"),
        ("customer-service/customer-09", "order-1049", "order-9999"),
        ("logistics/order-1009", "order-1009", "order-1049"),
    ],
)
def test_an_agent_reaches_only_its_own_orders(tmp_path: Path, agent: str, allowed: str, refused: str) -> None:
    """Whatever a message talks it into; whether the other order exists is not said."""
    with calling(tmp_path, workflow_id=f"agent/store/{agent}"):
        assert look_up_order(allowed).order_id == allowed
        key = agent.partition("/")[2]
        for attempt in (
            lambda: look_up_order(refused),
            lambda: refund(refused, 1, "Please."),
            lambda: flag_shipment(refused, "late"),
        ):
            with pytest.raises(ValueError, match=f"^{key} has no order '{refused}'"):
                attempt()
    assert effects(tmp_path / DATABASE) == []


def test_an_agent_reaches_only_its_own_customer(tmp_path: Path) -> None:
    """Also for logins and locks; an unknown customer is said to be unknown to those who serve all."""
    with calling(tmp_path, workflow_id="agent/store/security/customer-09"):
        assert list_orders("customer-09")
        for attempt in (
            lambda: list_orders("customer-08"),
            lambda: recent_logins("customer-08"),
            lambda: lock_account("customer-08", "Please."),
            lambda: send_text_message("customer-08", "Hello."),
        ):
            with pytest.raises(ValueError, match="You serve customer-09"):
                attempt()
    with calling(tmp_path), pytest.raises(ValueError, match="There is no customer 'customer-99'"):
        list_orders("customer-99")


def test_effects_of_a_store_that_was_never_used(tmp_path: Path) -> None:
    """Nothing was done; and counting makes no database."""
    assert effects(tmp_path / DATABASE) == []
    assert list(tmp_path.iterdir()) == []


def test_many_processes_may_begin_at_once(tmp_path: Path) -> None:
    """They make one database; each call's effect is there once, although each was made by two processes."""
    workspace = tmp_path / "tools"
    code = "print('ready', flush=True)\nsys.stdin.readline()\nfor _ in range(5):\n"
    code += "    print(demo_store.refund('order-1004', 100, 'Together.').left_cents)"
    started = [process(workspace, code, key=f"call-{number // 2}") for number in range(8)]
    for one in started:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in started:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = [one.communicate(timeout=60)[0].split() for one in started]
    assert [one.returncode for one in started] == [0] * 8
    assert all(len(answer) == 5 and len(set(answer)) == 1 for answer in answers)
    assert sorted({answer[0] for answer in answers}) == ["18500", "18600", "18700", "18800"]
    assert sorted(effect.key for effect in effects(workspace / DATABASE)) == [f"call-{n}" for n in range(4)]
    assert order(workspace, "order-1004").refunded_cents == 400
    assert [path.name for path in workspace.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("moment", "made"),
    [
        ("demo_store._fill = die", None),
        ("demo_store.os.link = die", None),
        ("demo_store._record = die", 0),
        ("record = demo_store._record\ndemo_store._record = lambda *row: (record(*row), die())", 0),
        ("demo_store.refund('order-1004', 18900, 'Lost.')\ndie()", 1),
    ],
    ids=["while it is filled", "before it has its name", "before the effect", "before the commit", "after the commit"],
)
def test_a_process_killed_at_any_moment_leaves_the_store_whole(tmp_path: Path, moment: str, made: int | None) -> None:
    """P6, P9: kill -9 of the worker; the call that is made again has its effect, once."""
    killed = process(tmp_path, f"{moment}\ndemo_store.refund('order-1004', 18900, 'Lost.')", key="a")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / DATABASE).exists() == (made is not None)
    assert len(effects(tmp_path / DATABASE)) == (made or 0)
    with calling(tmp_path, key="a"):
        assert refund("order-1004", 18900, "Lost.").left_cents == 0
    assert [effect.amount_cents for effect in effects(tmp_path / DATABASE)] == [18900]


async def run(workspace: Path, name: str, arguments: str) -> ToolResult:
    """Have a tool run as the agent worker runs it."""
    tool = load_tool(f"activities.demo_store:{name}")
    request = ToolRequest(
        workflow_id="agent/store/customer-service/customer-04",
        turn=1,
        call=ToolCall(id="c1", name=name, arguments=arguments),
        spec_digest="",
        idempotency_key="call-1",
    )
    async with Ledger(f"sqlite:///{workspace}/ledger.db") as ledger:
        tools = Tools(lambda _workflow, _name: tool, workspace, ledger, Servers(lambda _: {}))
        return await ActivityEnvironment().run(tools.run_tool, request)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("look_up_order", '{"order_id": "order-1003"}', "customer-04 has no order 'order-1003'"),
        ("look_up_order", "{}", "Wrong arguments: order_id: Field required"),
        (
            "refund",
            '{"order_id": "order-1004", "amount_cents": 0, "reason": "Lost."}',
            "amount_cents: .*greater than 0",
        ),
        ("refund", '{"order_id": "order-1004", "amount_cents": 12.5, "reason": "Lost."}', "amount_cents: .*integer"),
        ("refund", '{"order_id": "order-1004", "amount_cents": 20000, "reason": "Lost."}', "18900 are left"),
        ("flag_shipment", '{"order_id": "order-1004", "problem": "stolen"}', "problem: .*'late'"),
    ],
)
async def test_the_model_is_told_what_was_wrong(tmp_path: Path, name: str, arguments: str, said: str) -> None:
    """P14: a wrong argument or request is a tool error in words; nothing is done."""
    result = await run(tmp_path, name, arguments)
    assert result.outcome is ToolOutcome.ERROR
    assert re.search(said, result.content), result.content
    assert effects(tmp_path / DATABASE) == []


async def test_the_model_is_shown_the_result_as_json(tmp_path: Path) -> None:
    """With every field that the instructions speak of."""
    result = await run(tmp_path, "look_up_order", '{"order_id": "order-1004"}')
    assert result.outcome is ToolOutcome.OK
    found = Order.model_validate_json(result.content)
    assert (found.status, found.carrier, found.paid_cents) == ("lost", "UPS", 18900)
    assert [item.name for item in found.items] == ["Fulmar down sleeping bag -5 °C"]
