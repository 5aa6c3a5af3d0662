"""What may be asked of a rendered job, each value checked before anything is written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePosixPath

from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HOSTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[0-9,-]+\])?")
_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1035, as KubeRay asks of names
_LONGEST = 47  # of a RayJob's name: KubeRay appends six characters to make its cluster's
_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(m|[kMGTP]i?)?")
STOP_S = 20  # that a stopped job gets to end with a committed state; Ray kills after three seconds unless told otherwise
DASHBOARDS = {"loopback": "127.0.0.1", "all": "0.0.0.0"}  # who reaches the dashboard: its host alone, or the network
LAUNCHERS = ("jsrun", "blaunch")
KINDS = ("job", "cluster")
STORES = ("none", "redis", "rocksdb")


@dataclass(frozen=True)
class JobOptions:
    """What all systems have in common.

    `run` is the command line behind `raysegment`, the same as on a laptop. `min` of `nodes` nodes are enough to begin and
    to go on with. `gpus`, `cpus` are per node (0 CPUs: all). Before its end a job has `warn_s` seconds.
    """

    run: str = ""
    name: str = "raysegment"
    nodes: int = 2
    min: int = 1
    cpus: int = 0
    gpus: int = 0
    warn_s: int = 120
    dashboard: str = "loopback"

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.nodes:
            raise ValueError(f"nodes, min: expected 1 <= min <= nodes, got min={self.min}, nodes={self.nodes}")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus, gpus: expected 0 or more per node, got {self.cpus} and {self.gpus}")
        if self.warn_s < 30:
            raise ValueError(f"warn_s: expected 30 or more seconds, which an orderly end may take, got {self.warn_s}")
        _one_of("dashboard", self.dashboard, tuple(DASHBOARDS))
        _matching("name", self.name, NAME)

    def words(self, verbs: Collection[str]) -> list[str]:
        """The words of `run`; training is told its cells: one per node, from `min` to `nodes`, a worker per GPU.

        BadInput where `run` is no command line of raysegment's, or would write a credential down.
        """
        words = _split(self.run)
        if not words or words[0] not in verbs:
            close = get_close_matches(words[0], verbs, 1) if words else []
            remedy = f"Did you mean `{close[0]}`?" if close else 'Write for example run="train small shards=DIR out=DIR".'
            raise BadInput("run", "a command line that begins with a verb", self.run or "nothing", remedy)
        for word in words:
            check_no_secret(word)
        return words + (self._cells(words) if words[0] == "train" else [])

    def _cells(self, words: list[str]) -> list[str]:
        asked = {word.partition("=")[0] for word in words}
        cells = {"elastic.cells": f"[{self.min},{self.nodes}]", "elastic.workers_per_cell": str(max(1, self.gpus))}
        return [] if "workers" in asked else [f"{key}={value}" for key, value in cells.items() if key not in asked]


@dataclass(frozen=True)
class BatchOptions(JobOptions):
    """A job script of Slurm or LSF.

    `minutes` the job may take, `queue` (partition) and `account` as the site has them. `exclude`: hosts not to be used;
    `exclude_file`: more of them, one per line. `setup`: a file that every host sources first (modules, virtual environment).
    `state`: a folder that all hosts reach, for the job's own small files ("": ~/.raysegment/jobs). `token_file`: the cluster's
    token ("": ~/.ray/auth_token), made where there is none. `port` of Ray's head (0: from the job's number). `interface`: the
    network that Ray is to use, e.g. ib0. Nodes are awaited `wait_s` seconds; once `min` are there the others have `grace_s`.
    The job is put back into the queue up to `requeues` times.
    """

    minutes: int = 120
    queue: str = ""
    account: str = ""
    exclude: tuple[str, ...] = ()
    exclude_file: str = ""
    setup: str = ""
    state: str = ""
    token_file: str = ""
    port: int = 0
    interface: str = ""
    wait_s: int = 1800
    grace_s: int = 120
    requeues: int = 20
    poll_s: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes * 60 <= self.warn_s:
            raise ValueError(f"minutes: expected more than warn_s ({self.warn_s} s), got {self.minutes}")
        if self.wait_s < 1 or self.grace_s < 0 or self.requeues < 0 or self.poll_s <= 0:
            raise ValueError("wait_s, poll_s: expected more than 0; grace_s, requeues: expected 0 or more")
        if self.port and not 1024 <= self.port <= 65535:
            raise ValueError(f"port: expected 1024 to 65535 (0: from the job's number), got {self.port}")
        for key in ("queue", "account", "interface"):
            _matching(key, getattr(self, key) or "unset", NAME)
        for key in ("setup", "state", "token_file", "exclude_file"):
            _absolute(key, getattr(self, key))
        if any(len(host) == 1 for host in self.exclude):  # a text has been taken for a list of letters
            raise ValueError("exclude: expected a list like [node7,node9], got a text without brackets")
        for host in self.exclude:
            _matching("exclude", host, HOSTS)


@dataclass(frozen=True)
class SlurmOptions(BatchOptions):
    """An sbatch script. `smaller`: also take an allocation of only `min` nodes; `constraint`: features of the nodes."""

    smaller: bool = False
    constraint: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _matching("constraint", self.constraint or "unset", re.compile(r"[A-Za-z0-9._&|*()\[\]-]+"))


@dataclass(frozen=True)
class LsfOptions(BatchOptions):
    """A bsub script. `launcher`: jsrun (a launch node beside the compute nodes) or blaunch; `slots` of a host, for blaunch."""

    launcher: str = "jsrun"
    slots: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("launcher", self.launcher, LAUNCHERS)
        if self.slots < 1:
            raise ValueError(f"slots: expected 1 or more, got {self.slots}")
        if self.warn_s % 60:
            raise ValueError(f"warn_s: expected whole minutes, as LSF counts, got {self.warn_s} s")
        for host in self.exclude:
            _matching("exclude", host, NAME)


@dataclass(frozen=True)
class KubernetesOptions(JobOptions):
    """Manifests for KubeRay 1.7 (ray.io/v1).

    `kind`: job, a RayJob that ends with its command and is begun again up to `retries` times; or cluster, a RayCluster that
    stays and takes jobs. `image` as `cluster/Dockerfile` builds it. The volume claim `claim` is mounted at `mount` in all
    pods; with `claim_gib` it is made as well, of class `storage_class`. The token is in the Secret `token_secret` (key
    auth_token), which KubeRay makes where none is named. `store` keeps a cluster's head state: redis (deployed beside it unless
    `redis_address` names one; password in the Secret `redis_secret`, key password), rocksdb (an alpha feature of
    KubeRay) or none. `priority`: a PriorityClass. `queue`: a LocalQueue of Kueue, where the job waits and may
    be pre-empted; with `queue_elastic` it grows and shrinks there (an alpha feature of Kueue), otherwise it has `nodes` nodes.
    """

    cpus: int = 4
    kind: str = "job"
    namespace: str = "default"
    image: str = "raysegment:cuda"
    memory: str = "16Gi"
    head_cpus: int = 4
    head_memory: str = "16Gi"
    shared_memory: str = "4Gi"
    gpu_resource: str = "nvidia.com/gpu"
    claim: str = "raysegment"
    claim_gib: int = 0
    storage_class: str = ""
    mount: str = "/data"
    token_secret: str = ""
    store: str = "redis"
    redis_address: str = ""
    redis_secret: str = "raysegment-redis"
    priority: str = ""
    queue: str = ""
    queue_elastic: bool = False
    retries: int = 20
    idle_s: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("kind", self.kind, KINDS)
        _one_of("store", self.store, STORES)
        for key in ("name", "namespace", "claim", "storage_class", "token_secret", "redis_secret", "priority", "queue"):
            _matching(key, getattr(self, key) or "unset", _LABEL)
        if len(self.name) > _LONGEST:
            raise ValueError(f"name: expected at most {_LONGEST} characters, got {len(self.name)}")
        for key in ("memory", "head_memory", "shared_memory"):
            _matching(key, getattr(self, key), _QUANTITY)
        for key, pattern in (("image", r"[\w.:/@-]+"), ("gpu_resource", r"[\w./-]+"), ("redis_address", r"[\w.-]+:\d+")):
            _matching(key, getattr(self, key) or "unset:1", re.compile(pattern))
        if self.cpus < 1 or self.head_cpus < 1:
            raise ValueError(f"cpus, head_cpus: expected 1 or more, got {self.cpus} and {self.head_cpus}")
        if self.claim_gib < 0 or self.retries < 0 or self.idle_s < 0:
            raise ValueError("claim_gib, retries, idle_s: expected 0 or more")
        if self.queue_elastic and not self.queue:
            raise ValueError("queue_elastic: expected `queue` beside it, the LocalQueue to wait in")
        _absolute("mount", self.mount)

    @property
    def dashboard_host(self) -> str:
        """Where the dashboard listens. KubeRay hands a RayJob over there and asks for its state: that needs the pod's network."""
        return DASHBOARDS["all" if self.kind == "job" else self.dashboard]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput("run", "a command line", error, "Close the quotation marks.") from None


def check_no_secret(word: str) -> None:
    for part in (word, word.partition("=")[2]):
        if "://" in part and str(Place.of(part)) != Place.of(part).text:
            shown = Place.of(part)
            raise BadInput("run", "URIs without credentials", shown, "Give them through the environment of the nodes.")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}: expected one of {', '.join(known)}, got {value!r}")


def _matching(key: str, value: str, pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(value):
        raise ValueError(f"{key}: expected a value like {pattern.pattern}, got {value!r}")


def _absolute(key: str, path: str) -> None:
    if path and (not PurePosixPath(path).is_absolute() or any(not letter.isprintable() for letter in path)):
        raise ValueError(f"{key}: expected an absolute path, as every host has it, got {path!r}")
