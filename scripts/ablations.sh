#!/usr/bin/env bash
# What each choice of architecture is worth where training converges: commands to JSON (`snips`) or the controlled world
# (`controlled_world`). The base is the recipe, trained through the decoder from nothing with the auxiliary token head,
# and each run changes one thing; what is called NAME-CHANGE changes it in NAME. Options go to every training, and
# PARALLEL of them share the machine, one by default; a run that failed is not in the result:
#     PARALLEL=4 bash scripts/ablations.sh snips-gpu --max_steps 600
set -euo pipefail
. "$(dirname "$0")/setup.sh"
recipe=${1:?which recipe: snips, snips-gpu or controlled_world}
shift
runs=runs/ablations/$recipe
losses='{"reconstruction": 1.0, "token_head": 0.5, "duration": 1.0, "length_nll": 0.1, "error_nll": 0.1}'
plain='{"reconstruction": 1.0, "duration": 1.0, "length_nll": 0.1, "error_nll": 0.1}'
unaligned='{"reconstruction": 1.0, "length_nll": 0.1, "error_nll": 0.1}'

run() {
    local name=$1
    shift
    while [ "$(jobs -rp | wc -l)" -ge "${PARALLEL:-1}" ]; do sleep 1; done
    echo "== $name"
    python scripts/train.py --config "$recipe" --output_dir "$runs/$name" "$@" &
}

if [ "$recipe" != controlled_world ]; then
    base=(--losses "$losses")
    run base "${base[@]}" "$@"
    run without_token_head --losses "$plain" "$@"
    run without_adapters "${base[@]}" --slot_adapter_rank 0 "$@"
    run adapters_of_4 "${base[@]}" --slot_adapter_rank 4 "$@"
    run adapters_of_64 "${base[@]}" --slot_adapter_rank 64 "$@"
    run first_tokens_decoder "${base[@]}" --first_tokens decoder "$@"
    run source_both "${base[@]}" --latent_source both --encoder embedded:minilm-l6 "$@"
    run layers_0_30 "${base[@]}" --decoder_layers_read 0 30 "$@"
    run layers_0_15_30 "${base[@]}" --decoder_layers_read 0 15 30 "$@"
    run two_source_layers "${base[@]}" --num_source_layers 2 "$@"
    run one_query_layer "${base[@]}" --num_query_layers 1 "$@"
    run not_upsampled --losses "$unaligned" --upsamples_prompt false "$@"
    run not_upsampled-chunks_of_2 --losses "$unaligned" --upsamples_prompt false --chunk_size 2 --max_chunks 32 "$@"
    run not_upsampled-one_pair --losses "$unaligned" --upsamples_prompt false --arrangement e_mN --chunk_size 64 \
        --max_chunks 1 "$@"
    run not_upsampled-source_encoder --losses "$unaligned" --upsamples_prompt false --latent_source encoder \
        --encoder embedded:minilm-l6 "$@"
    run self_first --targets self --answer_format text "${base[@]}" "$@"
    wait $! || true
    run self_pretraining "${base[@]}" --start_from "$runs/self_first/model" "$@"
else
    python scripts/train.py --config controlled_world --stage world
    run base --stage train "$@"
    run adapters_of_4 --stage train --slot_adapter_rank 4 "$@"
    run first_tokens_decoder --stage train --first_tokens decoder "$@"
    run source_decoder --stage train --latent_source decoder "$@"
    run source_both --stage train --latent_source both "$@"
    run one_query_layer --stage train --num_query_layers 1 "$@"
    run no_source_layers --stage train --num_source_layers 0 "$@"
    run chunks_of_1 --stage train --arrangement e_only --chunk_size 1 --max_chunks 8 "$@"
    run without_prompt --stage train --decoder_sees_prompt false "$@"
    run without_prompt-chunks_of_1 --stage train --decoder_sees_prompt false --arrangement e_only --chunk_size 1 \
        --max_chunks 8 "$@"
fi
wait
python scripts/benchmark.py ablations --runs "$runs" --result "$runs.json" \
    --made-by "bash scripts/ablations.sh $recipe${1+$(printf ' %q' "$@")}"
