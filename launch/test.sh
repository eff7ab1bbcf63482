#!/usr/bin/env bash
# Installs the project with its test dependencies and lm-eval, and runs the suite (eleven minutes on two slow cores).
#
#   bash launch/test.sh [pytest arguments]        e.g.  bash launch/test.sh tests/unit -k order
#   bash launch/test.sh -m slow                   the long checks
#   WORKERS=1 bash launch/test.sh                 test files one after another, not two at a time
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_project test,lm-eval
# Two ranks with one thread each: with more, OpenMP's threads fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# In the order of their names: the long files are not left for the end, when one core would be idle.
python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
