#!/usr/bin/env bash
# Evaluate on several GPUs: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "Usage: $0 CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2
    echo "For several nodes set NNODES, NODE_RANK, MASTER_ADDR and PORT on each node." >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_dist.sh"
launch test.py "$3" "$1" "$2" "${@:4}"
