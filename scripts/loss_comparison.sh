#!/usr/bin/env bash
# Trains an encoder with each loss alone on one bank and compares them. An interrupted run goes on.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
runs=runs/loss_comparison
python scripts/train.py --config loss_comparison --stage fit
for loss in siglip distance_based_logistic info_nce mean_squared_error reconstruction; do
    python scripts/train.py --config loss_comparison --output_dir $runs/$loss --bank $runs/bank \
        --losses "{\"$loss\": 1.0, \"length_nll\": 0.1}"
done
python scripts/benchmark.py losses --runs $runs
