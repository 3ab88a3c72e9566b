"""YAML files that people write: read into pydantic models, with errors that name file, line and field.

config, document = read(Path("models.yaml"), ModelsConfig)
document.place("pools", "fast", "model")        # models.yaml:3: pools.fast.model
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Form = TypeVar("Form", bound=BaseModel)


class DocumentError(Exception):
    """A file can't be read or is wrong; the message names the file, and the line and field where there is one."""


@dataclass(frozen=True)
class Document:
    """A YAML file that has been read, to say where in it something stands."""

    path: Path
    root: yaml.Node | None

    def place(self, *field: int | str) -> str:
        """Where a field stands: `file:line: dotted.field`; the line is of the innermost part that is there."""
        node, line = self.root, self.root.start_mark.line if self.root else 0
        for part in field:
            node = dict(_children(node)).get(part)
            if node is None:
                break
            line = node.start_mark.line
        return f"{self.path}:{line + 1}: {'.'.join(map(str, field)) or 'the file'}"


def files(folder: Path) -> list[Path]:
    """The YAML files in a folder, in the order of their names."""
    return sorted((*folder.glob("*.yaml"), *folder.glob("*.yml")))


def read(path: Path, form: type[Form]) -> tuple[Form, Document]:
    """Read a YAML file into a model.

    Raises:
        DocumentError: the file can't be read, is not YAML, or a field is wrong; all wrong fields are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = Document(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DocumentError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise DocumentError(f"{path}: not valid YAML: {error}") from error
    try:
        return form.model_validate(content), document
    except ValidationError as error:
        faults = [f"{document.place(*_field(fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise DocumentError("\n".join(faults)) from error


def _field(place: tuple[int | str, ...]) -> Iterator[int | str]:
    """The parts that people wrote: where a field may be one of several kinds, pydantic puts the kind's tag in."""
    return (part for part in place if not (isinstance(part, str) and part.startswith("<")))


def _children(node: yaml.Node | None) -> Iterator[tuple[Any, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key.value, value
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)
