
hosts() { # those of the allocation, each once; jsrun's launch node, where this runs, is none of them
    local here=
    [ "$LAUNCHER" != jsrun ] || here="${HOSTNAME%%.*}"
    awk -v here="$here" '{split($1, part, ".")} part[1] != here && !seen[$1]++ {print $1}' "$LSB_DJOB_HOSTFILE"
}

launch() { # a raylet on each of NAMES
    local rank
    if [ "$LAUNCHER" = jsrun ]; then # one step for all; each finds its rank (JSM_NAMESPACE_RANK), and none ends the others
        jsrun --nrs="${#NAMES[@]}" --rs_per_host=1 --tasks_per_rs=1 --cpu_per_rs=ALL_CPUS --gpu_per_rs="$GPUS" --bind=none \
            --exit_on_error=0 --stdio_stdout="$ATTEMPT/nodes.log" --stdio_stderr="$ATTEMPT/nodes.log" \
            bash "$ATTEMPT/job.sh" node "$ATTEMPT" rank "${#NAMES[@]}" &
        PIDS+=($!)
        return
    fi
    for rank in "${!NAMES[@]}"; do
        blaunch "${NAMES[rank]}" bash "$ATTEMPT/job.sh" node "$ATTEMPT" "$rank" "${#NAMES[@]}" \
            >"$ATTEMPT/node-$rank.log" 2>&1 &
        PIDS+=($!)
    done
}

batch() {
    begin
    mapfile -t NAMES < <(hosts)
    PIDS=()
    if [ "${#NAMES[@]}" -lt "$MIN" ]; then
        say "expected at least $MIN hosts, got ${#NAMES[@]}: ${NAMES[*]}"
        exit 1
    fi
    launch
    follow
    conclude
    if [ -n "$AGAIN" ]; then
        say "goes back into the queue (${NUMBER}) and will go on where it was"
        exit "$REQUEUE_STATUS" # LSF begins a job again that ends so (-Q)
    fi
    exit "$CODE"
}

JOB="${LSB_JOBID:?this script is for bsub}"
[ "$PORT" -gt 0 ] || PORT=$((20000 + 3 * (JOB % 4000))) # the dashboard has the next one, Ray's client the one after
if [ "${1:-}" = node ]; then
    rank="$3"
    [ "$rank" != rank ] || rank="${JSM_NAMESPACE_RANK:?}"
    node "$2" "$rank" "$4"
else
    batch
fi
