# Sourced by slurm_train.sh and slurm_test.sh: starts a script as a Slurm job.
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS in the environment set its size.
launch() {
    local script=$1 partition=$2 job=$3
    shift 3
    local tools root
    tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(dirname "$tools")
    # SRUN_ARGS is unquoted, because it can contain several options.
    # shellcheck disable=SC2086
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec srun -p "$partition" --job-name="$job" \
        --gres="gpu:${GPUS_PER_NODE:-8}" --ntasks="${GPUS:-8}" \
        --ntasks-per-node="${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$tools/$script" "$@" --launcher slurm
}
