#!/usr/bin/env bash
# Answers of 64 tokens on Dolly: one pair (e, m) for all of them, or several chunks in the same pass, and how well what
# goes on from the middle of an answer is written by models that learned so or did not (`..._later`). The base is (c) of
# scripts/encoder_dolly.sh, and each run changes one thing; what is called NAME-CHANGE changes it in NAME. Options go to
# every training, such as --data FILE or --max_steps N.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
runs=runs/ablations_long
long="--teacher_max_length 64 --teacher_answers $runs/teacher"
python scripts/train.py --config encoder_dolly --stage teacher --latent_source none $long "$@"

run() {
    local name=$1
    shift
    echo "== $name"
    python scripts/train.py --config encoder_dolly --output_dir $runs/"$name" $long --latent_source both \
        --validation_continuations 1 --max_steps 1000 "$@"
}

run base --chunk_size 64 "$@"
run chunks_of_16 --chunk_size 16 --max_chunks 4 "$@"
run continuations --chunk_size 64 --continuations 2 "$@"
run continuations-read_by_encoder --chunk_size 64 --continuations 2 --encoder_reads_answer true "$@"
python scripts/benchmark.py ablations --runs $runs --result $runs.json \
    --made-by "bash scripts/ablations_long.sh${1+$(printf ' %q' "$@")}"
