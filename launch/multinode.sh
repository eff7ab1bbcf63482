#!/usr/bin/env bash
# Trains on several nodes that share this folder and the run's, in the environment that is active; installs nothing.
#
# The same command on every node:
#   NNODES=2 RDZV_ENDPOINT=node1:29400 RDZV_ID=WORD bash launch/multinode.sh train_configs/X.toml [--section.key value ...]
# or once, from anywhere with ssh keys to the nodes, of which the first is the endpoint:
#   HOSTS="node1 node2" bash launch/multinode.sh train_configs/X.toml [--section.key value ...]
#
# NPROC, MAX_RESTARTS and SHUTDOWN_TIMEOUT as in local.sh. RDZV_ID is a random word (openssl rand -hex 16): who knows
# it can take part. NODE_RANK=0 marks the node of the endpoint where its name does not (1, 2, ... on the others). With HOSTS, ENV names further variables to
# take along, beside NCCL_*, GLOO_*, CUDA_*, TORCH_* and HF_*.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${HOSTS:-}" ]; then
  exec python -m launch.ssh "$@"
fi
if [ -z "${NNODES:-}" ] || [ -z "${RDZV_ENDPOINT:-}" ]; then
  echo "error: set NNODES and RDZV_ENDPOINT=host:port (and RDZV_ID) and start this on every node, or HOSTS=\"n1 n2\" to start it here" >&2
  exit 2
fi
exec python -m launch.node "$@"
