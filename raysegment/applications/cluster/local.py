"""A practice cluster on one machine: a head and worker nodes, each a `ray start` of its own with its own loopback address.

    cluster/local.sh up 3          # then export what it prints, and submit as to any other cluster
    cluster/local.sh status
    cluster/local.sh down

Nodes have separate addresses (127.0.0.2, 127.0.0.3, …), ports, temporary folders and process numbers, so that what is done
to a host is done to one of them: `cluster drain address=127.0.0.3`, or the end of its process. Everything there is to know
is in one folder: `cluster.json`, the token, a log per node, Ray's own files. `down` ends the processes named there and
those that descend from them, nobody else's, and removes the folder. Linux only, where all of 127.0.0.0/8 is the machine itself.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raysegment.applications.cluster.certificates import make_certificates
from raysegment.archive.files import committed
from raysegment.climate.checks import BadInput
from raysegment.elastic import chaos
from raysegment.feed.session import worker_environment

FOLDER = "RAYSEGMENT_CLUSTER"  # the variable that names the folder
_MARK = "RAYSEGMENT_PRACTICE"  # the variable by which a cluster's processes are known, whoever their parent is
_BLOCK = 100  # ports of a node: its services first, then those of its workers
_SERVICES = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "object-manager-port",
    "node-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
_HEAD_ONLY = ("port", "dashboard-port", "ray-client-server-port")
_WORKER_PORTS = 30  # where they begin in a node's block
_METRICS = {"AUTOSCALER_METRIC_PORT": 20, "DASHBOARD_METRIC_PORT": 21}  # which Ray takes from the environment, for all alike
_FIRST_PORT, _LAST_PORT = 20000, 32000  # below those that Linux gives away by itself
_LONGEST = 40  # characters of the folder: a socket's whole path has 107, of which Ray's part is 61
_END_S = 20.0
_STARTS = 4  # of a node, at most
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class LocalOptions:
    """A head of `head_cpus` CPUs and `nodes` − 1 workers of `cpus` each.

    `port`: the first of 100 per node (0: some that are free). `store_mib`: each node's object store. `tls`: what Ray's
    processes say to each other is encrypted, and both ends show a certificate made for this cluster. `start_s`: how long
    a node may take to be there.
    """

    nodes: int = 2
    cpus: int = 1
    head_cpus: int = 0
    gpus: int = 0
    port: int = 0
    store_mib: int = 200
    tls: bool = False
    start_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 50:
            raise ValueError(f"nodes: expected 1 (the head alone) to 50, got {self.nodes}")
        if self.cpus < 1 or self.head_cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus: expected 1 or more, head_cpus, gpus: 0 or more, got {self}")
        if self.port and not 1024 <= self.port <= 65535 - _BLOCK * self.nodes:
            raise ValueError(f"port: expected 0 or 1024 to {65535 - _BLOCK * self.nodes}, got {self.port}")
        if self.store_mib < 80:
            raise ValueError(f"store_mib: expected 80 or more, which Ray needs, got {self.store_mib}")
        if self.start_s <= 0:
            raise ValueError(f"start_s: expected more than 0, got {self.start_s}")


@dataclass(frozen=True)
class Process:
    """A process that was started: a number that has since been given to another one is not taken for it."""

    pid: int
    began: int

    @staticmethod
    def of(pid: int) -> Process:
        return Process(pid, _began(pid))

    @property
    def lives(self) -> bool:
        return self.began > 0 and _began(self.pid) == self.began

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            if self.lives:
                os.kill(self.pid, number)


@dataclass(frozen=True)
class Node:
    """One `ray start`: its name (head, worker-1, …), address, first port and process."""

    name: str
    address: str
    port: int
    process: Process


@dataclass(frozen=True)
class LocalCluster:
    """What `cluster.json` holds."""

    folder: str
    nodes: tuple[Node, ...]
    tls: bool
    mark: str  # what all its processes, jobs among them, have in their environment

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def address(self) -> str:
        """What `ray.init` takes."""
        return f"{self.head.address}:{self.head.port + _SERVICES.index('port')}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.head.port + _SERVICES.index('dashboard-port')}"

    @property
    def token_file(self) -> Path:
        return Path(self.folder) / "token"

    def environment(self) -> dict[str, str]:
        """What whoever uses the cluster exports. No secret: the token is read from its file."""
        return {"RAY_ADDRESS": self.dashboard, **_environment(Path(self.folder), self.tls)}

    def summary(self) -> dict[str, Any]:
        nodes = [{"name": node.name, "address": node.address, "pid": node.process.pid, "lives": node.process.lives}
                 for node in self.nodes]  # fmt: skip
        return {"folder": self.folder, "address": self.address, "dashboard": self.dashboard, "tls": self.tls, "nodes": nodes}


def folder() -> Path:
    """Where the cluster's files are: $RAYSEGMENT_CLUSTER, or a folder of the user's own among the temporary ones."""
    named = os.environ.get(FOLDER)
    path = Path(named or Path(tempfile.gettempdir()) / f"raysegment-{getpass.getuser()}").absolute()
    if len(str(path)) > _LONGEST:
        raise BadInput(FOLDER, f"a folder of at most {_LONGEST} characters", path, f"Sockets lie below: set {FOLDER}=/tmp/NAME.")
    return path


# ---------------------------------------------------------------- up


def up(options: LocalOptions, say: Callable[[str], None] = print) -> LocalCluster:
    """Start the cluster and wait until all its nodes are there; what has been started is ended where that fails.

    BadInput where there is one already.
    """
    place = folder()
    _claim(place)
    rising = _Rising(options, place, say)
    try:
        _make_token(place / "token")
        if options.tls:
            make_certificates(place / "tls", [_address(number) for number in range(options.nodes)])
        rising.first = _ports(options)
        rising.rise(1)
        rising.rise(options.nodes)
    except BaseException:
        _end([node.process for node in rising.nodes], rising.mark)
        shutil.rmtree(place, ignore_errors=True)
        raise
    return rising.cluster


@dataclass
class _Rising:
    """A cluster that is being started."""

    options: LocalOptions
    place: Path
    say: Callable[[str], None]
    first: int = 0
    nodes: list[Node] = field(default_factory=list)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def cluster(self) -> LocalCluster:
        return LocalCluster(str(self.place), tuple(self.nodes), self.options.tls, self.mark)

    def rise(self, count: int) -> None:
        """Start nodes until there are `count`, and wait for them. A node that ends by itself is started again: Ray gives
        it 30 s, which a busy machine may not. RuntimeError with what its log says last, or TimeoutError."""
        for number in range(len(self.nodes), count):
            self._start(number)
        end, starts = time.monotonic() + self.options.start_s, dict.fromkeys(range(count), 1)
        while len(living(self.cluster)) < count:
            for number in [at for at, node in enumerate(self.nodes) if not node.process.lives]:
                if starts[number] == _STARTS:
                    raise RuntimeError(f"{self.nodes[number].name} has ended:\n{self._last_lines(number)}")
                starts[number] += 1
                self.say(f"{self.nodes[number].name} has ended, and is started again")
                self._start(number)
            if time.monotonic() > end:
                raise TimeoutError(f"expected {count} nodes within {self.options.start_s:g} s:\n{self._last_lines(count - 1)}")
            time.sleep(_LOOK_EVERY_S)
        self.say(f"{count} of {self.options.nodes} node(s) up")

    def _start(self, number: int) -> None:
        self.nodes[number : number + 1] = [_start(self.options, self.place, number, self.first, self.mark)]
        _write(self.cluster)

    def _last_lines(self, number: int, count: int = 15) -> str:
        return "\n".join((self.place / f"{self.nodes[number].name}.log").read_text(errors="replace").splitlines()[-count:])


def _claim(place: Path) -> None:
    try:
        place.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        known = "a practice cluster" if (place / "cluster.json").exists() else "something"
        raise BadInput(place, "no cluster yet", f"{known} that is there", f"`local.sh down`, or another {FOLDER}.") from None


def _make_token(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


def _ports(options: LocalOptions) -> int:
    """The first port of a block of which the services' are free. BadInput where those asked for are not."""
    taken: int | None = None
    candidates = [options.port] if options.port else range(_FIRST_PORT, _LAST_PORT - _BLOCK * options.nodes, 500)
    for first in candidates:
        taken = next((port for port in _service_ports(first, options.nodes) if not _free(port)), None)
        if taken is None:
            return first
    raise BadInput("port", "free ports", f"{taken}, which is in use", "Give another port=, or end what listens there.")


def _service_ports(first: int, nodes: int) -> Iterator[int]:
    for number in range(nodes):
        yield from range(first + number * _BLOCK, first + number * _BLOCK + _WORKER_PORTS)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def _address(number: int) -> str:
    """127.0.0.2 and on. Not 127.0.0.1, for which Ray puts the machine's address on the network."""
    return f"127.0.0.{number + 2}"


def _start(options: LocalOptions, place: Path, number: int, first: int, mark: str) -> Node:
    name = f"worker-{number}" if number else "head"
    port = first + number * _BLOCK
    words = start_words(options, place, number, first)
    ports = {key: str(first + at) for key, at in _METRICS.items()}
    environment = {**_node_environment(place, options.tls), **ports, _MARK: mark}
    with (place / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return Node(name, _address(number), port, Process.of(process.pid))


def start_words(options: LocalOptions, place: Path, number: int, first: int) -> list[str]:
    """The words of node `number`'s `ray start`, the head's for 0."""
    port, head = first + number * _BLOCK, number == 0
    services = [f"--{name}={port + at}" for at, name in enumerate(_SERVICES) if head or name not in _HEAD_ONLY]
    join = ["--head", "--dashboard-host=127.0.0.1"] if head else [f"--address={_address(0)}:{first + _SERVICES.index('port')}"]
    return [
        "start",
        *join,
        *services,
        f"--node-ip-address={_address(number)}",
        f"--min-worker-port={port + _WORKER_PORTS}",
        f"--max-worker-port={port + _BLOCK - 1}",
        f"--num-cpus={options.head_cpus if head else options.cpus}",
        f"--num-gpus={0 if head else options.gpus}",
        f"--object-store-memory={options.store_mib * 2**20}",
        f"--temp-dir={place / ('w' + str(number) if number else 'h')}",
        "--disable-usage-stats",
        "--block",
    ]


def _environment(place: Path, tls: bool) -> dict[str, str]:
    """How a client shows that it may: by files of its owner's."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place / "token")}
    files = {"RAY_TLS_SERVER_CERT": "node.crt", "RAY_TLS_SERVER_KEY": "node.key", "RAY_TLS_CA_CERT": "authority.crt"}
    return token | ({"RAY_USE_TLS": "1", **{key: str(place / "tls" / name) for key, name in files.items()}} if tls else {})


def _node_environment(place: Path, tls: bool) -> dict[str, str]:
    """What the nodes' processes see, jobs among them: this interpreter's programs first, and nothing of another cluster."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**inherited, **worker_environment(), **_environment(place, tls), "PATH": programs}


def _write(cluster: LocalCluster) -> None:
    with committed(Path(cluster.folder) / "cluster.json") as temporary:
        temporary.write_text(json.dumps(asdict(cluster), indent=1) + "\n")


def living(cluster: LocalCluster) -> list[str]:
    """The addresses of the nodes that the head takes for alive; none while it does not answer."""
    headers = {"Authorization": f"Bearer {cluster.token_file.read_text()}"}
    request = urllib.request.Request(f"{cluster.dashboard}/api/v0/nodes", headers=headers)
    try:
        with _DIRECTLY.open(request, timeout=10) as answer:
            listed = json.load(answer)["data"]["result"]["result"]
    except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError):
        return []
    return sorted(node["node_ip"] for node in listed if node["state"] == "ALIVE")


_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a loopback address is behind no proxy


# ---------------------------------------------------------------- status, down


def read_cluster() -> LocalCluster:
    """The cluster that is up; BadInput where there is none."""
    path = folder() / "cluster.json"
    try:
        content = json.loads(path.read_text())
        nodes = tuple(Node(**{**node, "process": Process(**node["process"])}) for node in content["nodes"])
        return LocalCluster(content["folder"], nodes, content["tls"], content["mark"])
    except FileNotFoundError:
        raise BadInput(path, "a practice cluster", "none", f"`local.sh up N` makes one ({FOLDER} names its folder).") from None
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(path, "what `local.sh up` writes", error, "End its processes by hand and remove the folder.") from None


def status() -> dict[str, Any]:
    """The cluster's nodes, and which of them the head takes for alive."""
    cluster = read_cluster()
    known = living(cluster)
    summary = cluster.summary()
    summary["nodes"] = [node | {"alive": node["address"] in known} for node in summary["nodes"]]
    return summary


def down() -> dict[str, Any]:
    """End the cluster's processes, workers' first, and remove its folder: how many ended how."""
    cluster = read_cluster()
    ended = _end([node.process for node in reversed(cluster.nodes)], cluster.mark)
    shutil.rmtree(cluster.folder)
    return {"folder": cluster.folder, "nodes": len(cluster.nodes), **ended}


def _end(processes: Sequence[Process], mark: str) -> dict[str, int]:
    """End nodes' processes and all others of their cluster: asked first, then killed, as are those that outlive them."""
    living = [process for process in processes if process.lives]
    others = [process for process in members(mark) if process not in living]
    for process in living:
        process.signal(signal.SIGTERM)
    _until_ended(living, _END_S)
    _until_ended(others, _END_S / 4)
    rest = [process for process in dict.fromkeys([*living, *others, *members(mark)]) if process.lives]
    for process in rest:
        process.signal(signal.SIGKILL)
    _until_ended(rest, _END_S)
    return {"ended": len(living), "killed": len(rest)}


def members(mark: str) -> list[Process]:
    """The processes with this mark in their environment, and those below them, whose titles may lie over it."""
    wanted, found = f"{_MARK}={mark}".encode(), set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile, or is somebody else's
            if wanted in entry.read_bytes().split(b"\0"):
                found.add(int(entry.parent.name))
    below = {child for pid in found for child in chaos.descendants(pid)}
    return [Process.of(pid) for pid in found | below]


def _until_ended(processes: Sequence[Process], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while any(process.lives for process in processes) and time.monotonic() < end:
        time.sleep(_LOOK_EVERY_S)


def _began(pid: int) -> int:
    """When a process began, in the machine's ticks; 0 where there is none (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def exports(environment: Mapping[str, str]) -> str:
    """Lines for a shell."""
    return "".join(f"export {key}={value}\n" for key, value in environment.items())
