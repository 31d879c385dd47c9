#!/usr/bin/env bash
# One-step answers against the decoder's own on Dolly: (a) trained vectors without an encoder, (b) an encoder, (c) with
# the prompt in the decoder too, (d) plus on-policy distillation, (e) plus instructions that the decoder wrote itself.
# Hours on two CPU cores, minutes on a GPU; run it again to go on. Options go to every training:
#     bash scripts/encoder_dolly.sh --data dolly.jsonl --max_steps 1000
set -euo pipefail
. "$(dirname "$0")/setup.sh"
runs=runs/encoder_dolly

# Without an encoder, and so without its window, no instruction is left out that a run may want.
python scripts/train.py --config encoder_dolly --stage teacher --latent_source none --instructions both \
    --teacher_answers $runs/teacher "$@"

run() {
    local name=$1
    shift
    echo "== $name"
    python scripts/train.py --config encoder_dolly --output_dir $runs/"$name" --teacher_answers $runs/teacher "$@"
}

on_policy='{"reconstruction": 1.0, "on_policy": 1.0, "length_nll": 0.1, "error_nll": 0.1}'
run a-learned_vectors --latent_source none "$@"
run b-encoder_without_prompt --decoder_sees_prompt false "$@"
run c-encoder_with_prompt --latent_source both "$@"
run d-on_policy --latent_source both --losses "$on_policy" "$@"
run e-synthetic_instructions --latent_source both --losses "$on_policy" --instructions both "$@"
python scripts/benchmark.py encoder --runs $runs --made-by "bash scripts/encoder_dolly.sh${1+$(printf ' %q' "$@")}"
