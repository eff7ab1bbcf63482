#!/usr/bin/env bash
# Makes the project importable: a virtual environment, and the packages of pyproject.toml. Sourced by the scripts here.
#
#   source launch/install.sh
#   install_project              the toolkit
#   install_project test,wandb   and optional dependency groups of pyproject.toml
#
# Uses the active virtual environment, else makes .venv. A torch that is already there (a CUDA build, say) is kept;
# otherwise the tested version is installed first, so that no other package pulls in a different one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A function, because a sourced file without arguments of its own would see those of the script that sources it.
install_project() {
  local extra="${1:-}"
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    use_venv
  fi
  # One stamp per set of requirements: a second run installs nothing.
  local stamp
  stamp="$VIRTUAL_ENV/.deltaproduct-$(cat pyproject.toml constraints.txt <(echo "$PWD $extra") | sha256sum | cut -c1-16)"
  if [ ! -e "$stamp" ]; then
    echo "installing into $VIRTUAL_ENV (about two minutes the first time)"
    install_packages "$extra"
    touch "$stamp"
  fi
}

use_venv() {
  if [ ! -x .venv/bin/python ]; then
    local python
    python="$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "error: Python 3.11 or later is needed, found $("$python" --version)" >&2; exit 2; }
    echo "making a virtual environment in .venv"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}

install_packages() {
  local extra="$1" kept
  if ! python -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then
    python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
  fi
  # Keep the torch (and the triton it came with) that is there now, whichever it is.
  kept="$(mktemp)"
  grep -v -e '^torch==' -e '^triton==' constraints.txt >"$kept"
  python -m pip freeze 2>/dev/null | grep -E '^(torch|triton)==' | sed 's/+.*//' >>"$kept" || true
  grep -q '^triton==' "$kept" || grep '^triton==' constraints.txt >>"$kept"
  python -m pip install --quiet --constraint "$kept" --editable ".${extra:+[$extra]}"
  rm -f "$kept"
}
