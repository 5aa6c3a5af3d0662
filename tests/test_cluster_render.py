"""Rendered job scripts, run with a batch system that starts nothing; manifests, held against the facts of KubeRay's schema."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raysegment import config as configuration
from raysegment.applications.cluster.nodes import DrainOptions, WaitOptions, drain, wait_for_nodes
from raysegment.applications.cluster.options import JobOptions
from raysegment.applications.cluster.render import render
from raysegment.cli import VERBS
from raysegment.climate.checks import BadInput
from raysegment.elastic.settings import TrainConfig
from tests.fake_scheduler import FakeScheduler
from tests.helpers import ROOT
from tests.kuberay_v1 import problems
from tests.small_training import write_shards

NAMES = [verb.name for verb in VERBS]
RUN = "run=train small shards=/data/shards out=/data/runs/a"
HOSTS = ["a1", "a2", "a3"]
COMMAND = "train small shards=/data/shards out=/data/runs/a elastic.cells=[2,3] elastic.workers_per_cell=4"


def script(system: str, *words: str) -> str:
    asked = [RUN, "nodes=3", "min=2", "gpus=4", "poll_s=0.05", *words]
    text = render(system, asked, NAMES)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    return text


@pytest.fixture
def fake(tmp_path: Path) -> FakeScheduler:
    return FakeScheduler(tmp_path, HOSTS)


@pytest.mark.parametrize(
    ("system", "words"), [("slurm", []), ("lsf", []), ("lsf", ["launcher=blaunch"])], ids=["slurm", "jsrun", "blaunch"]
)
def test_one_raylet_per_host_and_the_command_on_the_first(fake, system, words):
    status, said = fake.run(script(system, *words))
    assert status == 0, said
    head, *others = [fake.calls("ray", host) for host in HOSTS]
    assert [len(calls) for calls in (head, *others)] == [1, 1, 1]
    assert "--head --port=22133 --dashboard-host=127.0.0.1 --dashboard-port=22134 --ray-client-server-port=22135" in head[0]
    assert all("--address=192.0.2.7:22133" in call and "--head" not in call for (call,) in others)
    assert all("--num-gpus=4" in call and "--block" in call for (call,) in (head, *others))
    assert fake.calls("raysegment", "a1") == ["cluster wait nodes=3 min=2 wait_s=1800 grace_s=120", COMMAND]
    assert [fake.calls("raysegment", host) for host in HOSTS[1:]] == [[], []]
    assert fake.up() == [], "every raylet is ended, by its own number"
    assert not [call for call in fake.calls("ray") if call.startswith("stop")]


def test_every_ray_process_has_the_token_from_a_file_of_its_owner(fake):
    text = script("slurm")
    status, said = fake.run(text)
    path = fake.folder / "home" / ".ray" / "auth_token"
    token = path.read_text()
    assert status == 0
    assert (len(token), stat.S_IMODE(path.stat().st_mode)) == (64, 0o600)
    assert fake.calls("auth") == [f"token {path}"] * 3
    written = [file.read_text() for file in fake.folder.rglob("*") if file.is_file() and file != path]
    assert not any(token in content for content in [text, said, *written])
    fake.run(text)
    assert path.read_text() == token, "one token for all jobs of a user"


def test_slurm_starts_a_step_for_each_host(fake):
    fake.run(script("slurm"))
    steps = fake.calls("srun")
    assert sorted(step.split("--nodelist=")[1].split()[0] for step in steps) == HOSTS
    assert all("--nodes=1 --ntasks=1" in step and "--cpus-per-task=32" in step and "--no-kill" in step for step in steps)


def test_a_host_that_drops_out_at_the_start_is_named_and_done_without(fake):
    fake.break_host("a3")
    status, said = fake.run(script("slurm"))
    assert status == 0, said
    assert "a3 has dropped out" in said
    assert COMMAND in fake.calls("raysegment")
    dropped = fake.folder / "home" / ".raysegment" / "jobs" / "dropped"
    assert dropped.read_text() == "a3\n"
    assert "#SBATCH --exclude=bad1,a3" in script("slurm", "exclude=[bad1]", f"exclude_file={dropped}")


def test_fewer_hosts_than_the_least_end_the_job_before_the_command(fake):
    for host in HOSTS[1:]:
        fake.break_host(host)
    status, said = fake.run(script("slurm"))
    assert status == 1, said
    assert [call.split()[1] for call in fake.calls("raysegment")] == ["wait"]
    assert fake.calls("scontrol")[1:] == [], "it would be as few again"
    assert fake.up() == []


def test_a_warned_job_ends_in_order_goes_back_into_the_queue_and_goes_on(fake):
    fake.behave("work")
    status, said = fake.signal_when_working(fake.start(script("slurm")), signal.SIGUSR1)
    assert (fake.folder / "committed").read_text() == "asked\n"
    assert fake.calls("scontrol").count("requeue 4711") == 1, said
    assert status == -signal.SIGKILL, "Slurm ends a job that it puts back"
    assert fake.up() == []
    fake.behave("finish")
    assert fake.run(script("slurm"))[0] == 0
    assert fake.calls("raysegment").count(COMMAND) == 2, "the same command, which resumes"
    assert fake.calls("scontrol").count("requeue 4711") == 1


def test_lsf_begins_a_warned_job_again(fake):
    fake.behave("work")
    text = script("lsf")
    status, _ = fake.signal_when_working(fake.start(text), signal.SIGUSR1)
    assert status == 99
    assert "#BSUB -Q 99" in text.splitlines()
    assert (fake.folder / "committed").exists()


def test_a_cancelled_job_ends_in_order_and_stays_away(fake):
    fake.behave("work")
    status, _ = fake.signal_when_working(fake.start(script("slurm")), signal.SIGTERM)
    assert status == 143
    assert (fake.folder / "committed").exists()
    assert fake.calls("scontrol")[1:] == []


def test_a_job_is_not_begun_again_for_ever(fake):
    fake.behave("work")
    status, said = fake.signal_when_working(fake.start(script("slurm", "requeues=0")), signal.SIGUSR1)
    assert (status, fake.calls("scontrol")[1:]) == (143, [])
    assert "requeues=0" in said


def test_bad_input_is_no_reason_to_try_again(fake):
    fake.behave("fail")
    assert fake.run(script("slurm"))[0] == 2
    assert fake.calls("scontrol")[1:] == []


def test_a_lost_head_puts_the_job_back(fake):
    fake.behave("work")
    job = fake.start(script("slurm"))
    fake.until(lambda: (fake.folder / "working").exists())
    for what in ("step-a1", "working", "up-a1"):
        fake.kill(what, signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    assert "a1 has dropped out" in said
    assert fake.calls("scontrol").count("requeue 4711") == 1
    assert fake.up() == ["a1"], "the dead host's, of which nobody hears"


def test_one_host_that_is_to_go_is_drained_and_the_rest_goes_on(fake):
    fake.behave("work")
    job = fake.start(script("slurm"))
    fake.until(lambda: (fake.folder / "working").exists())
    fake.kill("step-a3")
    fake.until(lambda: fake.up() == ["a1", "a2"])
    assert fake.calls("raysegment", "a3") == ["cluster drain deadline_s=120"]
    assert not (fake.folder / "committed").exists()
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert len(fake.calls("ray", "a3")) == 1, "a host that was asked to go does not come back"


def test_a_raylet_that_ends_by_itself_is_started_again(fake):
    fake.behave("work")
    job = fake.start(script("slurm"))
    fake.until(lambda: (fake.folder / "working").exists())
    fake.kill("up-a2")
    fake.until(lambda: len(fake.calls("ray", "a2")) == 2)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 143


def test_directives():
    text = script("slurm", "minutes=90", "warn_s=60", "queue=gpu", "account=climate", "smaller=true", "exclude=[n1]")
    directives = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    expected = (
        "nodes=2-3 gpus-per-node=4 time=90 partition=gpu account=climate exclude=n1 signal=B:USR1@60 requeue no-kill exclusive"
    )
    assert {f"--{word}" for word in expected.split()} <= directives
    text = script("lsf", "launcher=blaunch", "slots=8", "exclude=[n1,n2]", "queue=gpu", "warn_s=180")
    lines = [line.removeprefix("#BSUB ") for line in text.splitlines() if line.startswith("#BSUB")]
    assert {"-n 16,24", "-R \"select[hname!='n1' && hname!='n2'] span[ptile=8]\"", "-wt 3", "-wa USR1", "-r"} <= set(lines)


@pytest.mark.parametrize(
    ("system", "words", "said"),
    [
        ("slurm", ["nodse=3"], "Did you mean `nodes`"),
        ("slurm", ["min=4"], "min <= nodes"),
        ("slurm", ["run=trian small"], "Did you mean `train`"),
        ("slurm", ["run="], "begins with a verb"),
        ("slurm", ["run=train 'small"], "Close the quotation marks"),
        ("slurm", ["run=train small shards=s3://key:secret@bucket/shards"], "without credentials"),
        ("slurm", ["exclude=n12"], "text without brackets"),
        ("slurm", ["exclude=[n1,rack[3-4]]"], "Quote brackets"),
        ("slurm", ["exclude=[n1;reboot]"], "exclude"),
        ("slurm", ["name=a b"], "name"),
        ("slurm", ["setup=env.sh"], "absolute path"),
        ("slurm", ["exclude_file=/nowhere"], "no such file"),
        ("slurm", ["warn_s=5"], "30 or more"),
        ("slurm", ["dashboard=world"], "loopback, all"),
        ("lsf", ["warn_s=90"], "whole minutes"),
        ("lsf", ["launcher=mpirun"], "jsrun, blaunch"),
        ("kubernetes", ["poll_s=1"], "Known keys"),
        ("kubernetes", ["name=Run_1"], "name"),
        ("kubernetes", ["memory=lots"], "memory"),
        ("kubernetes", ["kind=pod"], "job, cluster"),
        ("kubernetes", ["queue_elastic=true"], "queue"),
        ("pbs", [], "slurm, lsf, kubernetes"),
    ],
)
def test_what_cannot_be_asked(system, words, said):
    with pytest.raises(BadInput, match=said) as bad:
        render(system, [RUN, "nodes=3", *words], NAMES)
    assert "key:secret" not in str(bad.value), "a message shows no credentials"


def test_what_is_asked_of_a_shell_stays_one_word(tmp_path):
    text = render("slurm", [f"run=inspect '$(touch {tmp_path}/ran)' \"a'b\""], NAMES)
    line = next(line for line in text.splitlines() if line.startswith("COMMAND="))
    shown = subprocess.run(["bash", "-c", f'{line}; printf "%s\\n" "${{COMMAND[@]}}"'], capture_output=True, text=True).stdout
    assert shown.splitlines() == ["raysegment", "inspect", f"$(touch {tmp_path}/ran)", "a'b"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("examples/*")), ids=lambda path: path.name)
def test_examples_are_what_is_rendered_now(path):
    text = path.read_text()
    (command,) = [line for line in text.splitlines() if "raysegment cluster render" in line]
    system, *words = shlex.split(command.lstrip("# "))[3:]
    assert render(system, words, NAMES) == text, f"render again: {command.lstrip('# ')} --out {path}"


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_shipped_configuration_takes_the_cells_that_are_rendered(gpus):
    words = JobOptions(run="train small shards=/data/shards out=/data/runs/a", nodes=3, min=2, gpus=gpus).words(NAMES)
    shipped = ROOT / "raysegment" / "configs" / f"{words[1]}.yaml"
    asked = configuration.load(TrainConfig, configuration.apply_overrides(configuration.read_yaml(shipped), words[2:]))
    assert (asked.elastic.cells, asked.workers_per_cell, asked.members) == ((2, 3), max(1, gpus), 3 * max(1, gpus))


def test_the_image_has_the_pinned_versions_and_no_rights():
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    installs = [words for word, words in lines if word == "RUN" and "pip install" in words]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in words for words in installs)
    users = [words for word, words in lines if word == "USER"]
    assert users == ["1000:1000"], "as the pods' securityContext has it"
    assert [word for word, _ in lines].index("USER") > max(n for n, (word, _) in enumerate(lines) if word == "RUN")
    copied = [name for word, words in lines if word == "COPY" and "--from" not in words for name in words.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
@pytest.mark.ray
def test_a_rendered_script_trains_on_two_nodes_of_ray(tmp_path):
    """The batch system is the fake one; head, node, token, waiting, training and the end are real."""
    job = str(os.getpid())
    write_shards(tmp_path / "shards")
    command = f"run=train small shards={tmp_path}/shards out={tmp_path}/run steps=6"
    text = render("slurm", [command, "nodes=2", "min=2", "cpus=1", "poll_s=0.5", "wait_s=240"], NAMES)
    running = FakeScheduler(tmp_path, ["h0", "h1"], real=True).start(text, SLURM_JOB_ID=job, PYTHONPATH=str(ROOT))
    said, _ = running.communicate(timeout=600)
    shutil.rmtree(f"/tmp/rs-{os.getuid()}-{job}", ignore_errors=True)
    assert running.returncode == 0, said
    assert "2 members from step 0" in said
    assert (tmp_path / "run" / "summary.json").exists()


# ---------------------------------------------------------------- Kubernetes


VARIANTS = {
    "job": ["priority=high", "claim_gib=500", "storage_class=fast"],
    "job in a queue of Kueue's": ["queue=research", "priority=high"],
    "elastic job in a queue of Kueue's": ["queue=research", "queue_elastic=true"],
    "cluster": ["kind=cluster", "token_secret=ray-token"],
    "cluster with a Redis of the site's": ["kind=cluster", "redis_address=redis.site:6379", "dashboard=all"],
    "cluster with its state on a volume": ["kind=cluster", "store=rocksdb"],
    "cluster without": ["kind=cluster", "store=none", "gpus=0"],
}


def manifests(*words: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render("kubernetes", [RUN, "nodes=3", "min=2", "gpus=4", *words], NAMES)))


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """All pods' specs, wherever they are."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        yield from pods(item)


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_manifests_fit_the_schemas(words):
    documents = manifests(*words)
    assert {document["kind"]: problems(document) for document in documents if problems(document)} == {}
    assert documents[-1]["apiVersion"] == "ray.io/v1"
    cluster = cluster_of(documents[-1])
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_pods_have_no_rights_and_no_secrets(words):
    documents = manifests(*words)
    found = list(pods(documents))
    assert len(found) >= 2
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}
            }  # fmt: skip
            secret = [v for v in container.get("env", []) if re.search("TOKEN|PASSWORD|SECRET|KEY", v["name"])]
            assert all("value" not in variable for variable in secret)
    assert not any(document["kind"] == "Secret" for document in documents)


def test_workers_are_an_elastic_group_on_shared_storage():
    job = manifests(*VARIANTS["job"])[-1]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 3)
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert shlex.split(job["spec"]["entrypoint"]) == ["python", "-m", "raysegment", *COMMAND.split()]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["raysegment", "cluster", "drain", "deadline_s=110"]
    assert (pod["terminationGracePeriodSeconds"], pod["priorityClassName"]) == (120, "high")
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == "raysegment"
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_a_head_may_die():
    job = manifests(*VARIANTS["job"])[-1]["spec"]
    assert job["backoffLimit"] == 20, "the command is the head's: both are begun again, and the command resumes"
    service, stateful, _, cluster = manifests(*VARIANTS["cluster"])
    store = cluster["spec"]["gcsFaultToleranceOptions"]
    assert store["redisAddress"] == f"{service['metadata']['name']}:6379"
    password = store["redisPassword"]["valueFrom"]["secretKeyRef"]
    (variable,) = stateful["spec"]["template"]["spec"]["containers"][0]["env"]
    assert variable["valueFrom"]["secretKeyRef"] == password
    assert service["spec"]["selector"].items() <= stateful["spec"]["template"]["metadata"]["labels"].items()
    kinds = [document["kind"] for document in manifests(*VARIANTS["cluster with a Redis of the site's"])]
    assert kinds == ["NetworkPolicy", "RayCluster"]


def test_kueue_admits_a_whole_job_or_an_elastic_one():
    whole = manifests(*VARIANTS["job in a queue of Kueue's"])[-1]
    labels = {"kueue.x-k8s.io/queue-name": "research", "kueue.x-k8s.io/priority-class": "high"}
    assert labels.items() <= whole["metadata"]["labels"].items()
    assert whole["spec"]["suspend"]
    (group,) = whole["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (whole["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"], group["minReplicas"]) == (False, 3)
    elastic = manifests(*VARIANTS["elastic job in a queue of Kueue's"])[-1]
    assert elastic["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert elastic["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]


def test_the_dashboard_is_its_hosts_alone_unless_asked():
    def listens(*words: str) -> str:
        return cluster_of(manifests(*words)[-1])["headGroupSpec"]["rayStartParams"]["dashboard-host"]

    assert listens("kind=cluster") == "127.0.0.1"
    assert listens("kind=cluster", "dashboard=all") == "0.0.0.0"
    assert listens() == "0.0.0.0", "KubeRay hands a job over there"
    policy = next(document for document in manifests() if document["kind"] == "NetworkPolicy")["spec"]
    own, operator = policy["ingress"]
    labels = policy["podSelector"]["matchLabels"]
    assert own["from"] == [{"podSelector": {"matchLabels": labels}}]
    assert [port["port"] for port in operator["ports"]] == [8265]
    templates = [pod["metadata"]["labels"] for pod in templates_of(manifests()[-1])]
    assert len(templates) == 3, "head, workers and the one that submits"
    assert all(labels.items() <= template.items() for template in templates)


def templates_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = [document["spec"]["submitterPodTemplate"]] if document["kind"] == "RayJob" else []
    return [*(group["template"] for group in groups), *submitter]


def test_the_facts_refuse_what_the_operator_would():
    good = manifests(*VARIANTS["job"])[-1]

    def broken(change: Callable[[dict[str, Any]], Any]) -> list[str]:
        document = copy.deepcopy(good)
        change(document["spec"])
        return problems(document)

    assert problems(good) == []
    assert broken(lambda spec: spec["rayClusterSpec"].update(authOption={"mode": "token"}))
    assert broken(lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"))
    assert broken(lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("minReplicas"))
    assert broken(lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=9))
    assert broken(lambda spec: spec["rayClusterSpec"].update(rayVersion="2.51.0"))
    assert broken(lambda spec: spec.update(shutdownAfterJobFinishes=False))
    assert broken(lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(restartPolicy="Always"))


# ---------------------------------------------------------------- nodes


class Clock:
    """Time that passes by being waited for."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def wait(arrivals: list[float], **options: Any) -> dict[str, Any]:
    """What waiting brings when nodes come at these times (s); before the first nothing answers."""
    clock = Clock()

    def nodes() -> list[dict[str, Any]]:
        there = [{}] * sum(time <= clock.now for time in arrivals)
        if not there:
            raise ConnectionError("no head")
        return there

    return wait_for_nodes(WaitOptions(**options), nodes, lambda _: None, clock, clock.sleep)


def test_nodes_are_awaited_all_of_them_or_enough_or_not_for_ever():
    asked = {"nodes": 4, "min": 2, "wait_s": 600, "grace_s": 60}
    assert wait([10, 10, 40, 300], **asked) == {"nodes": 3, "of": 4, "seconds": 100, "kept": True}
    assert wait([0, 1, 2, 3], **asked)["seconds"] == 4
    assert wait([10, 500], **asked) == {"nodes": 2, "of": 4, "seconds": 560, "kept": True}
    assert wait([10, 599, 600], **asked) == {"nodes": 3, "of": 4, "seconds": 600, "kept": True}
    assert wait([10], **asked) == {"nodes": 1, "of": 4, "seconds": 600, "kept": False}
    assert wait([], **asked)["kept"] is False


@given(st.lists(st.integers(0, 700), max_size=6), st.integers(1, 6), st.data())
def test_waiting_ends_in_time_with_what_there_is(arrivals, nodes, data):
    least = data.draw(st.integers(1, nodes))
    found = wait([float(time) for time in arrivals], nodes=nodes, min=least, wait_s=600, grace_s=60)
    assert found["seconds"] <= 602
    assert found["nodes"] == sum(time <= found["seconds"] for time in arrivals)
    assert found["kept"] == (found["nodes"] >= least)
    if found["seconds"] < 600:
        assert found["nodes"] >= least


def test_a_node_is_drained_by_its_address(monkeypatch):
    nodes = [{"NodeID": "aa", "NodeManagerAddress": "192.0.2.1"}, {"NodeID": "bb", "NodeManagerAddress": "192.0.2.2"}]
    asked: list[list[str]] = []
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr(subprocess, "run", lambda words, **_: asked.append(words) or subprocess.CompletedProcess(words, 0))
    clock = Clock()
    found = drain(DrainOptions("192.0.2.2", 60), lambda: nodes, clock.sleep)
    assert found == {"address": "192.0.2.2", "drained": ["bb"], "deadline_s": 60}
    (words,) = asked
    assert words[3:7] == ["drain-node", "--address", "192.0.2.1:6379", "--node-id"]
    assert words[7] == "bb"
    assert words[-2:] == ["--deadline-remaining-seconds", "60"]
    assert clock.now == 20, "the members' time to leave"
    with pytest.raises(BadInput, match=r"192\.0\.2\.3"):
        drain(DrainOptions("192.0.2.3"), lambda: nodes, clock.sleep)
    monkeypatch.setenv("RAY_ADDRESS", "http://192.0.2.1:8265")
    with pytest.raises(BadInput, match=r"RAY_ADDRESS: expected .*, HEAD:PORT, got a dashboard's, .*submit\.sh"):
        drain(DrainOptions("192.0.2.2"), lambda: nodes, clock.sleep)
