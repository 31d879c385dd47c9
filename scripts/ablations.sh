#!/usr/bin/env bash
# What each choice of architecture is worth on Dolly: the base is (c) of scripts/encoder_dolly.sh, whose teacher answers
# are used, and each run changes one thing; what is called NAME-CHANGE changes it in NAME. Options go to every training,
# such as --data FILE or --max_steps N.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
teacher=runs/encoder_dolly/teacher
python scripts/train.py --config encoder_dolly --stage teacher --latent_source none --teacher_answers $teacher "$@"

run() {
    local name=$1
    shift
    echo "== $name"
    python scripts/train.py --config encoder_dolly --output_dir runs/ablations/"$name" --teacher_answers $teacher \
        --latent_source both --max_steps 1000 "$@"
}

run base "$@"
run source_none --latent_source none "$@"
run source_encoder --latent_source encoder "$@"
run source_encoder-frozen --latent_source encoder --encoder_learning_rate 0 "$@"
run source_encoder-lora --latent_source encoder --encoder_lora_rank 8 --encoder_learning_rate 1e-3 "$@"
run source_encoder-of_3_layers --latent_source encoder --encoder_num_layers 3 "$@"
run source_decoder --latent_source decoder "$@"
run without_prompt --latent_source encoder --decoder_sees_prompt false "$@"
run chunks_of_8 --chunk_size 8 --max_chunks 2 "$@"
run chunks_of_4 --chunk_size 4 --max_chunks 4 "$@"
run chunks_of_2 --chunk_size 2 --max_chunks 8 "$@"
run four_e --num_e_tokens 4 "$@"
run without_offsets --m_position_offsets false "$@"
run subspace_of_64 --latent_dim 64 "$@"
run three_pooling_layers --num_pooling_layers 3 "$@"
run noise --proto_token_noise 0.1 "$@"
run soft_targets --losses '{"soft_reconstruction": 1.0, "length_nll": 0.1, "error_nll": 0.1}' "$@"
run on_policy --losses '{"reconstruction": 1.0, "on_policy": 1.0, "length_nll": 0.1, "error_nll": 0.1}' "$@"
python scripts/benchmark.py ablations --made-by "bash scripts/ablations.sh${1+$(printf ' %q' "$@")}"
