#!/usr/bin/env bash
# Train under Slurm, again and again until it is done: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "Usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SIGNAL_BEFORE=120 SRUN_ARGS=...] $0 PARTITION JOB_NAME" \
         "CONFIG [options of tools/train.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_slurm.sh"
launch_until_done train.py "$@"
