#!/usr/bin/env bash
# Every table and figure of the paper with the embedded model, into benchmarks/paper: first the
# settings, on the dev set, then all runs, then RESULTS.md. DATA is a folder with e2e, webnlg and
# dart (what is missing there is reported as not tested). If stopped, run the same command to continue.
#
#     DATA=data JOBS=4 benchmarks/paper.sh                                    # on a GPU
#     DATA=data benchmarks/paper.sh --steps 500 --seeds 2 --precision bf16    # on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-benchmarks/paper}
COMMON=(--data-dir "${DATA:?folder with e2e, webnlg and dart}" --runs "${RUNS:-runs/paper}")
COMMON+=(--out "$OUT" ${JOBS:+--jobs "$JOBS"})
"$PYTHON" -m benchmarks.paper sweep "${COMMON[@]}" "$@"
"$PYTHON" -m benchmarks.paper all "${COMMON[@]}" --sweep-file "$OUT/sweep-mini.csv" "$@"
