"""The demo's printer does what its pages say, and never anything worse."""

from __future__ import annotations

import pytest

from activities.demo_printer import print_test_page


def test_a_page_becomes_what_it_says() -> None:
    """One that is jammed never comes: tests/integration/test_bad_input.py has that on the whole stack."""
    assert print_test_page("fine") == {"page": "fine", "printed": True}
    assert len(print_test_page("endless")) == 1_000_000
    assert isinstance(print_test_page("smudged"), bytes)
    with pytest.raises(ConnectionError, match="torn"):
        print_test_page("torn")
