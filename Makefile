# Thin targets over the s4gan command; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo drill soak bench bench-storage s3 submit status logs cancel pull image run-local push deploy test test-slow test-container lint lock clean

DOCKER ?= docker
IMAGE  ?= s4gan:latest

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

bench: setup ## how long an iteration takes, ours and a plain one by turns; on the GPU if there is one
	$(BIN)/python -m scripts.bench
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python -m scripts.bench_parts
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python -m scripts.bench_shares

bench-storage: setup ## what a save costs, and how fast data arrive (10 GB of disk; S5CMD=, AWS=)
	$(BIN)/python scripts/bench_save.py --folder demo/bench
	$(BIN)/python scripts/bench_transfer.py --folder demo $(if $(S5CMD),--s5cmd $(S5CMD)) $(if $(AWS),--aws $(AWS))

s3: setup ## a local S3 server to try things with; Ctrl-C ends it
	$(BIN)/python scripts/local_s3.py

submit: setup ## train on AWS Batch: make submit CONFIG=guide DATA=s3://... RUN=s3://... [ARGS="--seeds 5"]
	@test -n "$(DATA)" -a -n "$(RUN)" || { echo "error: say what: make submit DATA=s3://BUCKET/data/NAME RUN=s3://BUCKET/runs/NAME"; exit 2; }
	$(BIN)/s4gan submit --config "$(or $(CONFIG),guide)" --data "$(DATA)" --run "$(RUN)" $(ARGS)

status: setup ## how runs are: make status [RUN=s3://...]
	$(BIN)/s4gan status $(if $(RUN),"$(RUN)") $(ARGS)

logs: setup ## a run's output, as it is written: make logs RUN=s3://...
	@test -n "$(RUN)" || { echo "error: say which: make logs RUN=s3://BUCKET/runs/NAME"; exit 2; }
	$(BIN)/s4gan logs "$(RUN)" --follow

cancel: setup ## stop a run; it saves first: make cancel RUN=s3://...
	@test -n "$(RUN)" || { echo "error: say which: make cancel RUN=s3://BUCKET/runs/NAME"; exit 2; }
	$(BIN)/s4gan cancel "$(RUN)"

pull: setup ## bring a run's files here: make pull RUN=s3://... [DIR=folder]
	@test -n "$(RUN)" || { echo "error: say which: make pull RUN=s3://BUCKET/runs/NAME"; exit 2; }
	$(BIN)/s4gan pull "$(RUN)" "$(or $(DIR),pulled)"

image: ## build the container image (IMAGE=name:tag, BASE_IMAGE= for another base)
	DOCKER_BUILDKIT=1 $(DOCKER) build -f docker/Dockerfile -t $(IMAGE) $(BUILD_OPTIONS) \
	  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	  --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py) \
	  --build-arg GIT_SHA=$$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown) \
	  --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) .

run-local: ## run the image here: make run-local ARGS="train --config demo --data demo/data --run demo/run"
	@IMAGE=$(IMAGE) DOCKER=$(DOCKER) scripts/run_local.sh $(ARGS)

push: setup ## put the image into the stack's repository
	$(BIN)/s4gan infra push --image $(IMAGE) --docker $(DOCKER)

deploy: setup ## make or change the AWS stack (ARGS="--parameter AlarmEmail=you@example.org")
	$(BIN)/s4gan infra deploy $(ARGS)

test: setup ## the test suite, but for the slow ones and the container's
	$(BIN)/pytest -n 2 --dist worksteal tests --ignore tests/container -m "not slow"

test-slow: setup ## several ranks, faults of S3, divergence, health of real runs (9 minutes)
	$(BIN)/pytest -n 2 --dist worksteal tests --ignore tests/container -m slow

test-container: setup ## build the image with a real Docker engine and run it (5 minutes, 12 GB of disk)
	$(BIN)/pytest tests/container

lint: setup ## ruff, ruff format, mypy --strict, import-linter, hadolint, shellcheck, the stack
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/s4gan infra validate
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/*.sh scripts/*.sh .ci/run

lock: ## resolve requirements.lock anew (needs uv)
	uv pip compile --universal --generate-hashes --python-version 3.11 --all-extras --no-header --quiet \
	  --upgrade pyproject.toml -o requirements.lock
	uv pip compile --universal --generate-hashes --python-version 3.11 --extra timm --no-header --quiet \
	  --constraints requirements.lock pyproject.toml -o docker/requirements.lock

clean: ## remove the environment and the demo's data and run
	rm -rf $(VENV) demo build *.egg-info
