#!/usr/bin/env bash
# Builds, tests and measures on a machine with one NVIDIA GPU, then says what failed. Needs no network.
#
#     [OUT=folder] [PYTHON=python3] benchmarks/gpu_check.sh [step ...]
#
# Steps: build tests operators pipelines demo (all of them without arguments). Results go to $OUT if set (logs,
# operators.csv, exchange.csv, pipelines.csv, demo/), else the CSVs to benchmarks/results/. A step that fails does not stop the others; the exit status
# is then 1.
set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
steps=${*:-build tests operators pipelines demo}
logs=${OUT:-$(mktemp -d)}
mkdir -p "$logs"
csv=${OUT:+$OUT/operators.csv}
csv=${csv:-benchmarks/results/operators.csv}
exchange=$(dirname "$csv")/exchange.csv
pipelines=$(dirname "$csv")/pipelines.csv
passed=() failed=() skipped=()

step() { # name, command...: runs it, shows and keeps its output
    local name=$1
    shift
    echo "=== $name: $*"
    local start=$SECONDS
    "$@" 2>&1 | tee "$logs/${name// /_}.log"
    if [ "${PIPESTATUS[0]}" -eq 0 ]; then
        passed+=("$name ($((SECONDS - start)) s)")
    else
        failed+=("$name ($((SECONDS - start)) s, see $logs/${name// /_}.log)")
        return 1
    fi
}

wants() { [[ " $steps " == *" $1 "* ]]; }
has() { "$python" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

step environment "$python" -c '
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__)
try:
    import triton; print("triton", triton.__version__)
except ImportError:
    print("no triton")
assert torch.cuda.is_available(), "no CUDA device"
p = torch.cuda.get_device_properties(0)
print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "SMs", p.total_memory >> 30, "GiB")'

if wants build; then
    step build "$python" -m pip install --no-build-isolation --no-deps -e . ||
        echo "not installed: going on with the sources in place, without the C++ operators"
fi
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
step backends "$python" -c '
import cachedit_kernels
for operator, devices in cachedit_kernels.backends().items():
    print(operator, {device: tuple(backend) for device, backend in devices.items()})'

if wants tests; then
    if has pytest; then
        # Without hypothesis only the kernels' own tests can be collected; without pytest-timeout its setting is unknown.
        targets=(tests)
        has hypothesis || targets=(--noconftest tests/cachedit_kernels/*/test_kernel.py)
        lenient=()
        has pytest_timeout || lenient=(-o addopts=--import-mode=importlib)
        step "gpu tests" "$python" -m pytest "${targets[@]}" -m gpu -q -rf --durations=10 \
            --continue-on-collection-errors "${lenient[@]+"${lenient[@]}"}"
    else
        skipped+=("gpu tests (pytest is not installed)")
    fi
fi

if wants operators; then
    for operator in residual forecast; do
        step "$operator benchmark" "$python" "benchmarks/bench_$operator.py" --device cuda --mb 1 16 64 256 --csv "$csv"
        CACHEDIT_KERNELS_BACKEND=cuda step "$operator benchmark, CUDA C++" "$python" "benchmarks/bench_$operator.py" \
            --device cuda --mb 1 16 64 256 --csv "${csv%.csv}-cuda.csv"
    done
    for operator in ulysses attention; do
        step "$operator benchmark" "$python" "benchmarks/bench_$operator.py" --device cuda --csv "$exchange"
        CACHEDIT_KERNELS_BACKEND=cuda step "$operator benchmark, CUDA C++" "$python" "benchmarks/bench_$operator.py" \
            --device cuda --csv "${exchange%.csv}-cuda.csv"
    done
fi

if wants pipelines; then
    if has diffusers; then
        for model in "Wan 2.1 1.3B" Z-Image FLUX.1-dev Qwen-Image; do # a process each: 40 GB of weights in the last one
            step "pipelines benchmark, $model" "$python" benchmarks/bench_pipelines.py --models "$model" --csv "$pipelines"
        done
    else
        skipped+=("pipelines benchmark (diffusers is not installed)")
    fi
fi

if wants demo; then
    if has diffusers && [ -d python/cachedit ]; then
        step demo "$python" -m cachedit demo --device cuda --out "$logs/demo"
    else
        skipped+=("demo (diffusers is not installed)")
    fi
fi

echo
echo "=== summary (logs in $logs, figures in $csv, $exchange and $pipelines)"
for name in "${passed[@]+"${passed[@]}"}"; do echo "passed   $name"; done
for name in "${skipped[@]+"${skipped[@]}"}"; do echo "skipped  $name"; done
for name in "${failed[@]+"${failed[@]}"}"; do echo "FAILED   $name"; done
[ ${#failed[@]} -eq 0 ]
