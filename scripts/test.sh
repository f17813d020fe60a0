#!/usr/bin/env bash
# Run the tests in an environment of their own making.
# usage: bash scripts/test.sh [PYTEST ARGUMENTS], such as -m "slow or not slow" for all of them
# The environment goes to .venv (VENV), made with python3 (PYTHON).
set -euo pipefail
source "$(dirname "$0")/environment.sh" test

python -m pytest -m "not slow" --numprocesses "${JOBS:-2}" --dist loadfile "$@"
