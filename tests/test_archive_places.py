"""A folder on a disk and a prefix in an object store do the same, but for what only one of them can do."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

from raysegment.archive import places
from raysegment.archive.places import Place
from raysegment.archive.retry import patiently
from raysegment.climate.checks import BadInput
from tests.s3 import Server, below

CONTENT = bytes(range(256)) * 40
KINDS = ("disk", "disk as a URI", "object store")


def place_of_kind(kind: str, folder: Path, object_store: str) -> Place:
    """A place of one test's own, which holds nothing yet."""
    own = folder / "tiles of June"
    if kind == "object store":
        return Place.of(below(object_store, own.relative_to("/").as_posix().replace(" ", "%20")))
    return Place.of(own.as_uri() if kind == "disk as a URI" else own)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, object_store: str) -> Place:
    return place_of_kind(request.param, tmp_path, object_store)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between attempts, which takes no time."""
    waited: list[float] = []
    monkeypatch.setattr(places, "patiently", partial(patiently, sleep=waited.append))
    return waited


@pytest.fixture
def hasty(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's S3 client tells the first error; it is patient itself, for some seconds, which a URI cannot change."""

    def opened(text: str) -> tuple[FileSystem, str]:
        once, parts = AwsStandardS3RetryStrategy(max_attempts=1), urlsplit(text)
        endpoint = parse_qs(parts.query)["endpoint_override"][0]
        store = S3FileSystem(endpoint_override=endpoint, region="us-east-1", retry_strategy=once)
        return store, parts.netloc + unquote(parts.path)

    monkeypatch.setattr(places, "_opened", opened)


def write(place: Place, name: str, content: bytes = CONTENT) -> None:
    with place.committed(name) as temporary:
        temporary.write_bytes(content)


def test_what_is_written_is_read(place: Place) -> None:
    write(place, "part-00000.arrow")
    assert place.read("part-00000.arrow") == CONTENT
    assert place.size("part-00000.arrow") == len(CONTENT)


def test_a_file_is_replaced_whole(place: Place) -> None:
    write(place, "manifest.json", CONTENT)
    write(place, "manifest.json", b"{}")
    assert place.read("manifest.json") == b"{}"


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (255, 300), (10_000, 10_240), (10_200, 99_999), (20_000, 20_010), (5, 5)])
def test_a_range_is_a_slice(place: Place, start: int, stop: int) -> None:
    write(place, "part")
    assert place.read_range("part", start, stop) == CONTENT[start:stop]


def test_an_empty_file_is_a_file(place: Place, tmp_path: Path) -> None:
    write(place, "empty", b"")
    assert place.size("empty") == 0
    assert place.read("empty") == place.read_range("empty", 0, 10) == b""
    assert place.fetch("empty", tmp_path / "here") == 0
    assert place.names() == ["empty"]


def test_what_is_absent(place: Place, tmp_path: Path) -> None:
    assert place.size("absent") is None
    assert place.names() == place.names("absent/folder") == []
    for ask in (place.read, lambda name: place.read_range(name, 0, 1), lambda name: place.fetch(name, tmp_path / "here")):
        with pytest.raises(FileNotFoundError):
            ask("absent")
    assert not (tmp_path / "here").exists()


def test_a_folder_is_no_file(place: Place) -> None:
    write(place, "parts/one")
    assert place.size("parts") is None
    assert place.names() == []


def test_names_are_those_of_the_files_directly_inside_in_order(place: Place) -> None:
    for name in ("b", "a", "deeper/c", "deeper/still/d", "manifest.json"):
        write(place, name)
    assert place.names() == ["a", "b", "manifest.json"]
    assert place.names("deeper") == ["c"]


def test_removed_files_are_gone_and_removing_the_absent_is_no_error(place: Place) -> None:
    write(place, "a")
    write(place, "b")
    for _ in range(2):
        place.remove("a")
        assert place.names() == ["b"]


def fail_halfway(place: Place, name: str, used: list[Path]) -> None:
    with place.committed(name) as temporary:
        used.append(temporary)
        temporary.write_bytes(b"half")
        raise ZeroDivisionError


def test_what_fails_leaves_what_was_there(place: Place) -> None:
    write(place, "kept", b"before")
    used: list[Path] = []
    for name in ("kept", "new"):
        with pytest.raises(ZeroDivisionError):
            fail_halfway(place, name, used)
    assert len(used) == 2
    assert not any(path.exists() for path in used)
    assert place.read("kept") == b"before"
    assert place.names() == ["kept"]


def test_nothing_appears_before_it_is_whole(place: Place) -> None:
    with place.committed("part") as temporary:
        temporary.write_bytes(CONTENT)
        assert place.size("part") is None
    assert place.size("part") == len(CONTENT)
    assert not temporary.exists()


@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_a_file_is_fetched_in_blocks(place: Place, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, "part")
    monkeypatch.setattr(places, "BLOCK", block)
    (tmp_path / "here").write_bytes(2 * CONTENT)  # what an interrupted copy left
    assert place.fetch("part", tmp_path / "here") == len(CONTENT)
    assert (tmp_path / "here").read_bytes() == CONTENT


def test_a_large_file_goes_up_in_several_parts(tmp_path: Path, object_store: str, s3_server: Server) -> None:
    place = place_of_kind("object store", tmp_path, object_store)
    content = CONTENT * 2000  # 20 MB: a multipart upload
    write(place, "large", content)
    assert "POST" in s3_server.faults.seen
    assert place.fetch("large", tmp_path / "here") == len(content)
    assert (tmp_path / "here").read_bytes() == content


def test_a_place_travels_to_another_process(place: Place) -> None:
    write(place, "part")
    assert pickle.loads(pickle.dumps(place)) == place
    script = "import pickle, sys; place = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(place.read('part'))"
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(place), capture_output=True, check=True)
    assert done.stdout == CONTENT


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/passwd"])
def test_names_do_not_lead_outside(place: Place, name: str, tmp_path: Path) -> None:
    for ask in (place.size, place.read, place.remove, lambda name: place.fetch(name, tmp_path / "here")):
        with pytest.raises(BadInput, match="inside the folder"):
            ask(name)
    with pytest.raises(BadInput, match="inside the folder"):
        write(place, name)


def test_only_a_disk_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Place.of("tiles").local == Place.of(tmp_path / "tiles").local == tmp_path / "tiles"
    assert Place.of("tiles").text == str(tmp_path / "tiles")
    assert Place.of((tmp_path / "a b%").as_uri()).local == tmp_path / "a b%"
    assert Place.of("s3://tiles/a?region=us-east-1").local is None
    assert Place.of(Place.of("tiles")) == Place.of("tiles")


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("swift://tiles/a", "Unrecognized filesystem type"),
        ("s3:///a", "Missing bucket"),
        ("s3://[tiles/a", "Invalid IPv6"),
        ("s3://tiles/a?regoin=eu-west-1", "'regoin'"),
        ("s3://tiles/a b", "character ' '"),
        (str(Path("s3://tiles/a")), "one slash"),
        ("file://elsewhere/a", "Unsupported hostname"),
    ],
)
def test_what_is_no_place_is_refused(text: str, got: str) -> None:
    with pytest.raises(BadInput, match=got) as caught:
        Place.of(text)
    assert caught.value.where == text.replace("regoin=eu-west-1", "regoin=…")


def test_an_unknown_scheme_names_the_remedy() -> None:
    with pytest.raises(BadInput, match="Write a path, or scheme://bucket/prefix"):
        Place.of("swift://tiles/a")


KEY, SECRET = "AKIAEXAMPLE", "wJalr/XUtn+FEMI"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://{KEY}:{SECRET.replace('/', '%2F')}@tiles/a?region=us-east-1",
        f"s3://{KEY}:{SECRET}@tiles/a?region=us-east-1",
        f"s3://{KEY}:{SECRET.replace('/', '%2F')}@tiles/a b?region=us-east-1",
        f"s3://tiles/a?region=us-east-1&secret_key={SECRET}&access_key={KEY}",
        f"s3://{KEY}@tiles/a?regoin=us-east-1",
        f"s3://tiles/a?region=us-east-1&endpoint_override=http://{KEY}:{SECRET.replace('/', '%2F')}@127.0.0.1:9",
        f"abfs://{KEY}:{SECRET}@tiles.dfs.core.windows.net/a",
        f"swift://{KEY}:{SECRET}@tiles/a?token={SECRET}",
    ],
)
def test_secrets_are_not_printed(text: str) -> None:
    said = [str(Place(text)), repr(Place(text)), Place(text).shown("part"), f"{Place(text)}"]
    try:
        Place.of(text)
    except BadInput as error:
        said += [str(error), repr(error), error.where]
    for words in said:
        assert KEY not in words
        assert SECRET not in words
        assert "FEMI" not in words
        assert "tiles" in words


def test_a_name_is_shown_in_front_of_the_options() -> None:
    assert Place("s3://tiles/a?region=eu-west-1").shown("part") == "s3://tiles/a/part?region=eu-west-1"
    assert str(Place("abfs://tiles@account.dfs.core.windows.net/a@b")) == "abfs://tiles@account.dfs.core.windows.net/a@b"


def test_another_server_than_amazon_needs_no_region(object_store: str, tmp_path: Path) -> None:
    place = place_of_kind("object store", tmp_path, object_store.replace("&region=us-east-1", ""))
    write(place, "part")
    assert place.read("part") == CONTENT


# Faults: the server's own, as Arrow words them; the disk's, injected, since nothing is forbidden to root


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("503 Slow Down", "SlowDown"),
        ("500 Internal Server Error", "InternalError"),
        ("503 Service Unavailable", "ServiceUnavailable"),
    ],
)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.usefixtures("hasty")
def test_a_busy_server_is_asked_again(
    status: str, code: str, method: str, tmp_path: Path, s3_server: Server, waits: list[float]
) -> None:
    place = place_of_kind("object store", tmp_path, s3_server.uri)
    write(place, "part")
    with s3_server.faults.answering(method, status, code, times=3) as faults:
        assert place.read("part") == CONTENT
    assert faults.fired == 3
    assert waits == [0.5, 1, 2]


@pytest.mark.usefixtures("hasty")
def test_a_busy_server_is_written_to_again(tmp_path: Path, s3_server: Server, waits: list[float]) -> None:
    place = place_of_kind("object store", tmp_path, s3_server.uri)
    with s3_server.faults.answering("PUT", "503 Slow Down", "SlowDown", times=3) as faults:
        write(place, "part")
    assert faults.fired == 3
    assert waits == [0.5, 1, 2]
    assert place.read("part") == CONTENT


def given_up(place: Place, content: bytes) -> OSError:
    with pytest.raises(OSError, match="SLOW_DOWN") as caught:
        write(place, "part", content)
    return caught.value


@pytest.mark.parametrize("times", [1, 2000], ids=["told at the end", "told in the midst"])
@pytest.mark.usefixtures("hasty")
def test_a_server_that_stays_busy_keeps_what_it_had(times: int, tmp_path: Path, s3_server: Server, waits: list[float]) -> None:
    place = place_of_kind("object store", tmp_path, s3_server.uri)
    write(place, "part", b"before")
    with s3_server.faults.answering("PUT", "503 Slow Down", "SlowDown", times=1000) as faults:
        error = given_up(place, CONTENT * times)
    assert faults.fired >= 6
    assert waits == [0.5, 1, 2, 4, 8]
    assert error.__notes__ == [f"{place.shown('part')}: given up after 6 attempts"]
    assert place.names() == ["part"]
    assert place.read("part") == b"before"


def test_a_bucket_that_does_not_exist_is_told(object_store: str, tmp_path: Path) -> None:
    place = Place.of(object_store.replace("s3://tiles", "s3://tails/a"))
    assert place.size("part") is None
    assert place.names() == []
    with pytest.raises(BadInput, match="a bucket that exists") as caught:
        write(place, "part")
    assert caught.value.where == place.shown("part")


@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT"])
def test_a_server_that_forbids_is_asked_once(method: str, tmp_path: Path, s3_server: Server, waits: list[float]) -> None:
    place = place_of_kind("object store", tmp_path, s3_server.uri)
    write(place, "part")
    with (
        s3_server.faults.answering(method, "403 Forbidden", "AccessDenied", times=1000) as faults,
        pytest.raises(BadInput, match="credentials") as caught,
    ):
        write(place, "part") if method == "PUT" else place.read("part")
    assert faults.fired == 1
    assert waits == []
    assert caught.value.where == place.shown("part")


@pytest.mark.usefixtures("hasty")
def test_a_server_that_is_away_is_waited_for(waits: list[float]) -> None:
    away = Place.of("s3://tiles/a?endpoint_override=http://127.0.0.1:9&scheme=http&region=us-east-1")  # discard: nobody listens
    with pytest.raises(OSError, match="NETWORK_CONNECTION") as caught:
        away.read("part")
    assert waits == [0.5, 1, 2, 4, 8]
    assert "a/part" in caught.value.__notes__[0]


class BrokenFile:
    """A local file whose second block cannot be read."""

    def __init__(self, first: bytes):
        self.blocks = iter([first])
        self.failed = 0

    def __enter__(self) -> BrokenFile:
        return self

    def __exit__(self, *_) -> None:
        pass

    def read(self, _: int) -> bytes:
        try:
            return next(self.blocks)
        except StopIteration:
            self.failed += 1
            raise OSError(errno.EUCLEAN, "injected") from None


def test_half_an_upload_does_not_stay(tmp_path: Path, object_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, broken = place_of_kind("object store", tmp_path, object_store), BrokenFile(CONTENT)
    write(place, "other")
    monkeypatch.setattr(Path, "open", lambda self, *_: broken)
    with pytest.raises(OSError, match="injected"):
        places._upload(tmp_path / "part", *place._at("part"))
    assert broken.failed == 1
    assert place.names() == ["other"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_stutters_is_read_again(
    number: int, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, errors = Place.of(tmp_path), [OSError(number, "injected")] * 3
    write(place, "part")
    whole = places._read

    def stuttering(store, path: str) -> bytes:
        if errors:
            raise errors.pop()
        return whole(store, path)

    monkeypatch.setattr(places, "_read", stuttering)
    assert place.read("part") == CONTENT
    assert errors == []
    assert waits == [0.5, 1, 2]


def test_a_file_that_may_not_be_read_is_told_at_once(tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidding(store, path: str) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(places, "_read", forbidding)
    with pytest.raises(BadInput, match=r"Permission denied.*Check the rights"):
        Place.of(tmp_path).read("part")
    assert waits == []


def test_a_folder_that_may_not_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidding(dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(places, "TemporaryFile", forbidding)
    started = []
    with pytest.raises(BadInput, match="Check the rights"), Place.of(tmp_path).committed("part"):
        started.append(1)
    assert started == []


def test_an_error_of_the_callers_own_work_stays_as_it_is(place: Place) -> None:
    with pytest.raises(PermissionError), place.committed("part"):
        raise PermissionError(errno.EACCES, "of another file")
