"""Free ports: the usual ones where they can be had, none twice, none that a connection could be given."""

from __future__ import annotations

import socket

from workers.ports import HOST, free_port, free_ports


def test_the_usual_one_is_preferred_and_none_is_given_twice() -> None:
    """The usual port when it is free; else one ten above, so that two stacks side by side are easy to tell apart."""
    with socket.create_server((HOST, 0)) as held:
        taken = held.getsockname()[1]
        chosen = free_ports({"a": taken, "b": taken, "c": 0})
    assert len({taken, *chosen.values()}) == 4
    assert (chosen["a"] - taken) % 10 == 0
    assert free_ports({"a": chosen["c"]}) == {"a": chosen["c"]}


def test_a_usual_port_that_is_another_s_is_left_alone() -> None:
    """It may be free because the process it belongs to is just being started again."""
    usual = free_port()
    asked: list[int] = []

    def claim(port: int) -> bool:
        asked.append(port)
        return len(asked) > 2

    assert free_ports({"a": usual}, claim) == {"a": asked[-1]}
    assert asked[:2] == [usual, usual + 10]


def test_no_connection_is_made_from_a_port_that_is_given() -> None:
    """Else a client that tries to reach a server which is down could be given its port, and talk to itself."""
    given = free_ports(dict.fromkeys(map(str, range(200)), 0)).values()
    assert max(given) < 32_768, "from there on, by Linux's default"
