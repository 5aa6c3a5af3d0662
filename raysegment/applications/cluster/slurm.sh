
batch() {
    begin
    mapfile -t NAMES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    PIDS=()
    if [ "${#NAMES[@]}" -lt "$MIN" ]; then
        say "expected at least $MIN hosts, got ${#NAMES[@]}: $SLURM_JOB_NODELIST"
        exit 1
    fi
    local rank
    for rank in "${!NAMES[@]}"; do # a step for each host, so that a host's end is no other's
        srun --nodes=1 --ntasks=1 --nodelist="${NAMES[rank]}" --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --no-kill \
            --kill-on-bad-exit=0 --output="$ATTEMPT/node-$rank.log" \
            bash "$ATTEMPT/job.sh" node "$ATTEMPT" "$rank" "${#NAMES[@]}" &
        PIDS+=($!)
    done
    follow
    conclude
    if [ -n "$AGAIN" ]; then
        say "goes back into the queue (${NUMBER}) and will go on where it was"
        scontrol requeue "$JOB" && sleep "$WARN_S" # Slurm ends it here
    fi
    exit "$CODE"
}

JOB="${SLURM_JOB_ID:?this script is for sbatch}"
[ "$PORT" -gt 0 ] || PORT=$((20000 + 3 * (JOB % 4000))) # the dashboard has the next one, Ray's client the one after
if [ "${1:-}" = node ]; then node "${@:2}"; else batch; fi
