#!/usr/bin/env bash
# Run the tests in an environment of their own making.
# usage: bash scripts/test.sh [PYTEST ARGUMENTS], such as -m nightly for the long ones
# The environment goes to .venv (VENV), made with python3 (PYTHON).
set -euo pipefail
source "$(dirname "$0")/environment.sh" test

python -m pytest -m "not nightly" --numprocesses "${JOBS:-2}" --dist worksteal "$@"
