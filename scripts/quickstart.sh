#!/usr/bin/env bash
# Train a small MSVMamba on handwritten digits, evaluate it and predict: a few minutes on a CPU, no download of data.
# usage: bash scripts/quickstart.sh [WORKDIR]
# The environment goes to .venv (VENV), made with python3 (PYTHON). Run again to go on after an interruption.
set -euo pipefail
workdir="${1:-}"
[[ -z "$workdir" || "$workdir" == /* ]] || workdir="$PWD/$workdir"
source "$(dirname "$0")/environment.sh" data,tensorboard
workdir="${workdir:-runs/digits}"

python -m msvmamba_jax.train --config configs/digits.py --workdir "$workdir"
python -m msvmamba_jax.evaluate --config configs/digits.py --checkpoint "$workdir" --json "$workdir/evaluation.json"
python scripts/export_digits.py "$workdir/samples"
python -m msvmamba_jax.predict "$workdir" "$workdir/samples" --output "$workdir/predictions" --top 3
