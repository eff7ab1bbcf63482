#!/usr/bin/env bash
# Shows on two CPU cores, in minutes, that n_h = 2 with eigenvalues in [-1, 1] follows S3 and the other settings do not.
#
#   bash launch/state_tracking.sh                     the four settings, one seed
#   bash launch/state_tracking.sh --seeds 1 2 3       and the share of seeds; finished runs are reused
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh
install_project ""
python -m launch.reproduce S3 --seeds 1 "$@"
