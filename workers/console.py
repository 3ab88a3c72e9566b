"""What the command prints: tables and colour on a terminal, plain lines when piped, or JSON.

    output = Output(as_json=False)
    output.table(["AGENT", "STATE"], [["store/logistics/order-42", Text("active", "green")]])
    with output.working("waiting for the reply"): ...

Data goes to standard output; notes, progress and errors go to standard error. `NO_COLOR` is respected (by rich).
Text from outside (events, replies) is shown with its control characters made visible, so that it can't play tricks
with the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pydantic_core import to_json
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

Cell = str | Text

# C0 and C1 controls and the overrides of writing direction; tab and line feed are left alone.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Output:
    """Where a command prints. `as_json`: data is printed as JSON, and nothing else goes to standard output."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, markup=False, emoji=False)
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False)

    def data(self, value: object) -> None:
        """One JSON document: pydantic models, dataclasses, and lists and dicts of them."""
        self._out.file.write(to_json(value, indent=2).decode() + "\n")

    def data_line(self, value: object) -> None:
        """One JSON document on a line of its own, at once: for what goes on and on."""
        self._out.file.write(to_json(value).decode() + "\n")
        self._out.file.flush()

    def say(self, text: Cell = "") -> None:
        """A line of data for people; long ones are left to the terminal to wrap."""
        self._out.print(_shown(text), soft_wrap=True)

    def say_on(self, text: str) -> None:
        """More of a line of data, at once."""
        self._out.print(_shown(text), soft_wrap=True, end="")
        self._out.file.flush()

    def note(self, text: Cell) -> None:
        """A remark that is not data."""
        self._err.print(_shown(text), soft_wrap=True)

    def error(self, text: str) -> None:
        """What went wrong."""
        self._err.print(Text("error: ", "bold red") + _shown(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """What may go wrong."""
        self._err.print(Text("warning: ", "yellow") + _shown(text), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Rows under headings; on a pipe, columns are aligned by spaces and never cut."""
        if self._out.is_terminal:
            table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for column in table.columns:
                column.overflow = "fold"
            widest = max(cell_len(_one_line(line[0]).plain) for line in [columns, *rows])
            table.columns[0].no_wrap = widest <= self._out.width // 2  # an id is to be copied; else it is folded too
            for row in rows:
                table.add_row(*(_one_line(cell) for cell in row))
            self._out.print(table)
            return
        lines = [list(columns), *([_one_line(cell).plain for cell in row] for row in rows)]
        widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
            self._out.file.write("  ".join(padded).rstrip() + "\n")

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[str], None]]:
        """A spinner on a terminal; on a pipe, nothing. Call what it gives to change the text."""
        if not self._err.is_terminal:
            yield lambda _: None
            return
        with self._err.status(Text(what)) as status:
            yield lambda text: status.update(Text(text))

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """As `progress`, where the total is found out on the way. Call what it gives with what is done, of how many."""
        if not self._err.is_terminal:
            yield lambda _done, _of: None
            return
        with Progress(console=self._err, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar on a terminal; on a pipe, nothing. Call what it gives with the number that is done."""
        if not self._err.is_terminal or total <= 1:
            yield lambda _: None
            return
        with Progress(console=self._err, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)


def visible(text: str) -> str:
    r"""The text with its control characters written out, as in `\x1b`."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The text in one line: whitespace of any kind and length becomes one space."""
    return " ".join(text.split())


def _shown(text: Cell) -> Text:
    if isinstance(text, str):
        return Text(visible(text))
    if _CONTROLS.search(text.plain):
        return Text(visible(text.plain), text.style)
    return text


def _one_line(cell: Cell) -> Text:
    if isinstance(cell, Text):
        return cell if "\n" not in cell.plain else Text(one_line(cell.plain), cell.style)
    return Text(one_line(visible(cell)))
