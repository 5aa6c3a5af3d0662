"""What passes is waited for, what is forbidden or absent is told at once."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from raysegment.archive.retry import LONGEST_WAIT_S, is_forbidden, is_transient, patiently
from raysegment.climate.checks import BadInput

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH)
DENYING = (errno.EACCES, errno.EPERM, errno.EROFS)
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EISDIR, errno.EINVAL)
S3_PASSING = (
    "When reading information for key 'a/b' in bucket 'c': AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7",
    "When uploading part for key 'a' in bucket 'c': AWS Error SLOW_DOWN during UploadPart operation: Please reduce your rate",
    "When reading information for key 'a' in bucket 'c': AWS Error UNKNOWN (HTTP status 503) during HeadObject operation",
    "AWS Error SERVICE_UNAVAILABLE during GetObject operation: x",
    "AWS Error INTERNAL_FAILURE during GetObject operation: x",
    "AWS Error REQUEST_TIMEOUT during PutObject operation: x",
    "google::cloud::Status(UNAVAILABLE: Retry policy exhausted)",
    "GetProperties failed for 'https://a'. Azure Error: [ServerBusy] 503 The server is busy.",
)
S3_DENYING = (
    "When reading information for key 'a' in bucket 'c': AWS Error ACCESS_DENIED during HeadObject operation: No response body.",
    "AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: The AWS Access Key Id does not exist in our records.",
    "AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: x",
    "AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body.",
    "google::cloud::Status(PERMISSION_DENIED: x)",
    "GetProperties failed for 'https://a'. Azure Error: [AuthorizationFailure] 403 This request is not authorized.",
)
S3_LASTING = (
    "When reading information for key 'slow_down/ACCESS_DENIED/timeout' in bucket 'c': AWS Error NO_SUCH_BUCKET during x",
    "Path does not exist 'c/HTTP status 503'",
)


@dataclass
class Failing:
    """Work that raises `make()` the first `times` times and then returns 7; a clock that only notes how long it was waited."""

    make: Callable[[], BaseException]
    times: int
    calls: int = 0
    waits: list[float] = field(default_factory=list)

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.make()
        return 7

    def run(self, **options) -> int:
        return patiently(self, "tiles/part-00000.arrow", sleep=self.waits.append, **options)


def coded(number: int) -> Callable[[], OSError]:
    return lambda: OSError(number, "injected")


def worded(text: str) -> Callable[[], OSError]:
    return lambda: OSError(text)


@pytest.mark.parametrize("make", [*map(coded, PASSING), *map(worded, S3_PASSING), TimeoutError, ConnectionResetError])
def test_what_passes_is_tried_again_and_waited_for_exponentially(make: Callable[[], OSError]) -> None:
    assert is_transient(make())
    assert not is_forbidden(make())
    work = Failing(make, times=3)
    assert work.run() == 7
    assert work.calls == 4
    assert work.waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("make", [*map(coded, DENYING), *map(worded, S3_DENYING), PermissionError])
def test_what_is_forbidden_is_told_at_once_with_a_remedy(make: Callable[[], OSError]) -> None:
    assert is_forbidden(make())
    assert not is_transient(make())
    work = Failing(make, times=1)
    with pytest.raises(BadInput, match=r"tiles/part-00000\.arrow: .*Check the rights") as caught:
        work.run()
    assert isinstance(caught.value.__cause__, OSError)
    assert (work.calls, work.waits) == (1, [])


@pytest.mark.parametrize("make", [*map(coded, LASTING), *map(worded, S3_LASTING), lambda: ValueError("timeout"), KeyError])
def test_what_lasts_is_raised_at_once_as_it_is(make: Callable[[], Exception]) -> None:
    assert not is_transient(make())
    assert not is_forbidden(make())
    work = Failing(make, times=1)
    with pytest.raises(type(make())) as caught:
        work.run()
    assert not hasattr(caught.value, "__notes__")
    assert (work.calls, work.waits) == (1, [])


@pytest.mark.parametrize("attempts", [1, 2, 6, 12])
def test_after_the_last_attempt_the_first_kind_of_error_remains(attempts: int) -> None:
    work = Failing(coded(errno.EIO), times=100)
    with pytest.raises(OSError, match="injected") as caught:
        work.run(attempts=attempts)
    assert caught.value.errno == errno.EIO
    assert caught.value.__notes__ == [f"tiles/part-00000.arrow: given up after {attempts} attempts"]
    assert work.calls == attempts
    assert work.waits == [min(0.5 * 2**k, LONGEST_WAIT_S) for k in range(attempts - 1)]


def test_a_store_that_first_fails_and_then_refuses_is_not_asked_again() -> None:
    errors = iter([OSError(errno.EIO, "injected"), PermissionError(errno.EACCES, "injected")])
    work = Failing(lambda: next(errors), times=2)
    with pytest.raises(BadInput):
        work.run()
    assert (work.calls, work.waits) == (2, [0.5])


def test_without_an_error_nothing_is_waited_for() -> None:
    work = Failing(coded(errno.EIO), times=0)
    assert work.run() == 7
    assert (work.calls, work.waits) == (1, [])
