#!/usr/bin/env bash
#BSUB -J raysegment
#BSUB -W 120
#BSUB -wt 2
#BSUB -wa USR1
#BSUB -Q 99
#BSUB -r
#BSUB -o raysegment-%J.log
#BSUB -P CLI101
#BSUB -nnodes 8
#
# raysegment cluster render lsf 'run=train small shards=/data/shards out=/data/runs/first' nodes=8 min=4 gpus=6 minutes=120 account=CLI101

COMMAND=(raysegment train small shards=/data/shards out=/data/runs/first 'elastic.cells=[4,8]' elastic.workers_per_cell=6)
MIN=4
CPUS=0
GPUS=6
PORT=0
INTERFACE=''
DASHBOARD=127.0.0.1
TOKEN_FILE="$HOME/.ray/auth_token"
STATE="$HOME/.raysegment/jobs"
WAIT_S=1800
GRACE_S=120
WARN_S=120
REQUEUES=20
POLL_S=2.0
SETUP=''
LAUNCHER=jsrun
REQUEUE_STATUS=99

if [ -n "$SETUP" ]; then . "$SETUP"; fi # before `set -u`, which modules do not bear
set -uo pipefail

# ---------------------------------------------------------------- a host of the job: one raylet; the first also has the command
#
# Files of an attempt, in $ATTEMPT: head (its address), stop (why the command is to end), exit (the command's status).

CANCELLED="cancelled"

say() { printf '%s %s: %s\n' "$(date +%T)" "${HOSTNAME%%.*}" "$*" >&2; }

write() { # FILE TEXT: whole or not at all
    printf '%s\n' "$2" >"$1.tmp" && mv -f "$1.tmp" "$1"
}

environment() { # for everything of Ray's: the token is read from its file, on no command line and in no log
    unset RAY_AUTH_TOKEN
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN_FILE"
    export RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_ENABLE_STATE_TRACKING=1 RAY_worker_niceness=0
}

own_address() { # as the other hosts reach this one
    if [ -n "$INTERFACE" ]; then
        ip -4 -o address show dev "$INTERFACE" | awk '{split($4, part, "/"); print part[1]; exit}'
    else
        hostname -I | awk '{print $1}'
    fi
}

start_ray() { # OPTION…: this host's raylet, in the background, its number in RAYLET
    local cpus="$CPUS"
    [ "$cpus" -gt 0 ] || cpus="${SLURM_CPUS_ON_NODE:-0}"
    [ "$cpus" -eq 0 ] || set -- "$@" "--num-cpus=$cpus"
    # sockets lie below: a short path of the user's own, on the host's own disk
    ray start "$@" "--num-gpus=$GPUS" "--node-ip-address=$(own_address)" "--temp-dir=/tmp/rs-$(id -u)-$JOB" \
        --dashboard-agent-listen-port=0 --disable-usage-stats --block & # 0: one that is free, another job may be here, too
    RAYLET=$!
}

end_ray() { # this raylet alone, by its number: other jobs of the user may have theirs on this host
    kill -TERM "$RAYLET" 2>/dev/null
    local until=$((SECONDS + 40)) # Ray gives what runs on the node 30 s
    while kill -0 "$RAYLET" 2>/dev/null && [ "$SECONDS" -lt "$until" ]; do sleep "$POLL_S"; done
    kill -KILL "$RAYLET" 2>/dev/null
    wait "$RAYLET" 2>/dev/null
}

supervise() { # COMMAND…: its status; it gets SIGTERM when the job is asked to end
    "$@" &
    local process=$! asked=
    while kill -0 "$process" 2>/dev/null; do
        if [ -z "$asked" ] && [ -e "$ATTEMPT/stop" ]; then
            asked=yes
            say "asks ${*:1:3} to end"
            kill -TERM "$process"
        fi
        sleep "$POLL_S"
    done
    wait "$process"
}

head_node() {
    trap '[ -e "$ATTEMPT/stop" ] || write "$ATTEMPT/stop" "the head node is to go"' TERM
    local address code
    address="$(own_address):$PORT"
    start_ray --head "--port=$PORT" "--dashboard-host=$DASHBOARD" "--dashboard-port=$((PORT + 1))" \
        "--ray-client-server-port=$((PORT + 2))" # else 10001, over which a second head of this host would end
    write "$ATTEMPT/head" "$address"
    say "Ray's head: $address; its dashboard: port $((PORT + 1)) of $DASHBOARD on this host"
    export RAY_ADDRESS="$address"
    supervise raysegment cluster wait "nodes=$HOSTS" "min=$MIN" "wait_s=$WAIT_S" "grace_s=$GRACE_S" && supervise "${COMMAND[@]}"
    code=$?
    write "$ATTEMPT/exit" "$code"
    end_ray
    return "$code"
}

leave() { # this host alone is to go: Ray is told, the members on it hand over and leave, the others go on
    LEAVING=yes
    sleep "$POLL_S" # the whole job may be meant, and its head asked at the same moment
    [ -e "$ATTEMPT/stop" ] || raysegment cluster drain "deadline_s=$WARN_S"
    end_ray
}

worker_node() {
    trap leave TERM
    LEAVING=
    local waited=$SECONDS
    until [ -s "$ATTEMPT/head" ]; do
        [ ! -e "$ATTEMPT/exit" ] || return 0
        [ $((SECONDS - waited)) -lt "$WAIT_S" ] || return 1
        sleep "$POLL_S"
    done
    RAY_ADDRESS="$(cat "$ATTEMPT/head")"
    export RAY_ADDRESS
    local try
    for try in 1 2 3 4 5 6 7 8 9 10; do # a raylet that ends by itself is started again: the fleet takes the room when there is
        start_ray "--address=$RAY_ADDRESS"
        while kill -0 "$RAYLET" 2>/dev/null; do
            [ ! -e "$ATTEMPT/exit" ] || end_ray
            sleep "$POLL_S"
        done
        [ ! -e "$ATTEMPT/exit" ] && [ -z "$LEAVING" ] || return 0
        say "its raylet has ended ($try)"
        sleep "$POLL_S"
    done
    return 1
}

node() { # ATTEMPT RANK HOSTS
    ATTEMPT="$1" HOSTS="$3"
    environment
    if [ "$2" -eq 0 ]; then head_node; else worker_node; fi
}

# ---------------------------------------------------------------- the job

make_token() { # once, for its owner's eyes; whoever submits to this cluster reads the same file
    [ ! -s "$TOKEN_FILE" ] || return 0
    mkdir -p "$(dirname "$TOKEN_FILE")"
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$TOKEN_FILE.$$")
    ln "$TOKEN_FILE.$$" "$TOKEN_FILE" 2>/dev/null # two jobs may begin at once: one of them is first
    rm -f "$TOKEN_FILE.$$"
    [ -s "$TOKEN_FILE" ]
}

begin() { # a folder for this attempt, with a copy of the script that all hosts reach
    NUMBER=0
    while [ -e "$STATE/$JOB/$NUMBER" ]; do NUMBER=$((NUMBER + 1)); done
    ATTEMPT="$STATE/$JOB/$NUMBER"
    mkdir -p "$ATTEMPT" && cp "$0" "$ATTEMPT/job.sh" && make_token || exit 1
    trap 'write "$ATTEMPT/stop" "warned of the end"' USR1 USR2
    trap 'write "$ATTEMPT/stop" "$CANCELLED"' TERM INT
}

dropped() { # PLACE
    say "${NAMES[$1]} has dropped out; to be without it: exclude=[${NAMES[$1]}] or exclude_file=$STATE/dropped"
    printf '%s\n' "${NAMES[$1]}" >>"$STATE/dropped"
}

follow() { # the steps PIDS of the hosts NAMES: until the command has ended, or the head's step has
    local reported=" " place
    while [ ! -e "$ATTEMPT/exit" ] && kill -0 "${PIDS[0]}" 2>/dev/null; do
        for place in "${!PIDS[@]}"; do
            if [ "$place" -gt 0 ] && [[ "$reported" != *" $place "* ]] && ! kill -0 "${PIDS[place]}" 2>/dev/null; then
                reported+="$place "
                dropped "$place"
            fi
        done
        sleep "$POLL_S"
    done
}

conclude() { # the job's status in CODE; AGAIN is set where it is to be begun again
    local why until
    CODE="$(cat "$ATTEMPT/exit" 2>/dev/null)"
    why="$(cat "$ATTEMPT/stop" 2>/dev/null)"
    AGAIN=
    if [ -z "$CODE" ]; then
        say "the head node is lost"
        [ -n "$why" ] || dropped 0
        CODE=1 AGAIN=yes
        write "$ATTEMPT/exit" 1 # the other hosts end, too
    elif [ "$CODE" -eq 143 ] && [ -n "$why" ]; then # ended because it was asked to, with its state on record
        AGAIN=yes
    fi
    [ "$why" != "$CANCELLED" ] || AGAIN=
    until=$((SECONDS + WARN_S / 3)) # not for ever: a host may hang, and the job's time be nearly over
    while [ -n "$(jobs -rp)" ] && [ "$SECONDS" -lt "$until" ]; do sleep "$POLL_S"; done
    if [ -n "$AGAIN" ] && [ "$NUMBER" -ge "$REQUEUES" ]; then
        say "was begun $((NUMBER + 1)) times (requeues=$REQUEUES): stays out of the queue"
        AGAIN=
    fi
}

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
