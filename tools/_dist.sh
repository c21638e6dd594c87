# Sourced by dist_train.sh and dist_test.sh: starts a script on the GPUs (or in CPU processes) of
# one or several nodes. For several, run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT.
launch() {
    local script=$1 processes=$2
    shift 2
    local tools root python nnodes port
    tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(dirname "$tools")
    python=${PYTHON:-python}
    nnodes=${NNODES:-1}
    port=${PORT:-}
    if [ -z "$port" ]; then
        if [ "$nnodes" -gt 1 ]; then
            echo "Several nodes need a common port: set PORT to the same value on each node." >&2
            exit 2
        fi
        port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    fi
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$tools/_torchrun.py" \
        --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$processes" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" \
        "$tools/$script" "$@" --launcher pytorch
}
