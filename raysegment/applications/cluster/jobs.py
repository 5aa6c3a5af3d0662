"""What `cluster/submit.sh` asks of a Ray cluster around its `ray job submit`: may this job begin, and how did it end.

    python -m raysegment.applications.cluster.jobs admit ID FOLDER VERB WORD…   status 0: submit it; 3: it runs, follow it
    python -m raysegment.applications.cluster.jobs status ID                    the command's own status

`admit` prints the submission id (ID, unless that is empty) and the runtime environment as JSON; FOLDER is to be uploaded, if
it is not empty.

Ray refuses a submission id that it knows, also that of a job that has ended, and `ray job submit` has one status for all
failures: hence these.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from raysegment.applications.cluster.options import STOP_S, check_no_secret
from raysegment.climate.checks import BadInput

COMMAND = ("python", "-m", "raysegment")
BAD_INPUT, FAILURE, FOLLOW, STOPPED = 2, 1, 3, 143
EXCLUDED = (  # of an uploaded working directory: what is large, what can be made again, what is nobody's business
    ".?*",  # hidden files; `.*` would be the folder itself as well
    "__pycache__",
    "*.egg-info",
    "venv",
    "build",
    "dist",
    "tests",
    "docs",
    "runs",
    "shards",
    "checkpoints",
    "*.arrow",
    "*.nc",
    "*.h5",
    "*.hdf5",
    "*.zarr",
    "*.npy",
    "*.npz",
    "*.grib*",
    "*.safetensors",
    "*.parquet",
    "*.pem",
    "*.key",
)
UPLOAD_BYTES = 5_000_000  # at most, packed: code is small, and every node that has a part of the job fetches it
_SETTLE_S = 20.0
_LOOK_EVERY_S = 0.2


def job_name(words: Sequence[str]) -> str:
    """The submission id of a command that was given none: its verb and a digest, the same for the same command."""
    return f"{words[0]}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:10]}"


def environment(working_dir: str = "") -> dict[str, Any]:
    """A job's runtime environment: one variable, nothing to install; and what of a folder to upload stays here."""
    variables: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
    return {**variables, "excludes": list(EXCLUDED)} if working_dir else variables


def check_upload(working_dir: str) -> None:
    """BadInput where what is to be uploaded of a folder is too much. (The job server's own limit is 500 MiB.)"""
    with tempfile.TemporaryDirectory() as place:
        package, quiet = Path(place) / "package.zip", logging.Logger("packing", logging.ERROR)
        create_package(working_dir, package, include_gitignore=True, excludes=list(EXCLUDED), logger=quiet)
        size = package.stat().st_size
        if size > UPLOAD_BYTES:
            with zipfile.ZipFile(package) as content:
                files = sorted(content.infolist(), key=lambda file: file.compress_size, reverse=True)
            largest = ", ".join(f"{file.filename} ({file.compress_size / 1e6:.1f} MB)" for file in files[:3])
            got = f"{size / 1e6:.1f} MB in {working_dir}, largest {largest}"
            remedy = "Name what no job needs in its .gitignore or .rayignore."
            raise BadInput("WORKING_DIR", f"at most {UPLOAD_BYTES / 1e6:g} MB of code, packed", got, remedy)


def admit(client: JobSubmissionClient, job: str, words: Sequence[str]) -> bool:
    """Whether the job is to be submitted: an earlier one of its name has ended, and is forgotten, or there is none.

    False where this very command runs under that name; BadInput where another one does.
    """
    for word in words:
        check_no_secret(word)
    known = _info(client, job)
    if known is None:
        return True
    if known.status.is_terminal():
        client.delete_job(job)
        return True
    if known.entrypoint == shlex.join(words):
        return False
    raise BadInput("SUBMISSION_ID", "the name of no running job", f"{job}, which runs `{known.entrypoint}`", "Choose another.")


def outcome(client: JobSubmissionClient, job: str, patience_s: float = _SETTLE_S) -> int:
    """The status of the job's command: its own, 143 where it was stopped, 1 where it was killed or never began."""
    end = time.monotonic() + patience_s
    while (known := _info(client, job)) is None or not known.status.is_terminal():
        if known is None or time.monotonic() > end:
            return FAILURE
        time.sleep(_LOOK_EVERY_S)
    if known.status == JobStatus.SUCCEEDED:
        return 0
    if known.status == JobStatus.STOPPED:
        return STOPPED
    return known.driver_exit_code if known.driver_exit_code in (BAD_INPUT, STOPPED) else FAILURE  # 137 where it was killed


def _info(client: JobSubmissionClient, job: str) -> JobDetails | None:
    """What the cluster knows of a job, None where it knows of none."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise


def _client() -> JobSubmissionClient:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise BadInput("RAY_ADDRESS", "the dashboard's address", address or "nothing", "Set RAY_ADDRESS=http://HEAD:8265.")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        got = next(iter(str(error).splitlines()), "").rstrip(".")
        raise BadInput("RAY_AUTH_TOKEN_PATH", "the file with the cluster's token", got, "Name that file.") from None
    except ConnectionError as error:
        raise BadInput("RAY_ADDRESS", "a dashboard that answers", f"{address}: {error}", "Is the cluster up?") from None


def main(arguments: Sequence[str]) -> int:
    """One of the questions above; what is wrong goes to standard error."""
    try:
        match list(arguments):
            case ["admit", job, folder, *words]:
                job = job or job_name(words)
                if folder:
                    check_upload(folder)
                print(job, json.dumps(environment(folder)), sep="\n")
                return 0 if admit(_client(), job, [*COMMAND, *words]) else FOLLOW
            case ["status", job]:
                return outcome(_client(), job)
    except BadInput as bad:
        print(f"submit.sh: {bad}", file=sys.stderr)
        return BAD_INPUT
    raise AssertionError(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
