# Sourced by the other scripts: makes .venv in the project's folder, once, and installs the project into it.
# usage: source scripts/environment.sh EXTRAS

cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="$1"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; set PYTHON to one, such as PYTHON=python3.12" >&2
    exit 1
fi

venv="$("$python" -c 'import os, sys; print(os.path.abspath(sys.argv[1]))' "${VENV:-.venv}")"
stamp="$venv/installed-$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing into $venv (once; a few hundred megabytes) ..."
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet --editable ".[$extras]"
    touch "$stamp"
fi
PATH="$venv/bin:$PATH"
