"""An S3 server of the tests' own, and faults in its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

BUCKET = "tiles"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


@dataclass
class Faults:
    """A WSGI application in front of another; it answers the next `left` requests of `method` with an error itself."""

    application: Callable[..., Iterable[bytes]]
    method: str = ""
    status: str = ""
    code: str = ""
    left: int = 0
    fired: int = 0
    seen: list[str] = field(default_factory=list)

    def __call__(self, environ: dict, start_response: Callable[..., object]) -> Iterable[bytes]:
        self.seen.append(environ["REQUEST_METHOD"])
        if not self.left or environ["REQUEST_METHOD"] != self.method:
            return self.application(environ, start_response)
        self.left, self.fired = self.left - 1, self.fired + 1
        body = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>injected</Message></Error>".encode()
        start_response(self.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    @contextmanager
    def answering(self, method: str, status: str, code: str, times: int) -> Iterator[Faults]:
        """Within the block, `times` requests of `method` fail with `status` and S3's error `code`; `fired` counts them."""
        self.method, self.status, self.code, self.left, self.fired = method, status, code, times, 0
        self.seen.clear()
        try:
            yield self
        finally:
            self.left = 0


@dataclass(frozen=True)
class Server:
    """A running server: the URI of its bucket, and the faults in front of it."""

    uri: str
    faults: Faults


def below(uri: str, folder: str) -> str:
    """The URI of a folder below another: `folder` goes in front of the options."""
    place, mark, options = uri.partition("?")
    return f"{place}/{folder}{mark}{options}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """An S3 server on a free port with the bucket `tiles`; its credentials are in the environment until the session ends.

    A process that is to reach it must be started after it, Ray's workers too: ask for this fixture before Ray's.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        server.start()
        host, port = server.get_host_and_port()
        assert server._server is not None
        faults = server._server.app = Faults(server._server.app)
        endpoint = f"http://{host}:{port}"
        S3FileSystem(endpoint_override=endpoint, region="us-east-1", allow_bucket_creation=True).create_dir(BUCKET)
        yield Server(f"s3://{BUCKET}?endpoint_override={endpoint}&scheme=http&region=us-east-1", faults)
        server.stop()


@pytest.fixture(scope="session")
def object_store(s3_server: Server) -> str:
    """The URI of a bucket on a running S3 server; `below(object_store, folder)` is a place of one test's own."""
    return s3_server.uri
