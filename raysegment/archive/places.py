"""A folder of files that lies on a disk or below a prefix of an object store."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from pyarrow import NativeFile
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from raysegment.archive.files import committed, inside
from raysegment.archive.retry import patiently
from raysegment.climate.checks import BadInput

T = TypeVar("T")

BLOCK = 8 << 20  # bytes per request: long enough to hide a request's latency, above S3's 5 MiB minimum of a part

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")  # two letters at least: `C:/` is a disk
_USER = re.compile(r"(?<=//)(?:[^/?#@:]*:[^?#&]*|(?<!abfs://)(?<!abfss://)[^/?#@]*)@")  # a key may hold a bare slash
_OPTION = re.compile(r"(?<=[?&])([^=&#]+)=([^&#]*)")
_SHOWN_OPTIONS = frozenset({"endpoint_override", "scheme", "region", "project", "retry_limit_seconds", "tls_ca_file_path"})
_NO_BUCKET = re.compile("NO_SUCH_BUCKET during|ContainerNotFound")  # raised by writing only: to read, it is an absent file
_ANY_REGION = "us-east-1"


@dataclass(frozen=True, repr=False)
class Place:
    """A folder of files: `text` is its path, or a URI of an object store that Arrow knows (s3://, gs://, abfs://, …).

        s3://bucket/prefix?region=eu-central-1
        s3://bucket/prefix?endpoint_override=http://127.0.0.1:9000&scheme=http

    Arrow's S3 client takes its credentials from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_SESSION_TOKEN, AWS_PROFILE), from ~/.aws or from the machine's role, or from the URI itself (s3://key:secret@…,
    which everybody can read who sees the command); region and endpoint are options of the URI. Without a region Amazon is
    asked for the bucket's, unless `endpoint_override` names another server.

    A place travels between processes as its text, and each opens its own connection: workers of Ray on other machines
    need the same environment (`runtime_env={"env_vars": …}` or the cluster's own set-up).

    Names are relative to the folder. Transient errors are tried again (`archive.retry`); missing rights are BadInput.
    """

    text: str

    @staticmethod
    def of(where: str | Path | Place) -> Place:
        """The place a path or URI names, a path made absolute; BadInput for an unknown scheme or a malformed URI."""
        if isinstance(where, Place):
            return where
        text = str(where)
        if not _SCHEME.match(text):
            return Place(str(Path(text).absolute()))
        _check_uri(text)
        return Place(text)

    @property
    def local(self) -> Path | None:
        """The folder when it is on a disk, else None."""
        if not _SCHEME.match(self.text):
            return Path(self.text)
        return Path(_opened(self.text)[1]) if self.text.lower().startswith("file:") else None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.text.partition("?")[0] if _SCHEME.match(self.text) else self.text).name

    def below(self, name: str) -> Place:
        """The folder `name` inside this one: a URI's options stay behind it."""
        folder, mark, options = self.text.partition("?") if _SCHEME.match(self.text) else (self.text, "", "")
        return Place(f"{folder.rstrip('/')}/{name}{mark}{options}")

    def __str__(self) -> str:
        """The text without its secrets."""
        return _without_secrets(self.text)

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when there is no such file."""
        info = self._ask(name, lambda store, path: store.get_file_info(path))
        return info.size if info.type == FileType.File else None

    def read(self, name: str) -> bytes:
        """A whole file's bytes; FileNotFoundError when it is absent."""
        return self._ask(name, _read)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` … `stop` − 1 of a file, fewer when it ends before, as a slice of its bytes would be."""
        return self._ask(name, lambda store, path: _read_range(store, path, start, stop))

    def fetch(self, name: str, target: Path) -> int:
        """Bytes copied from a file to the local path `target`; a block that fails is read again, not the whole file."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(2, "No such file", self.shown(name))
        with target.open("wb") as file:
            for start in range(0, size, BLOCK):
                file.write(self.read_range(name, start, min(start + BLOCK, size)))
            copied = file.tell()
        if copied != size:
            raise OSError(f"{self.shown(name)}: {copied} of {size} bytes came: the file changed while it was read")
        return copied

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly inside `folder`, sorted; empty when there is no such folder."""
        infos = self._ask(folder, lambda store, path: store.get_file_info(FileSelector(path, allow_not_found=True)))
        return sorted(info.base_name for info in infos if info.type == FileType.File)

    def walk(self) -> list[str]:
        """Names of all files at any depth, relative and sorted; empty when there is no such folder."""
        base = f"{self._at('')[1]}/"
        infos = self._ask("", lambda store, path: store.get_file_info(FileSelector(path, allow_not_found=True, recursive=True)))
        return sorted(info.path.removeprefix(base) for info in infos if info.type == FileType.File)

    def remove(self, name: str) -> None:
        """Delete a file; no error when it is absent."""
        with suppress(FileNotFoundError):
            self._ask(name, lambda store, path: store.delete_file(path))

    def remove_folder(self, name: str) -> None:
        """Delete a folder with all that is in it; no error when it is absent."""
        with suppress(FileNotFoundError):
            self._ask(name, lambda store, path: store.delete_dir(path))

    def put(self, name: str, blocks: Callable[[], Iterable[bytes | memoryview]]) -> None:
        """Write a file block by block without a copy beside it; `blocks` is called again after a transient error.

        An object store publishes the file at its end. On a disk its beginning is there at once: see `committed`.
        """
        self._ask(name, lambda store, path: _put(blocks(), store, path))

    @contextmanager
    def committed(self, name: str) -> Iterator[Path]:
        """A temporary local path; on leaving without an error its file appears as `name`, whole or not at all.

        On a disk it is renamed. An object store publishes at the end of the one upload; the temporary file lies in the
        folder TMPDIR names, which needs room for it.
        """
        if self.local is not None:
            path = Path(self._at(name)[1])
            patiently(lambda: _prove_writable(path.parent), self.shown(name))
            with committed(path) as temporary:
                yield temporary
            return
        with TemporaryDirectory(prefix="raysegment-") as folder:
            temporary = Path(folder) / PurePosixPath(name).name
            yield temporary
            self._ask(name, lambda store, path: _upload(temporary, store, path))

    def _ask(self, name: str, work: Callable[[FileSystem, str], T]) -> T:
        """What `work` returns for the store and the full path of `name`, asked again after transient errors."""
        shown = self.shown(name)
        try:
            return patiently(lambda: work(*self._at(name)), shown)
        except OSError as error:
            if _NO_BUCKET.search(str(error)):
                raise BadInput(shown, "a bucket that exists", error, "Create it, or correct its name") from error
            raise

    def _at(self, name: str) -> tuple[FileSystem, str]:
        """The store and the full path of `name` in it."""
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            raise BadInput(self.shown(name), "a name inside the folder", name, "Name the file relative to the folder")
        store, base = _opened(self.text)
        path = "/".join((base, *parts))
        if parts and isinstance(store, LocalFileSystem):
            inside(base or "/", path)  # a link may lead elsewhere
        return store, path

    def shown(self, name: str) -> str:
        """`name` with the place in front of it, for messages."""
        folder, mark, options = str(self).partition("?")
        return f"{folder.rstrip('/')}/{name}{mark}{options}" if name else str(self)


@lru_cache(maxsize=64)
def _opened(text: str) -> tuple[FileSystem, str]:
    """The file system a text names and the folder in it; one connection per process and place."""
    store, base = _from_uri(text) if _SCHEME.match(text) else (LocalFileSystem(), text)
    return store, base.rstrip("/")


def _from_uri(text: str, region: str = "") -> tuple[FileSystem, str]:
    """What Arrow opens for a URI, `region` standing in where S3 is given none; BadInput when it cannot read the URI."""
    uri = text
    try:
        uri = _with_region(text, region)
        return FileSystem.from_uri(uri)
    except (ValueError, TypeError, NotImplementedError) as error:
        remedy = "Write a path, or scheme://bucket/prefix?option=value with the options of pyarrow.fs.FileSystem.from_uri"
        raise BadInput(_without_secrets(text), "a URI that Arrow can open", _censored(str(error), uri, text), remedy) from None


def _check_uri(text: str) -> None:
    """Raise when Arrow does not read a URI; asks no network, so that a mistake is told before any work."""
    if "://" not in text and not text.lower().startswith("file:"):
        remedy = "Write two slashes after the colon (pathlib.Path takes one away: keep URIs as text)"
        raise BadInput(_without_secrets(text), "scheme://bucket/prefix", "one slash", remedy)
    with suppress(OSError):  # a store that Arrow must connect to at once (HDFS): told at the first use
        _from_uri(text, _ANY_REGION)


def _with_region(text: str, otherwise: str) -> str:
    """A URI of S3 with a region, where Arrow would ask Amazon for the bucket's although the endpoint is another server."""
    parts = urlsplit(text)
    options = parse_qs(parts.query)
    region = _ANY_REGION if "endpoint_override" in options else otherwise
    if parts.scheme.lower() != "s3" or "region" in options or not region:
        return text
    return f"{text}{'&' if parts.query else '?'}region={region}"


def _without_secrets(text: str) -> str:
    """A path or URI without its user part and without the values of options that may be keys or tokens."""
    if not _SCHEME.match(text):
        return text
    return _OPTION.sub(_shown_option, _USER.sub("…@", text))


def _shown_option(option: re.Match[str]) -> str:
    """An option of a URI, its value only where that is known to be harmless."""
    key, value = option.groups()
    harmless = key in _SHOWN_OPTIONS and "@" not in unquote(value)
    return f"{key}={value}" if harmless else f"{key}=…"


def _censored(message: str, uri: str, text: str) -> str:
    """A message about `uri` that quotes at most what is no secret of the `text` it was made from."""
    shown = _without_secrets(text)
    message = message.replace(uri, shown)
    held = [user.rstrip("@") for user in _USER.findall(text)] + [value for _, value in _OPTION.findall(text)]
    secrets = [value for value in held if value and value not in shown]
    return "one that it cannot read" if any(s in message or unquote(s) in message for s in secrets) else message


def _read(store: FileSystem, path: str) -> bytes:
    """All bytes of a file."""
    with store.open_input_file(path) as file:
        return file.read()


def _read_range(store: FileSystem, path: str, start: int, stop: int) -> bytes:
    """A slice of a file's bytes."""
    with store.open_input_file(path) as file:
        stop = min(stop, file.size())  # S3 refuses to start behind the end, disks do not
        return file.read_at(stop - start, start) if start < stop else b""


def _upload(source: Path, store: FileSystem, path: str) -> None:
    """Copy a local file to a store, where it appears at the end."""
    with source.open("rb") as file:
        target = store.open_output_stream(path, compression=None)
        try:
            shutil.copyfileobj(file, target, BLOCK)
        except BaseException:
            _withdraw(target, store, path)
            raise
        target.close()


def _put(blocks: Iterable[bytes | memoryview], store: FileSystem, path: str) -> None:
    """Write blocks to a file, which an object store shows at the end."""
    target = store.open_output_stream(path, compression=None)
    try:
        for block in blocks:
            target.write(block)
    except BaseException:
        _withdraw(target, store, path)
        raise
    target.close()


def _withdraw(target: NativeFile, store: FileSystem, path: str) -> None:
    """Leave nothing of an upload that broke off.

    Arrow publishes what it has when a stream is closed or forgotten and cannot abandon one. Where closing fails, the store
    took not all of it and publishes nothing: then what lay there before is still there, and stays.
    """
    try:
        target.close()
    except Exception:
        return
    with suppress(FileNotFoundError):
        store.delete_file(path)


def _prove_writable(folder: Path) -> None:
    """Raise now what would otherwise be raised inside the caller's work, where it could be an error of that work."""
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()
