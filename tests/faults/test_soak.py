"""The soak (`make soak`), in short: random faults from a seed upon a deployment under mail, and then the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from servers import AnyBroker
from soak import soak

_SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_faults_every_few_seconds_lose_and_repeat_nothing(
    tmp_path: Path, new_broker: Callable[[], AnyBroker]
) -> None:
    """P1 to P6, P9, P14. When this fails, its message says what is wrong and where the traces are."""
    with new_broker() as broker:
        figures = await soak(tmp_path, broker, seed=_SEED, seconds=45 if broker.remembers else 25)
    assert figures.faults.total() > 5
    assert figures.probes
    assert figures.tally
    assert figures.tally.duplicates
    assert figures.tally.dead_letters
