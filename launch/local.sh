#!/usr/bin/env bash
# Trains on this machine, one rank a GPU (or one rank on the CPU), in the environment that is active; installs nothing.
#
#   bash launch/local.sh train_configs/X.toml [--section.key value ...]
#   NPROC=2 bash launch/local.sh train_configs/quickstart.toml
#
# NPROC ranks; MAX_RESTARTS=3 times ranks that died are started again, from the newest checkpoint; SHUTDOWN_TIMEOUT=300
# seconds to save after Ctrl-C, SIGTERM or SIGUSR1. The same command again continues the run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset NNODES NODE_RANK RDZV_ENDPOINT RDZV_ID
exec python -m launch.node "$@"
