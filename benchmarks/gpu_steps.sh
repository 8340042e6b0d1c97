#!/usr/bin/env bash
# Whole training steps and generation on a GPU beside transformers + PEFT, ten minutes each part.
#
#   OUT=benchmarks/gpu_steps benchmarks/gpu_steps.sh main
#   OUT=benchmarks/gpu_steps benchmarks/gpu_steps.sh more
#
# First the tests of CUDA graphs and of steps that must not wait; then times, with graphs and without
# (the folders graphs/ and eager/). E2E=folder adds batches of the E2E data. benchmarks/gpu.sh is
# about the kernels alone.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu_steps}
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
LOG=$OUT/log-${1:-main}.txt
: >"$LOG"
BUDGET=590 # seconds, for all
failed=0

# step SECONDS COMMAND...: run it for at most so long; the others follow in any case
step() {
    local limit=$1 room=$((BUDGET - SECONDS)) code
    shift
    [ "$limit" -le "$room" ] || limit=$((room > 1 ? room : 1))
    printf '\n== %s s: %s\n' "$SECONDS" "$*" | tee -a "$LOG"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
}

bench() { # bench GRAPHS SECONDS WORK OPTIONS...
    local graphs=$1 limit=$2 folder=eager
    shift 2
    [ "$graphs" = 0 ] || folder=graphs
    step "$limit" env MINPREFIX_CUDA_GRAPHS="$graphs" "$PYTHON" -m minprefix bench "$@" \
        --device cuda --dtype bf16 --seconds 2 --out "$OUT/$folder"
}

medium=(--model random-medium)
case ${1:-main} in
main)
    step 100 "$PYTHON" -m pytest -q tests/test_fast_training.py tests/test_fast_generation.py
    bench 1 80 train "${medium[@]}" --batch-size 10 --peers compiled,peft --profile
    bench 1 60 generate "${medium[@]}" --batch-size 1,32
    bench 1 120 train "${medium[@]}" --batch-size 64 --peers compiled,peft,peft-compiled
    bench 1 60 generate "${medium[@]}" --batch-size 16 --num-beams 5
    bench 1 90 train --model random-large --batch-size 16 --seq-len 256 --peers compiled,peft
    bench 0 80 train "${medium[@]}" --batch-size 10,64
    ;;
more)
    bench 1 120 train "${medium[@]}" --batch-size 16 --seq-len 512 --peers compiled,peft
    for data in restaurants ${E2E:-}; do
        bench 1 90 train "${medium[@]}" --batch-size 10 --data "$data" --peers peft,peft-shuffled
    done
    bench 1 150 train "${medium[@]}" --batch-size 16 --prefix-len 1,50,100,200
    step 80 "$PYTHON" -m benchmarks.bart --device cuda --dtype bfloat16 --batch-size 16 \
        --steps 10 --peers --out "$OUT/bart.csv"
    bench 1 140 generate "${medium[@]}" --batch-size 16 --prefix-len 1,50,100,200 --new-tokens 32
    ;;
*)
    echo "one of main, more; got $1" >&2
    exit 2
    ;;
esac
exit "$failed"
