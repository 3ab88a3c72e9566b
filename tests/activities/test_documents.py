"""YAML files that people write: faults are named with their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from activities.documents import DocumentError, read


class Part(BaseModel, extra="forbid"):
    size: int


class Whole(BaseModel):
    parts: list[Part] = []


def written(folder: Path, text: str) -> Path:
    path = folder / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """The content comes as a model; the document knows where each field stands."""
    path = written(tmp_path, "parts:\n  - size: 1\n  - size: 2\n")
    whole, document = read(path, Whole)
    assert whole == Whole(parts=[Part(size=1), Part(size=2)])
    assert document.place("parts", 1, "size") == f"{path}:3: parts.1.size"
    assert document.place("parts", 7) == f"{path}:2: parts.7"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("parts:\n  - size: 1\n  - size: big\n", ":3: parts.1.size: Input should be a valid integer"),
        ("parts:\n  - size: 1\n    colour: red\n", ":3: parts.0.colour: Extra inputs"),
        ("parts:\n  - {}\n", ":2: parts.0.size: Field required"),
        ("parts: [\n", ":2: not valid YAML"),
        ("parts: [1]\nother: {]\n", ":2: not valid YAML"),
        ("- 1\n", ":1: the file: Input should be a valid dictionary"),
        ("", ":1: the file: Input should be a valid dictionary"),
        ("parts: \x07\n", ": not valid YAML"),
    ],
)
def test_a_fault_is_named_with_file_line_and_field(tmp_path: Path, text: str, place: str) -> None:
    """P14: what was wrong and where."""
    path = written(tmp_path, text)
    with pytest.raises(DocumentError) as refused:
        read(path, Whole)
    assert f"{path}{place}" in str(refused.value)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    """Nobody likes to mend a file one error at a time."""
    with pytest.raises(DocumentError) as refused:
        read(written(tmp_path, "parts:\n  - size: x\n  - size: y\n"), Whole)
    assert len(str(refused.value).splitlines()) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, a folder, or not UTF-8."""
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(b"parts: \xff")
    for path in (tmp_path / "none.yaml", tmp_path, broken):
        with pytest.raises(DocumentError, match="cannot be read"):
            read(path, Whole)
