"""`raysegment cluster render SYSTEM key=value…`: the text of a job script or of manifests."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from raysegment import config
from raysegment.applications.cluster.batch import render_lsf, render_slurm
from raysegment.applications.cluster.kubernetes import render_kubernetes
from raysegment.applications.cluster.options import KubernetesOptions, LsfOptions, SlurmOptions
from raysegment.climate.checks import BadInput

SYSTEMS: dict[str, tuple[type, Any]] = {
    "slurm": (SlurmOptions, render_slurm),
    "lsf": (LsfOptions, render_lsf),
    "kubernetes": (KubernetesOptions, render_kubernetes),
}


def render(system: str, overrides: Sequence[str], verbs: Collection[str]) -> str:
    """What starts the job on `system`; `verbs` are the words that its command may begin with. BadInput names the wrong key."""
    if system not in SYSTEMS:
        raise BadInput("render", f"one of {', '.join(SYSTEMS)}", system, 'Write for example render slurm run="train …".')
    options, renderer = SYSTEMS[system]
    where = f"render {system}"
    command = [word for word in overrides if word.startswith("run=")][-1:]  # a command line is no YAML
    try:
        mapping = config.apply_overrides({}, [word for word in overrides if not word.startswith("run=")])
    except yaml.YAMLError as error:
        raise BadInput(where, "values in YAML", str(error).replace("\n", " "), 'Quote brackets: exclude=[a,"b[1-9]"].') from None
    settings = config.load(options, mapping | {"run": "".join(command).removeprefix("run=")}, where)
    return renderer(settings, verbs, f"raysegment cluster render {system} {shlex.join(overrides)}")
