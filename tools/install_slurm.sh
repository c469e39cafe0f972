#!/usr/bin/env bash
# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
#
# Installs Debian's SLURM, which tests/slurm start on this machine. Does nothing where it is installed, or where this user
# may not install it: those tests then say that they are skipped, and why.
set -uo pipefail
export DEBIAN_FRONTEND=noninteractive PATH=$PATH:/usr/sbin

for program in slurmctld slurmd munged pkill; do
    command -v "$program" >/dev/null || missing=yes
done
if [[ ! ${missing:-} ]]; then
    exit 0
elif ((EUID)) || ! command -v apt-get >/dev/null; then
    echo "SLURM is not installed: only root on Debian or Ubuntu can do it here"
elif ! { apt-get -qq update && apt-get -qq install --no-install-recommends slurm-wlm munge procps; } >/dev/null 2>&1; then
    echo "SLURM could not be installed by apt-get"
fi
exit 0
