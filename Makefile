# The product in two commands: `make demo` and `make test`. Each target makes its own virtual environment.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

MINUTES ?= 10

.PHONY: demo dev test test-kafka soak check format history clean

demo: $(READY)   ## the main job on an embedded stack, in under a minute
	@$(BIN)/perennial demo $(if $(DEMO_EVENTS),--events "$(DEMO_EVENTS)") $(ARGS)

dev: $(READY)    ## the embedded stack, until Ctrl-C; state is kept in .perennial/
	@$(BIN)/perennial dev $(ARGS)

test: $(READY)   ## all tests, on real servers
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-kafka: $(READY) ## what concerns the broker, on Apache Kafka: needs Java 17 and Maven
	$(BIN)/pytest --broker kafka -n 2 --dist loadfile $(ARGS)

soak: $(READY)   ## random faults for MINUTES=10, repeated by SEED, on BROKER=embedded or kafka; then the oracle
	@$(BIN)/python tests/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(BROKER),--broker $(BROKER))

check: $(READY)  ## format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

history: $(READY) ## record the histories that running agents of today will have; see tests/workflows/test_replay.py
	$(BIN)/python tests/workflows/record_histories.py

clean:           ## remove the virtual environment and the state of the embedded stack
	rm -rf $(VENV) .perennial

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "perennial needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing perennial into $(VENV) (about a minute, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,anthropic,bedrock,google,dev]'
	@touch $@
