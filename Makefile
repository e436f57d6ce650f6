# The words of this repository. `make demo` and `make test` need nothing but Python (3.11 or newer) and git.
PYTHON ?= python3
ENGINE ?= auto
SEEDS ?= 0
GPU_TEST ?=
WORKERS ?= 2
PY := .venv/bin/python
RUN_TESTS := $(PY) -m pytest

.PHONY: help setup environments demo offline-demo test slow families check bench gpu-test lock clean

help:
	@echo "setup     .venv with syncline and vLLM (ENGINE=auto|cpu|cuda, PYTHON=python3)"
	@echo "demo      train the small model with GRPO (SEEDS=\"0 1 2\")"
	@echo "offline-demo  train it offline: collect, prefer, DPO, evaluate, in two rounds"
	@echo "test      the tests that need no GPU, real vLLM included; CI runs them (WORKERS=2)"
	@echo "slow      the tests that \`test\` leaves out: more of a kind of which it runs a few"
	@echo "families  every model family's parity, learner against a real engine"
	@echo "check     ruff, pyright, import-linter, unit and contract tests"
	@echo "gpu-test  the tests for NVIDIA GPUs, spread over those here (GPU_TEST=\"--jobs shared\")"
	@echo "bench     the benchmarks there are"
	@echo "lock      resolve requirements/*.txt again"
	@echo "clean     delete .venv and caches; runs/ stays"

setup:
	@$(PYTHON) scripts/setup.py --engine $(ENGINE)

# The adapters' tests show them with the real libraries; one of these is compiled.
environments:
	@$(PYTHON) scripts/setup.py --engine $(ENGINE) --environments

# Neither asks a model hub for anything.
demo offline-demo test slow families check gpu-test: export HF_HUB_OFFLINE = 1
demo offline-demo test slow families check gpu-test: export VLLM_NO_USAGE_STATS = 1
# Threads that wait sleep: a spinning one slows whatever shares its core.
demo offline-demo test slow families: export OMP_WAIT_POLICY = PASSIVE

demo: setup
	$(PY) recipes/demo/run.py --seeds $(SEEDS)

# TRL is among the environments' libraries.
offline-demo: environments
	$(PY) recipes/demo/offline.py

test: environments
	$(RUN_TESTS) -m "not gpu and not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: environments
	$(RUN_TESTS) -m "slow and not gpu"

families: setup
	$(RUN_TESTS) tests/e2e/test_families.py

check: environments
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright
	.venv/bin/lint-imports
	$(RUN_TESTS) -q -m "not gpu and not e2e" tests/unit tests/contracts

gpu-test: setup
	$(PY) tests/on_gpus.py $(GPU_TEST)

bench:
	@for file in $$(grep -l __main__ benchmarks/*.py 2>/dev/null); do \
		echo "$(PY) $$file"; echo "    $$(sed -n '1s/"""//gp' $$file)"; \
	done

lock:
	@$(PYTHON) scripts/setup.py --lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests recipes scripts -name __pycache__ -prune -exec rm -rf {} +
