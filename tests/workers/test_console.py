"""What goes to which stream, and in which form."""

from __future__ import annotations

import io
import json

import pytest
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from workers.console import Output, one_line, visible


class Thing(BaseModel):
    name: str


def test_data_is_on_standard_output_and_everything_else_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe gets data alone, and plain: no colour, no wrapping, no markup taken from the text."""
    output = Output()
    output.say(Text("[bold]long[/] " + "word " * 100, "green"))
    output.note("noted")
    output.warning("careful")
    output.error("broken")
    with output.working("thinking"), output.progress("sending", 5) as progress:
        progress(1)
    captured = capsys.readouterr()
    assert captured.out == "[bold]long[/] " + "word " * 100 + "\n"
    assert captured.err == "noted\nwarning: careful\nerror: broken\n"


def test_json_is_the_models_own(capsys: pytest.CaptureFixture[str]) -> None:
    """One document, or one a line; models and lists of them; text as it is."""
    output = Output(as_json=True)
    output.data([Thing(name="Muñoz 雨")])
    printed = capsys.readouterr().out
    assert json.loads(printed) == [{"name": "Muñoz 雨"}]
    assert "雨" in printed
    output.data_line(Thing(name="a\nb"))
    assert capsys.readouterr().out == '{"name":"a\\nb"}\n'


def test_text_from_outside_can_not_play_with_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences and overrides of the writing direction are written out, in plain and in styled text."""
    Output().say("a\x1b[2Jb\x07\u202ec\nd")
    Output().say(Text("\x9b31m", "red"))
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\\u202ec\nd\n\\x9b31m\n"
    assert visible("plain ✓") == "plain ✓"
    assert one_line(" a\r\n\tb  c ") == "a b c"


@pytest.mark.parametrize(("width", "whole"), [(100, True), (50, False)])
def test_an_id_in_a_table_can_be_copied_where_there_is_room(width: int, *, whole: bool) -> None:
    """On a terminal: the other columns are folded first, unless nothing would be left of them."""
    output = Output()
    stream = io.StringIO()
    output._out = Console(file=stream, force_terminal=True, width=width, highlight=False, markup=False)
    call = "agent/store/customer-service/customer-24/1/2/0"
    output.table(["CALL", "SINCE", "UNTIL", "WHAT"], [(call, "2026-11-28 09:02", "2026-11-29 09:02", "refund " * 20)])
    assert (call in stream.getvalue()) is whole


def test_a_table_on_a_pipe_is_aligned_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns by spaces, wide letters counted as wide, one line a row."""
    long = "x" * 300
    Output().table(["A", "B"], [("雨", Text("1")), ("two\nlines", long)])
    assert capsys.readouterr().out == f"A          B\n雨         1\ntwo lines  {long}\n"
