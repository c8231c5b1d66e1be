# `make demo` and `make test` do all the set-up themselves, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# CPU threads of benchmarks and tests are torch's default: all cores.
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint setup benchmark wheel clean

demo: $(VENV)/.demo
	$(BIN)/cachedit demo --out demo

test: setup
	$(BIN)/python -m pytest -q -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: setup
	$(BIN)/python benchmarks/bench_residual.py --device cpu --mb 1 64
	$(BIN)/python benchmarks/bench_forecast.py --device cpu --mb 1 64
	$(BIN)/python benchmarks/bench_ulysses.py --device cpu
	$(BIN)/python benchmarks/bench_attention.py --device cpu
	$(BIN)/python benchmarks/bench_engine.py
	$(BIN)/python benchmarks/bench_compile.py
	$(BIN)/python benchmarks/bench_policies.py --rounds 3
	$(BIN)/python benchmarks/bench_pipelines.py --tiny --device cpu

# The wheel, in dist/, and what is in it. Without nvcc it is a wheel for CPUs, which the check says and refuses.
wheel: setup
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	$(BIN)/python tools/check_wheel.py dist/*.whl

setup: $(READY)

# torch is pinned: a newer one brings several GB of CUDA packages to machines that need none of them.
$(VENV)/.demo: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0 "setuptools>=77" "cmake>=3.24" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[demo]"
	touch $@

$(READY): $(VENV)/.demo
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info cachedit_kernels/*.so
