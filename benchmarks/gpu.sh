#!/usr/bin/env bash
# What only a GPU can say, in parts of under four minutes each on one H100 or H200:
#
#   benchmarks/gpu.sh tests       all kernel tests in parallel processes, then compute-sanitizer
#   benchmarks/gpu.sh attention   the attention kernels beside PyTorch's own; all tiles, sweeps
#   benchmarks/gpu.sh decode      the same for one step of decoding
#   benchmarks/gpu.sh steps       whole training steps beside transformers + PEFT, and ours without
#                                 CUDA graphs and without the kernels beside attention
#   benchmarks/gpu.sh generate    the same for generation, and without the kernels of few rows
#   benchmarks/gpu.sh train       the README's training run: mini, 2,500 steps, then its BLEU;
#                                 BART-large beside transformers and PEFT; and the kernels beside
#                                 attention alone
#
# Several parts run one after the other; none given: all six. Needs the checkout and a Python with
# torch, triton, transformers and peft (tests: pytest, hypothesis), and no network. DATA is a folder
# with real tables, E2E's for instance; without it `steps` and `train` take the embedded restaurants.
# A step that fails or takes too long does not stop the others. A part begins with what matters most
# and ends in a table of verdicts; its exit code is 1 if a step failed. CSVs, pictures, log-PART.txt
# and summary-PART.txt go to OUT (default: benchmarks/gpu), named by the GPU: attention-h200.csv.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu}
DATA=${DATA:-restaurants}
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
PATH=$PATH:/usr/local/cuda/bin
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
BUDGET=${BUDGET:-215} # seconds, for the steps of a part; its start and its table take some more

# step NAME SECONDS COMMAND...: run it for at most so long, note its exit code and its seconds
step() {
    local name=$1 limit=$2 began=$SECONDS room=$((BUDGET - SECONDS + started)) code
    shift 2
    if [ "$room" -lt 8 ]; then
        printf '%-12s left out, the time is over\n' "$name" >>"$SUMMARY"
        return
    fi
    [ "$limit" -le "$room" ] || limit=$room
    printf '\n== %s (%s s): %s\n' "$name" "$limit" "$*" | tee -a "$LOG"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
    printf '%-12s exit code %3d %4d s\n' "$name" "$code" $((SECONDS - began)) >>"$SUMMARY"
}

left() { # left SECONDS: what is left of the part, but for so many seconds
    local room=$((BUDGET - SECONDS + started - $1))
    echo $((room > 5 ? room : 5))
}

# compute-sanitizer on one small call of each kernel; each tensor is then an allocation of its own
sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "$1: compute-sanitizer is not here" >>"$SUMMARY"
        return
    fi
    step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m kernels.tools.sanitize
}

part_tests() {
    # beside the tests: what compute-sanitizer watches afterwards is then compiled
    timeout 150 "$PYTHON" -m kernels.tools.sanitize >"$WORK/calls.txt" 2>&1 &
    step tests 155 "$PYTHON" -m benchmarks.gpu_tests --seconds 145
    sanitizer memcheck 60
    sanitizer racecheck 60
}

part_attention() {
    step warm-up 75 "$PYTHON" -m benchmarks.kernels.warm --seconds 68
    step targets 90 "$PYTHON" -m benchmarks.kernels.attention --out "$OUT" --part targets --seconds 75
    step tiles 60 "$PYTHON" -m benchmarks.kernels.tiles --out "$OUT" --seconds 45
    step sweeps "$(left 2)" "$PYTHON" -m benchmarks.kernels.attention --out "$OUT" --part sweeps \
        --seconds "$(left 22)"
}

part_decode() {
    step warm-up 45 "$PYTHON" -m benchmarks.kernels.warm --what decode --seconds 40
    step tiles 70 "$PYTHON" -m benchmarks.kernels.tiles --what decode --out "$OUT" --seconds 55
    step decode "$(left 2)" "$PYTHON" -m benchmarks.kernels.decode --out "$OUT" --seconds "$(left 17)"
}

# whole_steps WORK: what benchmarks/gpu_steps.py measures; it begins nothing in the last 45 s
whole_steps() {
    step "$1" "$(left 2)" "$PYTHON" -m benchmarks.gpu_steps "$1" --data "$DATA" --out "$WORK" \
        --seconds "$(left 45)"
}

part_steps() { whole_steps train; }

part_generate() { whole_steps generate; }

part_train() {
    step train "$(left 95)" "$PYTHON" -m benchmarks.e2e prefix --data "$DATA" --device cuda \
        --csv "$WORK/e2e.csv" --out "$WORK/run"
    step bart 60 "$PYTHON" -m benchmarks.bart --device cuda --dtype bfloat16 --batch-size 16 \
        --steps 5 --peers --out "$WORK/bart.csv"
    step kernels "$(left 2)" "$PYTHON" -m benchmarks.kernels.fused --out "$OUT" \
        --seconds "$(left 12)"
}

run_part() {
    local part=$1
    LOG=$OUT/log-$part.txt SUMMARY=$OUT/summary-$part.txt started=$SECONDS failed=0
    WORK=$(mktemp -d)
    : >"$LOG"
    : >"$SUMMARY"
    step versions 30 "$PYTHON" -c 'import sys, torch
from benchmarks.machine import machine
print("python", sys.version.split()[0], "cudnn", torch.backends.cudnn.version(), machine())'
    "part_$part"
    "$PYTHON" -m benchmarks.gpu_summary "$part" "$OUT" --log "$LOG" --work "$WORK" >>"$SUMMARY"
    rm -r "$WORK"
    printf '\n== summary of %s, %s s\n' "$part" $((SECONDS - started))
    cat "$SUMMARY"
    return "$failed"
}

parts=("$@")
[ $# -gt 0 ] || parts=(tests attention decode steps generate train)
for part in "${parts[@]}"; do
    case $part in
    tests | attention | decode | steps | generate | train) ;;
    *)
        echo "gpu.sh: the parts are tests, attention, decode, steps, generate, train; got $part" >&2
        exit 2
        ;;
    esac
done
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: no GPU"
    exit 1
}
mkdir -p "$OUT"
code=0
for part in "${parts[@]}"; do
    run_part "$part" || code=1
done
exit "$code"
