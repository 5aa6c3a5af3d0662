"""A batch system, Ray and raysegment as small shell programs: they start nothing, keep a record, and do as they are told.

In the folder FAKE: `calls` (a line each: host, program, words), `broken-HOST` for a host on which nothing starts, `up-HOST`,
`step-HOST` and `working` with the process numbers of a host's raylet, of its step and of the command, `behave` for what the
command does (finish, fail, or work until it is asked to end).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RECORD = 'printf "%s %s %s\\n" "${FAKE_HOST:-batch}" "${0##*/}" "$*" >>"$FAKE/calls"\n'
ON_HOST = 'if [ -e "$FAKE/broken-$FAKE_HOST" ]; then exit 1; fi\necho "$$" >"$FAKE/step-$FAKE_HOST"\nexec "$@"\n'
PROGRAMS = {
    "scontrol": 'if [ "$1" = show ]; then tr , "\\n" <<<"$3"; else kill -KILL "$PPID"; fi\n',  # a job put back is ended
    "srun": 'for word in "$@"; do case "$word" in --nodelist=*) export FAKE_HOST="${word#*=}" ;; --*) ;; *) break ;; esac; '
    "shift; done\n" + ON_HOST,
    "blaunch": 'export FAKE_HOST="$1"; shift\n' + ON_HOST,
    "jsrun": """
count=1
while [[ "$1" == --* ]]; do case "$1" in --nrs=*) count="${1#*=}" ;; esac; shift; done
for ((rank = 0; rank < count; rank++)); do
    host="$(grep -vx launch "$LSB_DJOB_HOSTFILE" | awk '!seen[$1]++' | sed -n "$((rank + 1))p")"
    [ -e "$FAKE/broken-$host" ] || FAKE_HOST="$host" JSM_NAMESPACE_RANK="$rank" "$@" &
done
wait
""",
    "hostname": "echo 192.0.2.7\n",
    "ray": """
printf '%s auth %s %s\\n' "$FAKE_HOST" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN_PATH" >>"$FAKE/calls"
echo "$$" >"$FAKE/up-$FAKE_HOST"
trap 'rm -f "$FAKE/up-$FAKE_HOST"; exit 0' TERM
while :; do sleep 0.05; done
""",
    "raysegment": """
up() { find "$FAKE" -name 'up-*' | wc -l; }
case "$1 $2" in
"cluster wait")
    nodes="${3#*=}" min="${4#*=}"
    for ((look = 0; look < 20; look++)); do
        [ "$(up)" -lt "$nodes" ] || exit 0
        sleep 0.05
    done
    [ "$(up)" -ge "$min" ] || exit 1
    ;;
"cluster drain") ;;
*)
    trap 'echo asked >>"$FAKE/committed"; exit 143' TERM
    case "$(cat "$FAKE/behave")" in
    finish) exit 0 ;;
    fail) exit 2 ;;
    esac
    echo "$$" >"$FAKE/working"
    while :; do sleep 0.05; done
    ;;
esac
""",
}


class FakeScheduler:
    """Runs a rendered script as a batch system would, in `folder`; `real`: with Ray and raysegment themselves."""

    def __init__(self, folder: Path, hosts: list[str], real: bool = False):
        self.folder, self.hosts = folder, hosts
        for name, body in PROGRAMS.items():
            if real and name in ("ray", "raysegment"):
                continue
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            record = "" if name == "hostname" else RECORD
            program.write_text(f"#!/usr/bin/env bash\n{record}{body}")
            program.chmod(0o755)
        if real:
            (folder / "bin" / "hostname").write_text("#!/bin/sh\necho 127.0.0.1\n")
        (folder / "calls").touch()
        self.behave("finish")

    def behave(self, how: str) -> None:
        (self.folder / "behave").write_text(how)

    def break_host(self, host: str) -> None:
        (self.folder / f"broken-{host}").touch()

    def start(self, script: str, **more: str) -> subprocess.Popen[str]:
        """The job, under way; `more` variables are in its environment."""
        path = self.folder / "script"
        path.write_text(script)
        launch = ["launch"] if "LAUNCHER=jsrun" in script else []
        (self.folder / "hosts").write_text("".join(f"{host}\n" * 2 for host in [*launch, *self.hosts]))
        environment = {
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "FAKE": str(self.folder),
            "RAY_AUTH_TOKEN": "of-another-cluster",
            "HOSTNAME": "launch",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": ",".join(self.hosts),
            "SLURM_CPUS_ON_NODE": "32",
            "LSB_JOBID": "4711",
            "LSB_DJOB_HOSTFILE": str(self.folder / "hosts"),
            **more,
        }
        return subprocess.Popen(["bash", str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, script: str) -> tuple[int, str]:
        """The job from beginning to end: its status and what it said."""
        job = self.start(script)
        said, _ = job.communicate(timeout=60)
        return job.returncode, said

    def signal_when_working(self, job: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
        self.until(lambda: (self.folder / "working").exists())
        job.send_signal(number)
        said, _ = job.communicate(timeout=60)
        return job.returncode, said

    def until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not happened():
            assert time.monotonic() < end, self.calls()
            time.sleep(0.02)

    def calls(self, program: str = "", host: str = "") -> list[str]:
        """The words with which a program was called, on a host or anywhere."""
        lines = [line.split(" ", 2) for line in (self.folder / "calls").read_text().splitlines()]
        return [words for at, name, words in lines if program in ("", name) and host in ("", at)]

    def kill(self, what: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to what a file names: `step-HOST`, `up-HOST` (its raylet), `working` (the command)."""
        os.kill(int((self.folder / what).read_text()), number)

    def up(self) -> list[str]:
        """The hosts on which a raylet runs."""
        return sorted(path.name.removeprefix("up-") for path in self.folder.glob("up-*"))
