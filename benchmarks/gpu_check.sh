#!/usr/bin/env bash
# Builds, tests and measures on a machine with one NVIDIA GPU, then says what failed. Needs no network, installs nothing.
#
#     [OUT=folder] [PYTHON=python3] [LIMIT=570] [MODEL=name] [DEVICE=cpu] benchmarks/gpu_check.sh [part ...]
#
# Parts: build tests operators pipelines demo; all of them without arguments. Where GPUs are lent by the ten minutes, each
# of "build tests", "build operators" and, with MODEL, "build pipelines" is made to fit. LIMIT is in seconds, for the
# whole: a step that needs more than it may, or than is left, is ended, and the others go on. The exit status is 1 if any
# step failed.
#
# $OUT gets a log of each part, operators.csv, exchange.csv, engine.csv, startup.csv, pipelines.csv and demo/; without OUT
# the logs go to a temporary folder and the CSVs' rows to benchmarks/results/.
#
# DEVICE=cpu rehearses without a GPU: the same commands at tiny sizes, C++ in place of Triton and CUDA C++, GPU tests
# collected and skipped. Logs and figures then stay out of the checkout.
set -u

[ -n "${OUT:-}" ] && mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
parts=${*:-build tests operators pipelines demo}
for part in $parts; do
    [[ " build tests operators pipelines demo " == *" $part "* ]] || { echo "no part is called '$part'" >&2; exit 2; }
done
limit=${LIMIT:-570}
logs=${OUT:-$(mktemp -d)}
results=${OUT:-benchmarks/results}
backends=(triton cuda)
sizes=(--mb 1 16 64 256)
exchanges=(--ranks 2 4 8)
compiled_sizes=(--mb 64 --dtype bfloat16)
compiled_exchanges=(--models FLUX.1 --ranks 4)
engine_options=(--rounds 50)
startup_options=(--processes 3)
pipeline_options=(--rounds 1 --caches cachedit cache_dit)
if [ "$device" = cpu ]; then
    results=$logs
    backends=(cpp)
    sizes=(--mb 0.1 --dtype float32 --rounds 1)
    exchanges=(--models Z-Image --ranks 2 --scale 0.01 --rounds 1)
    compiled_sizes=("${sizes[@]}" --no-compile)
    engine_options=(--rounds 2)
    startup_options=(--processes 1)
    pipeline_options=(--tiny --steps 5 --rounds 1 --backend eager)
fi
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
passed=() failed=() skipped=()

step() { # name, seconds at most, command...: runs it, shows its output and adds it to the part's log
    local name=$1 seconds=$2 start=$SECONDS left=$((limit - SECONDS)) status why=""
    shift 2
    if [ "$left" -lt 1 ]; then
        failed+=("$part: $name (no time left)")
        return 1
    fi
    echo "=== $name: $*" | tee -a "$logs/$part.log"
    timeout -k 5 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee -a "$logs/$part.log"
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then
        passed+=("$part: $name ($((SECONDS - start)) s)")
        return
    fi
    [ "$status" -ge 124 ] && why=", out of time or killed"
    failed+=("$part: $name ($((SECONDS - start)) s, status $status$why)")
    return 1
}

skip() { skipped+=("$part: $*"); }
has() { "$python" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

run_environment() {
    step "Python and GPU" 120 "$python" -c '
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__)
try:
    import triton; print("triton", triton.__version__)
except ImportError:
    print("no triton")
if sys.argv[1] == "cuda":
    assert torch.cuda.is_available(), "no CUDA device"
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "SMs", p.total_memory >> 30, "GiB")' "$device"
}

run_build() {
    step "the library" 300 "$python" setup.py -q build_ext --inplace || echo "going on with the library that is there, if any"
}

run_tests() {
    has pytest || { skip "GPU tests (pytest is not installed)"; return; }
    local options=(-m gpu -q -rf --durations=10) tests file
    # Only files with such tests: many others import diffusers, which need not be there.
    mapfile -t tests < <(grep -rlE "mark\.gpu|kernel_devices\(" tests --include="test_*.py" | sort)
    if ! has diffusers; then
        for file in $(grep -lE "^(from|import) diffusers" "${tests[@]}"); do
            skip "$file (diffusers is not installed)"
        done
        mapfile -t tests < <(grep -LE "^(from|import) diffusers" "${tests[@]}")
    fi
    if ! has hypothesis; then # the kernels' own tests do without
        mapfile -t tests < <(printf "%s\n" "${tests[@]}" | grep "/test_kernel.py$")
        options+=(--noconftest)
        skip "GPU tests other than the Triton kernels' (hypothesis is not installed)"
    fi
    has pytest_timeout || options+=(-o addopts=--import-mode=importlib) # else its setting is an error
    # Most of the time goes to Triton's compiler, on one core each.
    has xdist && options+=(-n "$((($(nproc) + 1) / 2))")
    step "GPU tests" 420 "$python" -m pytest "${tests[@]}" "${options[@]}"
}

bench() { # operator, name, sizes..., and what CACHEDIT_KERNELS_BACKEND says
    local script=benchmarks/bench_$1.py name=$2 history=$results/operators.csv
    [[ $1 == ulysses || $1 == attention ]] && history=$results/exchange.csv
    shift 2
    step "$name" 120 "$python" "$script" --device "$device" "$@" --csv "$history"
}

run_operators() {
    local backend operator
    for backend in "${backends[@]}"; do
        for operator in residual forecast; do
            CACHEDIT_KERNELS_BACKEND=$backend bench "$operator" "$operator, $backend" --no-compile "${sizes[@]}"
        done
        for operator in ulysses attention; do
            CACHEDIT_KERNELS_BACKEND=$backend bench "$operator" "$operator, $backend" --no-compile "${exchanges[@]}"
        done
    done
    step "Triton or CUDA C++" 60 "$python" benchmarks/choose_backends.py "$results/operators.csv" "$results/exchange.csv"
    step "host time" 120 "$python" benchmarks/bench_engine.py --device "$device" "${engine_options[@]}" \
        --csv "$results/engine.csv"
    step "start-up" 120 "$python" benchmarks/bench_startup.py --device "$device" "${startup_options[@]}" \
        --csv "$results/startup.csv"
    # torch.compile takes seconds for each row, so it is measured at one size, and last.
    bench residual "residual, torch.compile" "${compiled_sizes[@]}"
    [ "$device" = cpu ] && return # the others are the same again
    bench forecast "forecast, torch.compile" "${compiled_sizes[@]}"
    bench ulysses "ulysses, torch.compile" "${compiled_exchanges[@]}"
    bench attention "attention, torch.compile" "${compiled_exchanges[@]}"
}

run_pipelines() {
    has diffusers || { skip "all of it (diffusers is not installed)"; return; }
    local models=(Z-Image FLUX.1-dev Qwen-Image "Wan 2.1 1.3B") model # by how long they take, minutes each
    [ -n "${MODEL:-}" ] && models=("$MODEL")
    for model in "${models[@]}"; do
        step "$model" "$limit" "$python" benchmarks/bench_pipelines.py --models "$model" --device "$device" \
            "${pipeline_options[@]}" --csv "$results/pipelines.csv"
    done
}

run_demo() {
    has diffusers || { skip "all of it (diffusers is not installed)"; return; }
    step "pictures" 300 "$python" -m cachedit demo --device "$device" --out "$logs/demo"
}

part=environment
if run_environment; then
    said=""
    for part in build tests operators pipelines demo; do
        [[ " $parts " == *" $part "* ]] || continue
        if [ "$part" != build ] && [ -z "$said" ]; then
            said=yes
            step "backends" 60 "$python" -c '
import cachedit_kernels
for operator, devices in cachedit_kernels.backends().items():
    print(operator, {device: tuple(backend) for device, backend in devices.items()})'
        fi
        "run_$part"
    done
fi

echo
echo "=== summary after $SECONDS s (logs in $logs, figures in $results)"
for name in "${passed[@]+"${passed[@]}"}"; do echo "passed   $name"; done
for name in "${skipped[@]+"${skipped[@]}"}"; do echo "skipped  $name"; done
for name in "${failed[@]+"${failed[@]}"}"; do echo "FAILED   $name"; done
[ ${#failed[@]} -eq 0 ]
