#!/usr/bin/env bash
# Runs a raysegment verb as a job of a running Ray cluster:   cluster/submit.sh train small shards=/data/shards out=/data/runs/a
#
# RAY_ADDRESS          the dashboard's address, e.g. http://head:8265   (needed)
# RAY_AUTH_TOKEN_PATH  the file with the cluster's token                (default: ~/.ray/auth_token, where there is one)
# SUBMISSION_ID        the job's name                                   (default: the verb and a digest of the command)
# WORKING_DIR          a folder to upload, whose code goes before the installed package's   (default: none)
#
# It comes down to one line:
#
#   ray job submit --submission-id ID --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "20"}}' -- python -m raysegment VERB …
#
# The same command again goes on where the job was: one that has ended begins anew under its name (its log grows), one that
# runs is followed. The cluster's nodes have the package installed; nothing is uploaded or installed unless WORKING_DIR
# says so (5 MB at most). Give paths that every node can see. Ctrl-C leaves the job running; `ray job stop ID` ends it with its
# state on record.
#
# Status: that of the verb (0 done, 2 bad input, 1 failure), 143 where the job was stopped.
set -euo pipefail
bad() {
    echo "submit.sh: $1" >&2
    exit 2
}
[ $# -gt 0 ] || bad "expected a verb, got nothing. Write for example: cluster/submit.sh inspect /data/shards"
[ -n "${RAY_ADDRESS:-}" ] || bad "expected the dashboard's address, got nothing. Set RAY_ADDRESS=http://HEAD:8265"
if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || [ -f "$HOME/.ray/auth_token" ]; then
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" # the ray command sends no token unless it is told to
fi
jobs() { "${PYTHON:-python}" -m raysegment.applications.cluster.jobs "$@"; }

upload=()
if [ -n "${WORKING_DIR:-}" ]; then
    [ -d "$WORKING_DIR" ] || bad "WORKING_DIR: expected a folder, got $WORKING_DIR. Name the one to upload, or none"
    upload=(--working-dir "$WORKING_DIR")
fi
admitted=0
answer="$(jobs admit "${SUBMISSION_ID:-}" "${WORKING_DIR:-}" "$@")" || admitted=$?
id="${answer%%$'\n'*}" environment="${answer#*$'\n'}"
case $admitted in
0) ray job submit --address "$RAY_ADDRESS" --submission-id "$id" --runtime-env-json "$environment" "${upload[@]}" -- \
    python -m raysegment "$@" || true ;;
3) ray job logs --address "$RAY_ADDRESS" --follow "$id" || true ;;
*) exit "$admitted" ;;
esac
jobs status "$id"
