"""The practice cluster, and jobs on it as on any other: submitted, refused, stopped, killed, submitted again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray._private.runtime_env import packaging
from ray.job_submission import JobStatus

from raysegment.applications.cluster.certificates import make_certificates
from raysegment.applications.cluster.jobs import UPLOAD_BYTES, admit, check_upload, environment, job_name, outcome
from raysegment.applications.cluster.local import LocalOptions, members, start_words, up
from raysegment.climate.checks import BadInput
from raysegment.elastic.settings import plain
from tests.campaigns import campaign_mapping
from tests.helpers import ROOT
from tests.practice import Practice, raised, run
from tests.small_training import config, write_shards

STEPS = 240


# ---------------------------------------------------------------- without a cluster


def test_nodes_share_no_port_address_or_folder():
    options = LocalOptions(nodes=4, cpus=3)
    nodes = [start_words(options, Path("/tmp/practice"), number, 20000) for number in range(4)]
    own = [
        {word.split("=")[1] for word in words if "node-ip" in word or "temp-dir" in word or "port=" in word} for words in nodes
    ]
    assert all(not one & other for number, one in enumerate(own) for other in own[:number])
    assert [sum("port=" in word for word in words) for words in nodes] == [11, 8, 8, 8]
    assert "--dashboard-host=127.0.0.1" in nodes[0]
    assert "--address=127.0.0.2:20000" in nodes[3]
    assert "--num-cpus=3" in nodes[3]


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"cpus": 0}, {"port": 80}, {"port": 65500}, {"store_mib": 1}])
def test_what_a_practice_cluster_cannot_have(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LocalOptions(**wrong)


def test_a_folder_that_is_there_is_nobodys_cluster(tmp_path, monkeypatch):
    for path, said in ((tmp_path, "no cluster yet|at most"), (Path("/tmp") / ("long" * 20), "at most 40")):
        monkeypatch.setenv("RAYSEGMENT_CLUSTER", str(path))
        with pytest.raises(BadInput, match=said):
            up(LocalOptions())
        assert path == tmp_path or not path.exists()


def test_a_certificate_is_for_these_hosts_and_its_key_for_its_owner(tmp_path):
    make_certificates(tmp_path / "tls", ["127.0.0.2", "node.example"])
    assert stat.S_IMODE((tmp_path / "tls" / "node.key").stat().st_mode) == 0o600
    assert not list((tmp_path / "tls").glob("authority.key*"))
    said = subprocess.run(
        ["openssl", "verify", "-CAfile", "authority.crt", "-verify_ip", "127.0.0.2", "node.crt"],
        cwd=tmp_path / "tls", capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout == "node.crt: OK\n", said.stderr


class Client:
    """As much of Ray's client as is asked: one job, which Ray knows or not."""

    def __init__(self, status: str = "", entrypoint: str = "python -m raysegment inspect 'a b'", code: int | None = None):
        self.known, self.forgotten = status, []
        self.info = SimpleNamespace(status=JobStatus(status or "PENDING"), entrypoint=entrypoint, driver_exit_code=code)

    def get_job_info(self, job: str):
        if not self.known:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist")
        return self.info

    def delete_job(self, job: str) -> None:
        self.forgotten.append(job)


WORDS = ["python", "-m", "raysegment", "inspect", "a b"]


def test_a_command_has_one_name():
    assert job_name(["train", "a"]) == job_name(["train", "a"]) != job_name(["train", "a b"])
    assert job_name(["train", "a"]).startswith("train-")


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_an_earlier_job_of_that_name_is_forgotten_when_it_has_ended(status):
    client = Client(status)
    assert admit(client, "a", WORDS)
    assert client.forgotten == ["a"]


def test_a_running_job_is_followed_and_no_other_takes_its_name():
    client = Client("RUNNING")
    assert not admit(client, "a", WORDS)
    with pytest.raises(BadInput, match="which runs `python -m raysegment inspect"):
        admit(client, "a", [*WORDS, "more"])
    assert client.forgotten == []
    assert admit(Client(), "a", WORDS)


def test_a_command_with_a_credential_in_it_is_not_submitted():
    with pytest.raises(BadInput, match="without credentials") as bad:
        admit(Client(), "a", [*WORDS, "s3://key:secret@bucket/shards"])
    assert "key:secret" not in str(bad.value)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", 137, 1),
        ("FAILED", 143, 143),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
        ("", None, 1),
    ],
)
def test_a_jobs_status_is_its_commands(status, code, expected):
    assert outcome(Client(status, code=code), "a") == expected


def test_a_job_that_does_not_end_is_a_failure():
    assert outcome(Client("RUNNING"), "a", patience_s=0) == 1


def test_what_is_uploaded_of_a_folder_is_its_code_and_small(tmp_path):
    stay = (".ssh/id", "data.nc", "raysegment/key.pem", "runs/a/steps.jsonl", "ignored/b")
    for name in ("raysegment/__main__.py", "run.yaml", *stay):
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text("text")
    (tmp_path / "code" / ".gitignore").write_text("ignored\n")

    def uploaded(folder: Path, package: Path) -> list[str]:
        packaging.create_package(str(folder), package, True, excludes=environment(str(folder))["excludes"])
        with zipfile.ZipFile(package) as content:
            return sorted(name for name in content.namelist() if not name.endswith("/"))

    assert uploaded(tmp_path / "code", tmp_path / "code.zip") == ["raysegment/__main__.py", "run.yaml"]
    assert {"raysegment/cli.py", "raysegment/configs/small.yaml"} <= set(uploaded(ROOT, tmp_path / "own.zip"))
    assert (tmp_path / "own.zip").stat().st_size < UPLOAD_BYTES
    check_upload(str(ROOT))
    (tmp_path / "code" / "large.bin").write_bytes(os.urandom(UPLOAD_BYTES))
    with pytest.raises(BadInput, match=r"WORKING_DIR: expected at most 5 MB .* got 5.0 MB in .*, largest large.bin \(5.0 MB\)"):
        check_upload(str(tmp_path / "code"))


# ---------------------------------------------------------------- with one


@pytest.fixture(scope="module")
def practice() -> Iterator[Practice]:
    with raised() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Practice]:
    with raised("--tls") as cluster:
        yield cluster


def slow(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.ray(pytest.mark.timeout(1800)(test)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(happened: Callable[[], object], patience_s: float = 900.0) -> None:
    end = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def training(folder: Path, steps: int = STEPS) -> list[str]:
    """The words of a training run of one or two members."""
    folder.mkdir(exist_ok=True)
    settings = plain(config(write_shards(folder / "shards"), folder / "run", steps=steps, cpus_per_worker=1))
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["train", str(folder / "run.yaml"), "elastic.cells=[1,2]", "elastic.workers_per_cell=1"]


def status_code(address: str, token: str | None) -> int:
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


@slow
def test_each_node_is_a_process_of_its_own_and_up_is_said_once(practice):
    nodes = practice.state["nodes"]
    assert [node["name"] for node in nodes] == ["head", "worker-1"]
    assert len({node["address"] for node in nodes} | {node["process"]["pid"] for node in nodes}) == 4
    assert stat.S_IMODE((practice.folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(practice.folder.stat().st_mode) == 0o700
    for words, said in ((["up", "2"], "no cluster yet"), (["up", "none"], "nodes"), (["fly"], "up N, status or down")):
        status, _, error = practice.local(*words)
        assert (status, said in error) == (2, True), error
    status, out, _ = practice.local("status", "--json")
    assert status == 0
    assert [node["alive"] for node in json.loads(out)["nodes"]] == [True, True]


@slow
def test_who_has_no_token_is_refused(practice):
    for path in ("/api/jobs/", "/api/v0/nodes", "/api/version"):
        codes = [status_code(practice.dashboard + path, token) for token in (None, "of-another", practice.token)]
        assert codes == [401, 403, 200], path
    script = f"import ray; ray.init({practice.address!r}, log_to_driver=False); print('in')"
    bare = {key: value for key, value in practice.environment.items() if not key.startswith("RAY_")}
    status, out, error = run([sys.executable, "-c", script], bare)
    assert (status, out) == (1, ""), error
    assert run([sys.executable, "-c", script], practice.environment)[:2] == (0, "in\n")
    (practice.folder / "other").write_text("of-another")
    status, said = practice.submit("inspect", "/tmp", RAY_AUTH_TOKEN_PATH=str(practice.folder / "other"))
    assert status == 2, said
    assert "RAY_AUTH_TOKEN_PATH: expected the file with the cluster's token" in said


@slow
def test_dashboards_listen_on_loopback_only(practice):
    head = practice.state["nodes"][0]["port"]
    found = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {words[1].split(":")[0] for words in found if int(words[1].split(":")[1], 16) == head + 1 and words[3] == "0A"}
    assert hosts == {"0100007F"}


@slow
def test_the_status_tells_bad_input_from_failure(practice, tmp_path):
    assert practice.submit("inspect", str(write_shards(tmp_path / "shards", tiles=2)))[0] == 0
    status, said = practice.submit("inspect", str(tmp_path / "nothing"))
    assert (status, "expected a file or a folder, got no such path" in said) == (2, True), said
    assert practice.submit(RAY_ADDRESS="")[0] == 2
    assert practice.submit("inspect", "a", RAY_ADDRESS="")[0] == 2
    status, _, said = run([sys.executable, "-m", "raysegment", *training(tmp_path / "here")], practice.environment)
    assert (status, "got a dashboard's" in said) == (2, True), said
    assert practice.submit("inspect", "a", WORKING_DIR=str(tmp_path / "nothing"))[0] == 2


@slow
def test_a_killed_job_goes_on_when_the_same_command_is_said_again(practice, tmp_path):
    words = training(tmp_path)
    run_folder = tmp_path / "run"
    words_, environment = practice.command(*words)
    transcript = [f"$ cluster/submit.sh {' '.join(words)}"]
    first = subprocess.Popen(words_, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: len(lines(run_folder / "steps.jsonl")) > 30)
    driver = driver_of(run_folder.parent / "run.yaml")
    os.kill(driver, signal.SIGKILL)
    said, _ = first.communicate(timeout=600)
    transcript += [said, f"$ kill -KILL {driver}   # the job's driver, meanwhile", f"status {first.returncode}"]
    assert first.returncode == 1, said
    committed = len(lines(run_folder / "steps.jsonl"))
    begun = len(lines(run_folder / "events.jsonl"))
    assert 30 < committed < STEPS

    status, again = practice.submit(*words)
    transcript += [f"$ cluster/submit.sh {' '.join(words)}   # the same again", again, f"status {status}"]
    keep(transcript)
    assert status == 0, again
    ready = [event for event in lines(run_folder / "events.jsonl")[begun:] if event["event"] == "ready"]
    assert ready[0]["step"] > 0, "it did not begin anew"
    assert [step["step"] for step in lines(run_folder / "steps.jsonl")] == list(range(STEPS))
    logs = practice.client().get_job_logs(job_name(words))
    assert practice.token not in said + again + logs


@slow
def test_a_stopped_job_ends_with_its_state_on_record(practice, tmp_path):
    words, name = training(tmp_path, 20 * STEPS), "stopped-job"
    command, environment = practice.command(*words, SUBMISSION_ID=name)
    follower = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: len(lines(tmp_path / "run" / "steps.jsonl")) > 30)
    client, asked = practice.client(), time.monotonic()
    client.stop_job(name)
    until(lambda: client.get_job_status(name) == JobStatus.STOPPED)
    print(f"stopped after {time.monotonic() - asked:.1f} s")
    said, _ = follower.communicate(timeout=600)
    committed = len(lines(tmp_path / "run" / "steps.jsonl"))
    assert f"stopped (SIGTERM) after {committed} of {20 * STEPS} steps" in said, said
    assert follower.returncode == 143


@slow
def test_a_campaign_as_a_job_goes_on_when_the_same_command_is_said_again(practice, tmp_path):
    """Its driver is killed when the first of two trials has finished, which is not run again."""
    file, journal = tmp_path / "campaign.yaml", tmp_path / "c" / "journal.jsonl"
    file.write_text(yaml.safe_dump(campaign_mapping(tmp_path / "c", write_shards(tmp_path / "shards"), at_once=1)))
    words, environment = practice.command("tune", str(file), "--json")
    first = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: any(line["event"] == "ended" for line in lines(journal)))
    os.kill(driver_of(file), signal.SIGKILL)
    said, _ = first.communicate(timeout=600)
    assert first.returncode == 1, said
    (ended,) = [line["trial"] for line in lines(journal) if line["event"] == "ended"]
    begun = len(lines(journal))

    status, again = practice.submit("tune", str(file), "--json")
    assert status == 0, again
    result = next(json.loads(line) for line in again.splitlines() if line.startswith('{"trials"'))
    assert (result["trials"], result["finished"], result["failed"]) == (2, 2, 0)
    assert ended not in [line["trial"] for line in lines(journal)[begun:] if line["event"] == "added"]


@slow
def test_the_code_of_a_working_directory_goes_before_the_installed_one(practice, tmp_path):
    code = tmp_path / "code"
    shutil.copytree(ROOT / "raysegment", code / "raysegment", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "raysegment" / "__main__.py").write_text("print('from the working directory')\n")
    (code / "large.nc").write_bytes(b"x" * 6_000_000)
    status, said = practice.submit("inspect", "a", WORKING_DIR=str(code), SUBMISSION_ID="uploaded")
    assert (status, "from the working directory" in said) == (0, True), said
    print([line for line in said.splitlines() if "Pushing" in line or "package" in line])
    (code / "large.bin").write_bytes(os.urandom(6_000_000))
    status, said = practice.submit("inspect", "b", WORKING_DIR=str(code), SUBMISSION_ID="too-large")
    assert (status, "WORKING_DIR: expected at most 5 MB" in said) == (2, True), said
    assert "too-large" not in {job.submission_id for job in practice.client().list_jobs()}


@slow
def test_no_secret_is_in_what_a_cluster_writes_down(practice):
    """Run after jobs: logs of all of Ray's processes, and the record of the cluster."""
    token = practice.token.encode()
    written = [path for path in practice.folder.rglob("*") if path.is_file() and not path.is_symlink() and path.name != "token"]
    assert len(written) > 20
    assert [path for path in written if token in path.read_bytes()] == []
    details = [job.model_dump_json() for job in practice.client().list_jobs()]
    assert not any(practice.token in job for job in details)
    arguments = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    assert not any(token in words for words in arguments)


@slow
def test_tls_lets_nobody_in_who_has_no_certificate(encrypted, tmp_path):
    status, said = encrypted.submit("inspect", str(write_shards(tmp_path / "shards", tiles=2)))
    assert status == 0, said
    script = f"import ray; ray.init({encrypted.address!r}, log_to_driver=False); print(ray.cluster_resources()['CPU'])"
    assert run([sys.executable, "-c", script], encrypted.environment)[:2] == (0, "2.0\n")
    host, port = encrypted.address.split(":")
    make_certificates(tmp_path / "own", [host])
    assert [is_answered(host, int(port), shown) for shown in (encrypted.folder / "tls", None, tmp_path / "own")] == [
        True,
        False,
        False,
    ]
    plainly = {key: value for key, value in encrypted.environment.items() if "TLS" not in key}
    done = subprocess.Popen(
        [sys.executable, "-c", script], env=plainly, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: "Failed to connect" in done.stderr.readline())  # Ray tries for minutes
    finally:
        done.kill()
    assert done.stdout.read() == ""


@slow
def test_down_ends_all_that_is_of_the_cluster_also_of_a_node_that_was_killed(encrypted):
    mark = encrypted.state["mark"]
    assert len(members(mark)) > 20
    os.kill(encrypted.state["nodes"][1]["process"]["pid"], signal.SIGKILL)
    status, out, said = encrypted.local("down", "--json")
    assert (status, json.loads(out)["ended"]) == (0, 1), said
    assert members(mark) == []
    assert not encrypted.folder.exists()
    assert encrypted.local("down")[0] == 2


def is_answered(host: str, port: int, certificates: Path | None) -> bool:
    """Whether Ray's head talks on a TLS connection, begun as gRPC begins one, with these certificates or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificates is not None:
        context.load_cert_chain(certificates / "node.crt", certificates / "node.key")
    try:
        with socket.create_connection((host, port), timeout=60) as plain_line, context.wrap_socket(plain_line) as line:
            line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            return bool(line.recv(9))
    except OSError:
        return False


def driver_of(config_file: Path) -> int:
    """The process of the job's command."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0") if readable(path) else []
        if str(config_file).encode() in words and words[0].endswith(b"python") and b"raysegment" in words:
            return int(path.parent.name)
    raise AssertionError("no driver")


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def keep(transcript: list[str]) -> None:
    """Leave the transcript where $TRANSCRIPT says, for the documentation."""
    if "TRANSCRIPT" in os.environ:
        Path(os.environ["TRANSCRIPT"]).write_text("\n".join(transcript) + "\n")
