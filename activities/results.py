"""Long results: what a tool returned that is too long to be shown is kept whole, and the agent reads on in it.

    results = Results(ledger)
    shown = await results.fit(workflow_id, text, limit=32_768)      # with a note that says how to read the rest
    await results.read(workflow_id, '{"id": "ab12...", "offset": 32000}', limit=32_768)

Every agent that has tools is offered `read_result` beside them, whether or not a result was long yet: a set of tools
that changes in mid-conversation would make providers forget what they have cached of it.
"""

from __future__ import annotations

import logging

from pydantic import BaseModel, Field, ValidationError
from temporalio.exceptions import ApplicationError

from activities.ledger import Ledger
from workflows import names
from workflows.spec import ToolDefinition

log = logging.getLogger(__name__)

_KEPT_BYTES = 16 * 1024 * 1024
_NOTE_BYTES = 300  # room for the note below a part
_ID_CHARACTERS = 16  # of the digest: enough to be told apart, and little for a model to copy


class ReadArguments(BaseModel):
    """What the model says to read on."""

    id: str = Field(description="The result's id, as its note gives it.")
    offset: int = Field(0, ge=0, description="The first character to show, counted from 0.")


READ_RESULT = ToolDefinition(
    name=names.READ_RESULT,
    description=(
        "Read on in the result of an earlier tool call that was too long to be shown whole. "
        "The note at its end gives the id and the offset."
    ),
    parameters=ReadArguments.model_json_schema(),
)


class Results:
    """The long results of all agents; each tenant's are its own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def fit(self, workflow_id: str, text: str, limit: int) -> str:
        """The text if it fits into `limit` bytes; else its beginning, and a note. Never raises: the call was made."""
        if len(text) <= limit and len(text.encode()) <= limit:
            return text
        kept = _beginning(text, _KEPT_BYTES)
        gone = f" Beyond {len(kept)} characters it was not kept." if len(kept) < len(text) else ""
        shown = _beginning(kept, limit - _NOTE_BYTES)
        so_far = f"the first {len(shown)} of {len(text)} characters"
        try:
            digest = await self._ledger.put_result(names.parse_workflow_id(workflow_id).tenant, kept)
        except ApplicationError as error:
            log.warning("%s: a long result could not be kept: %s", workflow_id, error.message)
            return f"{shown}\n[Shortened: {so_far}. The rest could not be kept.]"
        return f"{shown}\n[Shortened: {so_far}. To read on: {_call(digest[:_ID_CHARACTERS], len(shown))}.{gone}]"

    async def read(self, workflow_id: str, arguments: str, limit: int) -> str:
        """A part of a kept result, and a note that says how to go on.

        Raises:
            ValueError: the arguments are wrong, or there is no such result; the model is told.
        """
        try:
            wanted = ReadArguments.model_validate_json(arguments or "{}")
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise ValueError(f"Wrong arguments: {faults}") from None
        text = await self._ledger.get_result(names.parse_workflow_id(workflow_id).tenant, wanted.id)
        if text is None:
            raise ValueError(f"There is no result {wanted.id!r}. Use the id that stands at the end of a shortened one.")
        if wanted.offset >= len(text):
            raise ValueError(f"The result has {len(text)} characters; offset {wanted.offset} is beyond its end.")
        part = _beginning(text[wanted.offset : wanted.offset + limit], limit - _NOTE_BYTES)
        end = wanted.offset + len(part)
        place = f"Characters {wanted.offset} to {end} of {len(text)}."
        on = f"To read on: {_call(wanted.id, end)}." if end < len(text) else "This is the end."
        return f"{part}\n[{place} {on}]"


def _call(name: str, offset: int) -> str:
    return f'{names.READ_RESULT}(id="{name}", offset={offset})'


def _beginning(text: str, limit: int) -> str:
    """As much of the text as fits into `limit` bytes of UTF-8, and no half characters."""
    return text[:limit].encode()[:limit].decode(errors="ignore")
