#!/usr/bin/env bash
# The knee of quality against bandwidth where training converges: in the controlled world, answers of at most 7 tokens
# from a pair (e, m) for every 8, 4, 2 or 1 of them, with the prompt in the decoder and without. What is called
# NAME-CHANGE changes it in NAME. Options go to every training, such as --max_steps N.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
runs=runs/chunk_size
python scripts/train.py --config controlled_world --stage world

run() {
    local name=$1
    shift
    echo "== $name"
    python scripts/train.py --config controlled_world --stage train --output_dir $runs/"$name" "$@"
}

run base "$@"
run chunks_of_4 --chunk_size 4 --max_chunks 2 "$@"
run chunks_of_2 --chunk_size 2 --max_chunks 4 "$@"
run chunks_of_1 --chunk_size 1 --max_chunks 8 "$@"
run without_prompt --decoder_sees_prompt false "$@"
run without_prompt-chunks_of_4 --decoder_sees_prompt false --chunk_size 4 --max_chunks 2 "$@"
run without_prompt-chunks_of_2 --decoder_sees_prompt false --chunk_size 2 --max_chunks 4 "$@"
run without_prompt-chunks_of_1 --decoder_sees_prompt false --chunk_size 1 --max_chunks 8 "$@"
python scripts/benchmark.py ablations --runs $runs --result $runs.json \
    --made-by "bash scripts/chunk_size.sh${1+$(printf ' %q' "$@")}"
