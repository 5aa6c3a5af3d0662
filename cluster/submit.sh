#!/usr/bin/env bash
# Runs a raysegment verb as a job of a running Ray cluster:   cluster/submit.sh train small shards=/data/shards out=/data/runs/a
#
# RAY_ADDRESS    the dashboard's address, e.g. http://head:8265   (needed)
# RAY_AUTH_TOKEN the cluster's token, where it asks for one        (or a file: RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)
# SUBMISSION_ID  the job's name                                    (default: verb and time)
#
# The cluster's nodes have the package installed; nothing is uploaded. Give paths that every node can see. The job runs
# where the cluster says, finds it through RAY_ADDRESS, and its exit status is this command's.
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "submit.sh: expected a verb, got nothing. Write for example: cluster/submit.sh inspect /data/shards" >&2
    exit 2
fi
: "${RAY_ADDRESS:?submit.sh: expected the dashboard address, got nothing. Set RAY_ADDRESS=http://HEAD:8265}"
if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || [ -f "$HOME/.ray/auth_token" ]; then
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" # the ray command sends no token unless it is told to
fi
# `ray job stop` asks with SIGTERM and kills after three seconds: training is given more, to end with a committed state
stop='{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "20"}}'
exec ray job submit --address "$RAY_ADDRESS" --submission-id "${SUBMISSION_ID:-$1-$(date +%Y%m%d-%H%M%S)}" \
    --runtime-env-json "$stop" -- python -m raysegment "$@"
