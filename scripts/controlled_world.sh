#!/usr/bin/env bash
# The controlled world from nothing: its language, a decoder that speaks it, an encoder, and one-step answers against the
# decoder's own on instructions never seen. Minutes on two CPU cores; run it again to go on.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python scripts/train.py --config controlled_world --stage world
python scripts/train.py --config controlled_world --stage train
python scripts/benchmark.py controlled-world
