#!/usr/bin/env bash
# Debian packages that tests use where they are there: SLURM for a real cluster (tests/launch/slurm_cluster.py), shellcheck.
# Installs what is missing as root with apt; elsewhere it says what will be skipped, and is no failure.
set -euo pipefail
missing=()
command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || missing+=(slurm-wlm munge)
command -v shellcheck >/dev/null || missing+=(shellcheck)
if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  if apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    exit 0
  fi
fi
echo "warning: not installed: ${missing[*]}; the tests that need them are skipped" >&2
