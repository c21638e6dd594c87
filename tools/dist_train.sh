#!/usr/bin/env bash
# Train on several GPUs: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "Usage: $0 CONFIG GPUS [options of tools/train.py]" >&2
    echo "For several nodes set NNODES, NODE_RANK, MASTER_ADDR and PORT on each node." >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_dist.sh"
launch train.py "$2" "$1" "${@:3}"
