#!/usr/bin/env bash
# Installs what is missing and runs the tests; arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python -m pytest -n auto "$@"
