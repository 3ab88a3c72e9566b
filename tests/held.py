"""Hold a process in the middle of writing to a SQLite ledger: in that millisecond a test can kill it.

    hold_inserts(database, "snapshots", ends=False)  # whoever inserts there now counts for ever, in its transaction
    await eventually(lambda: is_written(database))
    stack.kill(AGENT)
    await eventually(lambda: not is_written(database))
    let_go(database)

The connection is in autocommit mode (`isolation_level=None`).
"""

from __future__ import annotations

import sqlite3

_FOR_EVER = 10**11
_A_WHILE = 8 * 10**6  # some seconds of one core


def hold_inserts(database: sqlite3.Connection, table: str, *, ends: bool) -> None:
    """Have SQLite count at each insert into a table, for ever or, where it `ends`, for some seconds."""
    end = _A_WHILE if ends else _FOR_EVER
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {end}) SELECT max(i) FROM n"
    database.execute(f"CREATE TRIGGER hold AFTER INSERT ON {table} BEGIN SELECT ({numbers}); END")


def let_go(database: sqlite3.Connection) -> None:
    """Hold nobody any more."""
    database.execute("DROP TRIGGER hold")


def is_written(database: sqlite3.Connection) -> bool:
    """Whether somebody is in the middle of writing to the database, and takes his time."""
    try:
        database.execute("PRAGMA busy_timeout = 200").execute("BEGIN IMMEDIATE").execute("ROLLBACK")
    except sqlite3.OperationalError:
        return True
    return False
