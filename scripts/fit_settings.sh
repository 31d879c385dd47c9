#!/usr/bin/env bash
# How learning rate, schedule, length of an attempt, initialisation, gradient scale, margin, warm start, progressive
# lengths, arrangement and sink change a fit, and the paper's recipe: the same 16 texts of 16 tokens for all. About an
# hour on two CPU cores; run it again to go on.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
runs=runs/fit_settings

fit() {
    local name=$1
    shift
    [ -f "$runs/$name/fit.json" ] && return
    echo "== $name"
    rm -rf "${runs:?}/$name" # a fit that was interrupted is timed from the start
    python scripts/train.py --config scripts/recipes/embedded.yaml --stage fit --output_dir "$runs/$name" \
        --fit_num_texts 16 "$@"
}

fit default
fit stop_at_perfect --fit_min_probability 0
fit lr_0.1 --fit_learning_rate 0.1
fit lr_1 --fit_learning_rate 1
fit attempts_of_100_steps --fit_max_steps 100 --fit_attempts 15
fit one_attempt_of_1500_steps --fit_max_steps 1500 --fit_attempts 1
fit constant_lr --fit_schedule constant
fit raw_gradients --fit_normalize_gradients false
fit init_std_1 --fit_init_std 1
fit progressive --fit_progressive_share 0.5
fit arrangement_e_m --arrangement e_m
fit no_sink --sink none
fit paper_with_sink --fit_learning_rate 0.01 --fit_schedule constant --fit_normalize_gradients false --fit_init_std 1 \
    --fit_max_steps 5000 --fit_attempts 1 --fit_min_probability 0
[ -d $runs/encoder/model ] || python scripts/train.py --config scripts/recipes/embedded.yaml --output_dir $runs/encoder \
    --decoder_sees_prompt false
fit warm_start --warm_start $runs/encoder/model
python scripts/benchmark.py fit-settings
