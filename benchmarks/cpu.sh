#!/usr/bin/env bash
# Times training and generation against transformers + PEFT on a CPU, in about 20 minutes, into
# benchmarks/cpu/.
# Real tables too: the embedded ones, and E2E where its folder is given: E2E=folder benchmarks/cpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/cpu}
bench() { .venv/bin/python -m benchmarks.peft "$@" --device cpu --seconds "${BENCH_SECONDS:-5}" --out "$out"; }
for dtype in fp32 bf16; do
  bench train --dtype $dtype --batch-size 10 --labels all --peers compiled,peft,peft-compiled \
    --profile
  bench train --dtype $dtype --batch-size 10 --prefix-len 1,50,100,200 --labels all
  bench train --dtype $dtype --batch-size 1,4,32 --labels all
  bench train --dtype $dtype --batch-size 10 --seq-len 32,64,256 --labels all
  bench train --dtype $dtype --batch-size 10 --labels targets
  for data in restaurants ${E2E:-}; do
    bench train --dtype $dtype --batch-size 10 --data "$data" --peers peft,peft-shuffled
  done
  bench generate --dtype $dtype --batch-size 1,4,16 --num-beams 1,5
  bench generate --dtype $dtype --batch-size 16 --prefix-len 1,50,100,200
done
bench train --model random-gpt2 --dtype fp32 --batch-size 4 --labels all
bench train --model random-gpt2 --dtype bf16 --batch-size 4 --labels all
bench generate --model random-gpt2 --dtype fp32 --batch-size 1,8 --new-tokens 32
bench generate --model random-gpt2 --dtype bf16 --batch-size 1,8 --new-tokens 32
