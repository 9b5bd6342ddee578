# Sourced by the scripts beside it: sets `root` and `venv`, and makes or renews .venv. Needs Python 3.11 or later
# (the interpreter named by PYTHON, else python3). An install that was cut short is done again: the stamp comes last.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/installed-pyproject.toml"
if ! cmp -s "$root/pyproject.toml" "$stamp"; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "fastcifar needs Python 3.11 or later, and $python is older; name one by PYTHON=..." >&2
    exit 2
  }
  echo "installing into .venv (once; a few minutes the first time)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root[dev]" >&2
  cp "$root/pyproject.toml" "$stamp"
fi
