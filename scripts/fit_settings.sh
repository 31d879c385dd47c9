#!/usr/bin/env bash
# How margin, learning rate, schedule, initialisation, gradient scale, arrangement and sink change a fit: the
# quickstart's 32 texts, one attempt of 200 steps each. Half an hour on two CPU cores; run it again to go on.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

fit() {
    local name=$1
    shift
    echo "== $name"
    python scripts/train.py --config scripts/recipes/embedded.yaml --stage fit --output_dir "runs/fit_settings/$name" \
        --fit_attempts 1 --fit_max_steps 200 "$@"
}

fit default
fit stop_at_perfect --fit_min_probability 0
fit lr_0.03 --fit_learning_rate 0.03
fit lr_0.06 --fit_learning_rate 0.06
fit lr_0.2 --fit_learning_rate 0.2
fit constant_lr --fit_schedule constant
fit raw_gradients --fit_normalize_gradients false
fit raw_gradients_lr_0.01 --fit_normalize_gradients false --fit_learning_rate 0.01
fit paper_start --fit_normalize_gradients false --fit_learning_rate 0.01 --fit_schedule constant --fit_init_std 1
fit arrangement_e_m --arrangement e_m
fit no_sink --sink none
python scripts/benchmark.py fit-settings
