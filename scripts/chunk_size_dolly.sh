#!/usr/bin/env bash
# Bandwidth on Dolly, after longer training than scripts/ablations.sh has: 16 tokens from one pair (e, m) or from a pair
# for every 4 of them, predicted from the decoder's own states, which makes the cheapest steps. Options go to every
# training, such as --data FILE or --max_steps N; a --prompt_store spares the prompts of every epoch but the first.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
runs=runs/chunk_size_dolly
python scripts/train.py --config encoder_dolly --stage teacher --latent_source none --teacher_answers $runs/teacher "$@"

run() {
    local name=$1
    shift
    echo "== $name"
    python scripts/train.py --config encoder_dolly --output_dir $runs/"$name" --teacher_answers $runs/teacher \
        --latent_source decoder --per_device_train_batch_size 24 "$@"
}

run base "$@"
run chunks_of_4 --chunk_size 4 --max_chunks 4 "$@"
python scripts/benchmark.py ablations --runs $runs --result $runs.json \
    --made-by "bash scripts/chunk_size_dolly.sh${1+$(printf ' %q' "$@")}"
