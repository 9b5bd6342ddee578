# Sourced by the other scripts: sets `root` and `venv`, and creates or updates .venv. If `extra` is set, that extra of
# pyproject.toml is installed too. Needs Python 3.11 or later (the interpreter named by the variable PYTHON, else
# python3). The stamp is written last, so that an interrupted installation is repeated.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/installed-${extra:-package}-pyproject.toml"
if ! cmp -s "$root/pyproject.toml" "$stamp"; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "fastcifar needs Python 3.11 or later, and $python is older; set PYTHON to a newer interpreter" >&2
    exit 2
  }
  echo "installing into .venv (once; a few minutes the first time)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extra:+[$extra]}" >&2
  cp "$root/pyproject.toml" "$stamp"
fi
