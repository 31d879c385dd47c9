#!/usr/bin/env bash
# From a fresh clone to answers and numbers, in minutes on two CPU cores: installs, answers commands with the model in the
# box, fits proto-tokens to 32 texts, trains an encoder, reloads it as a user of the Hub does, and measures. Run it again
# after an interruption: it goes on.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

# Left to itself, accelerate gives a process one thread.
threads=$(python -c 'import os; print(os.cpu_count())')
launch=(accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
    --num_cpu_threads_per_process "$threads")
echo "1/4 answer: ten commands in one pass each, and token by token by the same decoder with seven examples in its prompt"
[ -f runs/snips_in_the_box.json ] || protogen bench snips --run scripts/data/snips_smollm2_135m --show 10 \
    --few-shot 7 --few-shot-limit 10 --rounds 10 --result runs/snips_in_the_box.json
echo "2/4 fit: proto-tokens for the first 16 tokens of 32 Dolly responses"
"${launch[@]}" scripts/train.py --config scripts/recipes/embedded.yaml --stage fit
echo "3/4 train: an encoder that predicts proto-tokens from the instruction"
"${launch[@]}" scripts/train.py --config scripts/recipes/embedded.yaml --stage train
echo "4/4 measure: reload, answer held-out instructions, time against greedy decoding"
protogen bench quickstart --run runs/embedded
