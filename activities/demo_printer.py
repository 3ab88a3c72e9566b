"""The printer of the demo's warehouse, a tool that does all that tools do wrong; see README, "What bad input gets".

It breaks, hangs, and returns what is too long or no JSON, as the page says that it is asked for.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any, Literal

from pydantic import Field

_ENDLESS_LINES = 100_000  # of ten characters: a megabyte

Page = Literal["fine", "torn", "jammed", "endless", "smudged"]


def print_test_page(page: Annotated[Page, Field(description="What is to become of it.")]) -> Any:
    """Print a test page in the warehouse.

    Raises:
        ConnectionError: it is torn.
    """
    match page:
        case "torn":
            raise ConnectionError("the printer has torn the page and switched itself off")
        case "jammed":
            threading.Event().wait()
        case "endless":
            return "".join(f"{line:09d}\n" for line in range(_ENDLESS_LINES))
        case "smudged":
            return b"\xff\xfe\x00"
    return {"page": page, "printed": True}
