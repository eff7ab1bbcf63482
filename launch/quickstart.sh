#!/usr/bin/env bash
# From nothing to a trained DeltaProduct language model on two CPU cores, offline; run it again to reuse what is there.
#
#   bash launch/quickstart.sh                     one process, two threads (the fastest on two cores)
#   NPROC=2 bash launch/quickstart.sh             the same through FSDP2 and gloo on two ranks
#   bash launch/quickstart.sh --training.steps 50 further arguments go to the trainer
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_project ""
python -m launch.quickstart "$@"
