#!/usr/bin/env bash
# The embedded model's recipe on a GPU, within 590 seconds: log, loss curve, what was reached.
#
#   CORPUS=folder OUT=benchmarks/pretrain benchmarks/pretrain.sh
#
# CORPUS holds token shards of the tokenizer TOKENIZER (default: mini), or text. The schedule ends by
# TIME (such as 500s) of training or by the recipe's steps, whichever comes first: a slower GPU makes
# fewer steps and still ends with its rates decayed. The model card says 455 s on an H100 for 2.737
# nats per token. If stopped, run the same command to continue.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/pretrain}
RUN=${RUN:-runs/pretrain-mini}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
# 590 s less what comes around the training: starting, reading the corpus, the samples
timeout --signal=INT --kill-after=15 585 "$PYTHON" -m minprefix pretrain \
    "${CORPUS:?folder with token shards or text}" --tokenizer "${TOKENIZER:-mini}" \
    --preset mini --compile --device cuda --time "${TIME:-500s}" --out "$RUN" "$@"
cp "$RUN/log.jsonl" "$RUN/loss.png" "$RUN/pretrain.json" "$OUT"
