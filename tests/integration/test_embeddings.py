"""Facts recalled by what they mean, on the real stack: models.yaml, both workers, the command; and without a server."""

from __future__ import annotations

import json
from pathlib import Path

from stack import PERENNIAL, Stack, run
from traffic import letter, workflow_of

from activities.entries import MemoryMessage
from activities.ledger import Ledger
from workers.ports import free_port
from workers.rehearsal import serving
from workers.rehearsal_rules import Rules

_SPEC = """
name: customer-service
tenant: store
instructions: You answer customers.
memory: {}
"""
_MODELS = """
pools:
  rehearsal: {{model: "openai-chat:rehearsal", base_url: {model}}}
embeddings: {{model: "openai:rehearsal", base_url: "{vectors}", similarity: 0.15}}
"""
AGENT = workflow_of("customer-1")
UMBRELLA = "Sonnenschirm!"


async def tell(stack: Stack, text: str) -> None:
    await stack.send(letter("customer-1", text))
    await stack.all_answered()


async def reminded(ledger: Ledger) -> set[str]:
    """Of which facts the agent was reminded in its last turn."""
    (newest,) = await ledger.transcript(AGENT, limit=1)
    first, *_ = await ledger.of_turn(AGENT, newest.turn)
    return {fact.text for message in first.messages if isinstance(message, MemoryMessage) for fact in message.facts}


async def test_a_fact_is_recalled_by_what_it_means_and_without_the_server_by_its_words(tmp_path: Path) -> None:
    """Remembered while no server makes vectors, it is found by words; when there is one, by its meaning too."""
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "desk.yaml").write_text(_SPEC)
    models = tmp_path / "models.yaml"
    port = free_port()
    async with serving(Rules()) as model:
        models.write_text(_MODELS.format(model=model, vectors=f"http://127.0.0.1:{port}/v1"))
        variables = {"PERENNIAL_MODELS": str(models)}
        state = tmp_path / "state"
        async with Stack(state, specs=specs, rehearse=False, variables=variables) as stack, stack.ledger() as ledger:
            await tell(stack, f"[[call remember {json.dumps({'text': UMBRELLA, 'scope': 'key'})}]]")
            await tell(stack, "[[say Fine.]] A Sonnenschirm, please.")
            assert await reminded(ledger) == {UMBRELLA}
            await tell(stack, "[[say Fine.]] Schirme")
            assert await reminded(ledger) == set()
        async with (
            serving(Rules(), port=port),
            Stack(state, specs=specs, rehearse=False, variables=variables) as stack,
            stack.ledger() as ledger,
        ):
            await tell(stack, "[[say Fine.]] Schirme")
            assert await reminded(ledger) == {UMBRELLA}
            told = await run(
                *(str(PERENNIAL), "memory", "store/customer-service/customer-1", "--query", "Schirme", "--json"),
                cwd=Path.cwd(),
                variables={"PERENNIAL_STATE_DIR": str(state), "PERENNIAL_SPECS": str(specs), **variables},
                seconds=90,
            )
            assert [one["fact"]["text"] for one in told.json] == [UMBRELLA]
