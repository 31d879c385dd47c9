#!/usr/bin/env bash
# Drafts on one GPU, in one command: the decoder's answers, training, how often drafts are right, and how fast verified answers
# come. Arguments change the recipe, as --max_steps 100. DOLLY and GSM8K are the files to measure on, with PROMPTS of each, of
# which TIMED are timed. Run it again after an interruption: it goes on.
set -euo pipefail
dolly=${DOLLY:-scripts/data/dolly_sample.jsonl}
on=(--dolly "$dolly" ${GSM8K:+--gsm8k "$GSM8K"} --prompts "${PROMPTS:-100}")
protogen teacher --config drafts-gpu "$@"
protogen train --config drafts-gpu "$@"
run=runs/drafts-gpu
protogen bench drafts --models trained=$run/model "${on[@]}" --batch-size 50 --result $run/drafts.json
protogen bench verified --model $run/model "${on[@]}" --dtypes bfloat16 --timed-prompts "${TIMED:-10}" --run $run/verified
du -sh $run/model $run/drafts.json $run/verified/verified.json
