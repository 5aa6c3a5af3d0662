"""Which errors of a disk or an object store pass by themselves, and how long they are waited for."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from raysegment.climate.checks import BadInput

T = TypeVar("T")

FIRST_WAIT_S = 0.5  # doubled every time: six attempts ride out 15.5 s, a failover of most servers
LONGEST_WAIT_S = 30.0

_TRANSIENT = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EPIPE,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENOTCONN, errno.ESHUTDOWN,
})  # fmt: skip
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

# Arrow passes on what a store answers as text without an errno: the AWS SDK's names, gRPC's for Google, codes of HTTP for Azure.
_SAYS_TRANSIENT = re.compile(
    r"HTTP status (5\d\d|408|429)\b|Azure Error: \[\w*\] (5\d\d|408|429)\b|SLOW_?DOWN|THROTTL|INTERNAL_(FAILURE|ERROR)"
    r"|\bUNAVAILABLE|SERVICE_?UNAVAILABLE|REQUEST_?TIMEOUT|TOO_?MANY_?REQUESTS|REQUEST_?LIMIT|RESOURCE_EXHAUSTED"
    r"|DEADLINE_EXCEEDED|NETWORK_CONNECTION|curlCode|timed? ?out|connection (was )?(reset|refused|closed|aborted)",
    re.IGNORECASE,
)
_SAYS_FORBIDDEN = re.compile(
    r"HTTP status (401|403)\b|Azure Error: \[\w*\] (401|403)\b|ACCESS_?DENIED|PERMISSION_DENIED|UNAUTHENTICATED"
    r"|INVALID_?ACCESS_?KEY_?ID|INVALID_?CLIENT_?TOKEN|SIGNATURE_?DOES_?NOT_?MATCH|EXPIRED_?TOKEN|UNRECOGNIZED_?CLIENT"
    r"|MISSING_?AUTHENTICATION|INVALID_?SIGNATURE",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"'[^']*'")  # names of keys and buckets, which may contain any of those words


def is_transient(error: BaseException) -> bool:
    """True when the same request may well succeed a little later."""
    if not isinstance(error, OSError) or is_forbidden(error):
        return False
    if error.errno is not None:
        return error.errno in _TRANSIENT
    return isinstance(error, TimeoutError | ConnectionError) or _says(_SAYS_TRANSIENT, error)


def is_forbidden(error: BaseException) -> bool:
    """True when the rights or the credentials do not allow it, which no waiting changes."""
    if not isinstance(error, OSError):
        return False
    if error.errno is not None:
        return error.errno in _FORBIDDEN
    return isinstance(error, PermissionError) or _says(_SAYS_FORBIDDEN, error)


def patiently(work: Callable[[], T], what: str, attempts: int = 6, sleep: Callable[[float], None] = time.sleep) -> T:
    """What `work` returns, called again after a transient error; `what` names the file in the error that is left.

    Absence is raised at once, missing rights as BadInput at once, a transient error after the last attempt with a note.
    """
    wait = wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
    calls = Retrying(
        stop=stop_after_attempt(attempts), wait=wait, retry=retry_if_exception(is_transient), sleep=sleep, reraise=True
    )
    try:
        return calls(work)
    except OSError as error:
        if is_forbidden(error):
            raise forbidden(what, error) from error
        if is_transient(error):
            error.add_note(f"{what}: given up after {attempts} attempts")
        raise


def forbidden(what: str, error: BaseException) -> BadInput:
    """The error for a file that may not be read or written."""
    remedy = "Check the rights of the file, or the credentials of the object store"
    return BadInput(what, "a file that may be read and written", error, remedy)


def _says(words: re.Pattern[str], error: OSError) -> bool:
    return words.search(_QUOTED.sub("", str(error))) is not None
