# Sourced by slurm_train.sh and slurm_test.sh: starts a script as a Slurm job, or in the batch job
# that it runs in. GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS in the environment set its size.
launch() {
    local script=$1 partition=$2 job=$3
    shift 3
    local tools root
    tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(dirname "$tools")
    # SRUN_ARGS is unquoted, because it can contain several options.
    # shellcheck disable=SC2086
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" srun -p "$partition" --job-name="$job" \
        --gres="gpu:${GPUS_PER_NODE:-8}" --ntasks="${GPUS:-8}" \
        --ntasks-per-node="${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$tools/$script" "$@" --launcher slurm
}

# Like launch, again and again while the run stops with exit code 75, for which Slurm's signal asks
# SIGNAL_BEFORE seconds (120) before the time limit. Further starts resume. A batch job is requeued.
launch_until_done() {
    local code resume=()
    SRUN_ARGS="--signal=TERM@${SIGNAL_BEFORE:-120} ${SRUN_ARGS:-}"
    trap 'exit 130' INT  # Ctrl-C: srun has saved the run, which is not started again
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi
    while true; do
        code=0
        launch "$@" ${resume[@]+"${resume[@]}"} || code=$?
        if [ "$code" -ne 75 ]; then exit "$code"; fi
        if [ -n "${SLURM_JOB_ID:-}" ]; then
            echo "The run stopped and is saved: job $SLURM_JOB_ID is requeued." >&2
            exec scontrol requeue "$SLURM_JOB_ID"
        fi
        echo "The run stopped and is saved: it is started again with --resume." >&2
        resume=(--resume)
    done
}
