# Thin targets over the s4gan command; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo drill soak bench s3 pull test lint lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## make .venv with the locked dependencies

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: Python's venv module is missing; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup ## train a small S4GAN on the CPU (2 to 4 minutes); Ctrl-C and again resumes
	$(BIN)/python scripts/make_demo_data.py demo/data
	$(BIN)/s4gan train --config demo --data demo/data --run demo/run

drill: setup ## interrupt a run in every way on a local S3 server, compare it with its twin
	$(BIN)/python scripts/make_demo_data.py demo/data
	$(BIN)/s4gan drill --data demo/data --folder demo/drill

soak: setup ## 200 random interruptions and network faults (half an hour)
	$(BIN)/python scripts/make_demo_data.py demo/data
	$(BIN)/python scripts/soak.py --data demo/data --folder demo/soak --interruptions 200

bench: setup ## what a save costs, and how fast data arrive (10 GB of disk; S5CMD=, AWS= to compare)
	$(BIN)/python scripts/bench_save.py --folder demo/bench
	$(BIN)/python scripts/bench_transfer.py --folder demo $(if $(S5CMD),--s5cmd $(S5CMD)) $(if $(AWS),--aws $(AWS))

s3: setup ## a local S3 server to try things with; Ctrl-C ends it
	$(BIN)/python scripts/local_s3.py

pull: setup ## bring a run's files here: make pull RUN=s3://... [DIR=folder]
	@test -n "$(RUN)" || { echo "error: say which: make pull RUN=s3://BUCKET/runs/NAME"; exit 2; }
	$(BIN)/s4gan pull "$(RUN)" "$(or $(DIR),pulled)"

test: setup ## the whole test suite
	$(BIN)/pytest -n 2 --dist worksteal tests

lint: setup ## ruff, ruff format, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: ## resolve requirements.lock anew (needs uv)
	uv pip compile --universal --generate-hashes --python-version 3.11 --all-extras --no-header --quiet \
	  --upgrade pyproject.toml -o requirements.lock

clean: ## remove the environment and the demo's data and run
	rm -rf $(VENV) demo build *.egg-info
