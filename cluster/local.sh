#!/usr/bin/env bash
# A practice cluster on this machine:   cluster/local.sh up N [key=value…] [--tls] | status | down
#
#   eval "$(cluster/local.sh up 3 cpus=1)" && cluster/submit.sh inspect /data/shards; cluster/local.sh down
#
# N nodes, the head's among them, each a `ray start` of its own with its own loopback address, ports and temporary folder,
# and a token that only you can read. `up` and `status` print the lines to export. Keys: raysegment/applications/cluster/local.py.
# RAYSEGMENT_CLUSTER names the folder of all its files (default: one of yours among the temporary ones).
set -euo pipefail
words=()
for word in "$@"; do
    [ "$word" != --tls ] || word=tls=true
    words+=("$word")
done
exec "${PYTHON:-python}" -m raysegment cluster local "${words[@]}"
