"""Job scripts of Slurm and LSF: directives, the checked options as assignments, and shell code that is the same for everybody."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from raysegment.applications.cluster.options import DASHBOARDS, NAME, BatchOptions, LsfOptions, SlurmOptions
from raysegment.climate.checks import BadInput

REQUEUE_STATUS = 99  # with which a job of LSF's asks to be begun again
_HERE = Path(__file__).parent


def render_slurm(options: SlurmOptions, verbs: Collection[str], command: str) -> str:
    """An sbatch script; `command` is what it was rendered with.

    SIGUSR1 comes `warn_s` before the time limit (and before a pre-emption, where the site sends the user's signal): the
    command is asked to end with its state on record, and the job goes back into the queue. SIGTERM (scancel) does the first
    only; whether it comes back is then Slurm's to say.
    """
    nodes = f"{options.min}-{options.nodes}" if options.smaller else str(options.nodes)
    asked = {
        "job-name": options.name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": options.cpus or None,
        "exclusive": None if options.cpus else "",
        "gpus-per-node": options.gpus or None,
        "time": options.minutes,
        "partition": options.queue,
        "account": options.account,
        "constraint": options.constraint,
        "exclude": ",".join(_excluded(options)),
        "signal": f"B:USR1@{options.warn_s}",
        "requeue": "",
        "no-kill": "",
        "open-mode": "append",
        "output": f"{options.name}-%j.log",
    }
    bare = {"exclusive", "requeue", "no-kill"}
    lines = [f"#SBATCH --{key}" if key in bare else f"#SBATCH --{key}={value}"
             for key, value in asked.items() if value or (key in bare and value is not None)]  # fmt: skip
    return _script(lines, _values(options, verbs), "slurm.sh", command)


def render_lsf(options: LsfOptions, verbs: Collection[str], command: str) -> str:
    """A bsub script (`bsub < FILE`); `command` is what it was rendered with. SIGUSR1 is LSF's warning of the end."""
    away = [f"hname!='{host}'" for host in _excluded(options)]
    where = f"select[{' && '.join(away)}] " if away else ""
    lines = [
        f"-J {options.name}",
        f"-W {options.minutes}",
        f"-wt {options.warn_s // 60}",
        "-wa USR1",
        f"-Q {REQUEUE_STATUS}",
        "-r",
        f"-o {options.name}-%J.log",
        *([f"-q {options.queue}"] if options.queue else []),
        *([f"-P {options.account}"] if options.account else []),
    ]
    if options.launcher == "jsrun":
        lines += [f"-nnodes {options.nodes}", *([f'-R "{where.strip()}"'] if where else [])]
    else:
        least = f"{options.min * options.slots},{options.nodes * options.slots}"
        lines += [f"-n {least}", f'-R "{where}span[ptile={options.slots}]"']
        lines += [f'-gpu "num={options.gpus}/host"'] if options.gpus else []
    values = _values(options, verbs) | {"LAUNCHER": options.launcher, "REQUEUE_STATUS": REQUEUE_STATUS}
    return _script([f"#BSUB {line}" for line in lines], values, "lsf.sh", command)


def _values(options: BatchOptions, verbs: Collection[str]) -> dict[str, object]:
    """The shell variables of a script."""
    return {
        "COMMAND": ["raysegment", *options.words(verbs)],
        "MIN": options.min,
        "CPUS": options.cpus,
        "GPUS": options.gpus,
        "PORT": options.port,
        "INTERFACE": options.interface,
        "DASHBOARD": DASHBOARDS[options.dashboard],
        "TOKEN_FILE": options.token_file or Path("$HOME/.ray/auth_token"),
        "STATE": options.state or Path("$HOME/.raysegment/jobs"),
        "WAIT_S": options.wait_s,
        "GRACE_S": options.grace_s,
        "WARN_S": options.warn_s,
        "REQUEUES": options.requeues,
        "POLL_S": options.poll_s,
        "SETUP": options.setup,
    }


def _script(directives: Sequence[str], values: dict[str, object], body: str, command: str) -> str:
    assignments = [f"{name}={_quoted(value)}" for name, value in values.items()]
    sourced = 'if [ -n "$SETUP" ]; then . "$SETUP"; fi # before `set -u`, which modules do not bear'
    parts = [(_HERE / name).read_text() for name in ("node.sh", body)]
    head = ["#!/usr/bin/env bash", *directives, "#", f"# {command}", "", *assignments, "", sourced, "set -uo pipefail", ""]
    return "\n".join(head) + "\n" + "".join(parts)


def _quoted(value: object) -> str:
    if isinstance(value, list):
        return f"({' '.join(map(shlex.quote, value))})"
    return f'"{value}"' if isinstance(value, Path) else shlex.quote(str(value))  # a Path here begins with $HOME


def _excluded(options: BatchOptions) -> list[str]:
    """Hosts not to be used, each once; BadInput where the file of them is absent or holds something else."""
    if not options.exclude_file:
        return list(dict.fromkeys(options.exclude))
    path = Path(options.exclude_file)
    if not path.is_file():
        raise BadInput("exclude_file", "a file with a host per line", f"no such file: {path}", "Give its path, or leave it out.")
    named = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    strange = next((host for host in named if host and not NAME.fullmatch(host)), None)
    if strange is not None:
        raise BadInput(path, "a host per line", repr(strange), "Correct the line.")
    return list(dict.fromkeys([*options.exclude, *filter(None, named)]))
