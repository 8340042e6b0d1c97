#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: tests, memory checks, times.
#
#   OUT=benchmarks/gpu benchmarks/gpu.sh
#
# A step that fails or takes too long does not stop the others; the summary says which did, and the
# exit code is 1. Leaves log.txt, summary.txt and the benchmarks' CSVs and pictures in OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu}
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
PATH=$PATH:/usr/local/cuda/bin
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
LOG=$OUT/log.txt
SUMMARY=$OUT/summary.txt
: >"$LOG"
: >"$SUMMARY"
BUDGET=590 # seconds, for all
failed=0

# step NAME SECONDS COMMAND...: run it for at most so long, note its exit code and its seconds
step() {
    local name=$1 limit=$2 began=$SECONDS room=$((BUDGET - SECONDS)) code
    shift 2
    [ "$limit" -le "$room" ] || limit=$((room > 1 ? room : 1))
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$LOG"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
    printf '%-12s exit code %3d %4d s\n' "$name" "$code" $((SECONDS - began)) >>"$SUMMARY"
}

# compute-sanitizer on one small call of each kernel; each tensor is then an allocation of its own
sanitizer() {
    step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m kernels.sanitize
}

step gpu 20 nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit
step versions 60 "$PYTHON" -c 'import sys, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
print("cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
assert torch.cuda.is_available(), "no GPU"'
step calls 90 "$PYTHON" -m kernels.sanitize
# most of the tests' time is compiling: in parallel where pytest-xdist is installed
workers=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8" || true)
step tests 200 "$PYTHON" -m pytest -q $workers tests/test_attention.py tests/test_decode.py \
    tests/test_operator.py
sanitizer memcheck 60
sanitizer racecheck 60
room=$((BUDGET - SECONDS - 100)) # leaves time for the last shape and for decoding
room=$((room > 30 ? room : 30))
step attention $((room + 40)) "$PYTHON" -m kernels.bench_attention --out "$OUT" --seconds "$room"
step decode 90 "$PYTHON" -m kernels.bench_decode --out "$OUT"

grep -E ' [<>]= .*(ok|MISSED|not measured)' "$LOG" >>"$SUMMARY"
printf '\n== summary\n'
cat "$SUMMARY"
exit "$failed"
