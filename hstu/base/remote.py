"""Paths that are URLs: copies their files into a local cache of bounded size, and uploads what was made here.

Everything else works on local paths. Where a path enters, ``stage`` turns a URL into one.

    <cache>/staged/<key>/<name>    files of a URL, or arrays of a lake; those that were used longest ago make room
    <cache>/work/<key>/<name>      what is made here for a URL; nothing removes it
    <cache>/*/<key>/origin.json    the URL of <name>

A file is written aside, compared with its size and SHA-256, and renamed, so a killed process leaves nothing half.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock

from hstu.base.errors import ConfigError, DataError, UserError, printable
from hstu.base.files import WRITING, cache_directory, remove, replace_text, sha256, written_aside

log = logging.getLogger(__name__)
Files = Mapping[str, Mapping[str, Any]]
"""Path below a directory → "bytes", and "sha256" or "modified" (seconds since 1970)."""

LAKE_FILE = "lake.json"
"""Describes a lake, whose files are read where they are."""
MANIFESTS = ("meta.json", "manifest.json", LAKE_FILE)
"""What lists the files of a store, and of a checkpoint or export. It is uploaded last: what has one is complete."""
DEFAULT_GB = 100.0
_ORIGIN, _STAGED, _WORK, _LOCK = "origin.json", "staged", "work", ".lock"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}([^/].*)")
_REPEATED_S, _FIRST_WAIT_S, _LONGEST_WAIT_S = 30.0, 0.5, 8.0
_STREAMS, _REPORT_S, _ABANDONED_S = 8, 10.0, 3600.0

progress: dict[str, float] = {"at": 0.0}
"""When files were last copied, by time.monotonic(): a process that waits for them is not stuck."""


class Absent(DataError):
    """There is no file at a URL."""


def url_of(path: str | Path | None) -> str | None:
    """The URL that a path is, also after ``Path`` has made "s3:/bucket" of it; None for a local path. Raises
    ConfigError for a URL with credentials."""
    found = _URL.fullmatch(str(path or ""))
    if found is None or found[1] == "file":
        return None
    scheme, rest = found[1].lower(), found[2].rstrip("/")
    if "@" in rest.partition("/")[0] or "?" in rest:
        raise ConfigError(
            f"a URL of {scheme}:// holds credentials or a query (…@ or ?…), which logs and configurations would keep. "
            "Leave them out: credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …), the "
            "files of the cloud's tools, or the role of the machine"
        )
    return f"{scheme}://{rest}"


@dataclass(frozen=True)
class Cache:
    """A local directory for files of URLs, which the processes of a host share."""

    directory: Path | None
    """None: ``remote`` in the user's cache directory for hstu."""
    max_bytes: int

    @classmethod
    def of(cls, args: object = None) -> Cache:
        """The cache of DatasetArgs; without them that of the user, of 100 GB. Nothing is made before it is used."""
        given = getattr(args, "cache_dir", None)
        return cls(Path(given).absolute() if given else None, int(1e9 * getattr(args, "cache_gb", DEFAULT_GB)))

    @cached_property
    def root(self) -> Path:
        """The directory. Raises ConfigError if the user has none."""
        try:
            return self.directory or cache_directory() / "remote"
        except OSError as error:
            text = f"no directory for copies of URLs and for arrays of lakes: {error}; set XDG_CACHE_HOME or"
            raise ConfigError(f"{text} DatasetArgs.cache_dir to a directory that you can write to") from error

    def place(self, url: str, content: bytes = b"", *, work: bool = False) -> Path:
        """The local path for ``url``, or for arrays of a local lake, in a directory of its own, which is made and notes
        the URL. ``content``: what else decides on the directory."""
        key = hashlib.sha256(url.encode() + content).hexdigest()[:16]
        place = self.root / (_WORK if work else _STAGED) / key / PurePosixPath(url).name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_text(place.parent / _ORIGIN, json.dumps({"url": url, "max_bytes": self.max_bytes}), shared=True)
        except OSError as error:
            raise DataError(
                f"the cache {self.root} cannot be written: {error.strerror}. Free space or permissions there, or give "
                "another directory (DatasetArgs.cache_dir)"
            ) from error
        return place

    def make_room(self, needed: int, kept: set[Path]) -> None:
        """Remove staged files, but none of ``kept``, until ``needed`` more bytes fit. Raises DataError."""
        with FileLock(self.root / _LOCK):
            found = [(path, path.stat()) for path in (self.root / _STAGED).rglob("*") if path.is_file()]
            total = needed + sum(stat.st_size for _, stat in found)
            for path, stat in sorted(found, key=lambda each: each[1].st_atime):
                is_written = path.name.startswith(WRITING) and time.time() - stat.st_mtime < _ABANDONED_S
                is_kept = is_written or path in kept or path.name in (_ORIGIN, *MANIFESTS) or path.suffix == _LOCK
                if total > self.max_bytes and not is_kept:
                    path.unlink()
                    total -= stat.st_size
        if total > self.max_bytes:
            raise DataError(
                f"{needed / 1e9:.3g} GB do not fit into {self.root}, the cache of {self.max_bytes / 1e9:.3g} GB. Set "
                "DatasetArgs.cache_gb higher, or make the store in shards, the lake of smaller files"
            )
        if needed > (free := shutil.disk_usage(self.root).free):
            text = f"{needed / 1e9:.3g} GB do not fit on the disk of {self.root}, which has {free / 1e9:.3g} GB free"
            raise DataError(f"{text}. Free some space, or give DatasetArgs.cache_dir on another disk")


def origin(path: Path) -> tuple[str, Cache] | None:
    """The URL of a path in a cache, and the cache; None for other paths."""
    for directory in path.parents:
        with suppress(OSError):
            noted = json.loads((directory / _ORIGIN).read_text(encoding="utf-8"))
            url = "/".join([noted["url"], *path.relative_to(directory).parts[1:]])
            return url, Cache(directory.parents[1], noted["max_bytes"])
    return None


def as_given(path: object) -> str:
    """The URL from which a path was staged, or that it is; else the path."""
    found = origin(path) if isinstance(path, Path) and path.is_absolute() else None
    return found[0] if found else url_of(str(path)) or str(path)


def stage(path: str | Path, cache: Cache | None = None, *, raw: bool = False, root_only: bool = False) -> Path:
    """The local copy of a directory with a manifest: a store, a checkpoint or an export; of a lake, local or not, a
    directory in the cache with its description. Other local paths stay as they are.

    ``raw``: of a file or directory without manifest and checksums, whose sizes and times are compared. ``root_only``:
    leave out files in subdirectories, which ``complete`` copies. Raises DataError.
    """
    if (url := url_of(path)) is None:
        local = Path(str(path).removeprefix("file://"))
        if raw or not os.path.isfile(local / LAKE_FILE) or origin(local.absolute()):
            return local
        url = str(local.absolute())
    manifests = ((name, read(f"{url}/{name}")) for name in MANIFESTS if not raw)
    manifest, content = next(((name, found) for name, found in manifests if found), ("", b""))
    files: Files = retried(url, sizes_and_times) if raw else listed(url, content) if manifest != LAKE_FILE else {}
    place = (cache := cache or Cache.of()).place(url, content)
    if "" in files:
        copy_files(url.rpartition("/")[0], place.parent, {place.name: files[""]}, cache)
        return place
    for gone in {found for found in place.rglob("*") if raw and found.is_file()} - {place / name for name in files}:
        gone.unlink()
    copy_files(url, place, {name: files[name] for name in files if not (root_only and "/" in name)}, cache)
    if not raw:
        place.mkdir(exist_ok=True)
        replace_text(place / manifest, content.decode(), shared=True)
    return place


def complete(directory: Path, files: Files) -> None:
    """Copy these files of a directory that ``stage`` has returned, if they are not there. Other directories stay."""
    if directory.parents[1].name == _STAGED and (found := origin(directory)):
        copy_files(found[0], directory, files, found[1])


def sizes_and_times(files: Any, root: str) -> Files:
    """The files in a directory of a file system of fsspec; of a file "" → itself."""
    infos = {path: info or files.info(path) for path, info in files.find(root, detail=True).items()}
    if not infos:
        raise FileNotFoundError(root)
    return {
        path.removeprefix(root).lstrip("/"): {"bytes": info["size"], "modified": int(files.modified(path).timestamp())}
        for path, info in infos.items()
    }


def copy_files(url: str, directory: Path, files: Files, cache: Cache | None) -> None:
    """Download those files of a URL that ``directory`` lacks, one process at a time. ``cache``: room is made in it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}{_LOCK}"):
        missing = {name: entry for name, entry in files.items() if not is_there(directory / name, entry)}
        if missing and cache is not None:
            cache.make_room(sum(entry["bytes"] for entry in missing.values()), {directory / name for name in files})
        _for_each(missing, lambda name: _download(url, directory / name, name, missing[name]), f"staged url={url}")


def is_there(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is staged. Notes that it is used now."""
    try:
        found = path.stat()
        os.utime(path, (time.time(), found.st_mtime))
    except FileNotFoundError:
        return False
    return found.st_size == entry["bytes"] and entry.get("modified", found.st_mtime) == found.st_mtime


def _download(url: str, target: Path, name: str, entry: Mapping[str, Any]) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)

    def once(files: Any, path: str) -> None:
        with written_aside(target) as aside:
            files.get_file(path, str(aside))
            if (size := aside.stat().st_size) != entry["bytes"]:
                raise OSError(f"{size} bytes came instead of {entry['bytes']}")
            if "sha256" in entry and sha256(aside) != entry["sha256"]:
                raise OSError("its SHA-256 is not that of the manifest")
            if "modified" in entry:
                os.utime(aside, (time.time(), entry["modified"]))

    retried(f"{url}/{name}", once)
    return int(entry["bytes"])


def _for_each(names: Iterable[str], copy: Callable[[str], int], what: str) -> None:
    """Call ``copy`` for each name, several at a time. It returns the bytes that it has copied."""
    begun = reported = time.monotonic()
    done = 0
    with ThreadPoolExecutor(_STREAMS, "remote") as pool:
        running = {pool.submit(copy, name) for name in names}
        count = len(running)
        try:
            while running:
                ended, running = wait(running, 1.0, FIRST_COMPLETED)
                done += sum(each.result() for each in ended)
                progress["at"] = now = time.monotonic()
                if not running or now - reported > _REPORT_S:
                    reported = now
                    left = len(running)
                    log.info("%s files=%d/%d GB=%.3g time=%.1fs", what, count - left, count, done / 1e9, now - begun)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fetch(url: str, directory: Path, manifest: str) -> None:
    """Make a directory, which is none of ``staged``, equal to that of a URL, if there is one. Raises DataError."""
    if content := read(f"{url}/{manifest}"):
        if (directory / manifest).is_file() and (directory / manifest).read_bytes() != content:
            remove(directory)
        copy_files(url, directory, listed(url, content), None)
        replace_text(directory / manifest, content.decode())


def local_export(path: Path) -> Path:
    """The local copy of an export with what it is based on, or of all exports in a directory. Those that are there are
    kept. Files get the times at which the manifests were written at the URL. Raises DataError."""
    if (url := url_of(path)) is None:
        return path
    parent, _, only = url.rpartition("/")
    is_one = read(f"{url}/{MANIFESTS[1]}") is not None
    url = parent if is_one else url
    cache, wanted = Cache.of(), [only] if is_one else names_in(url)
    place = cache.place(url)
    for gone in {path for path in place.glob("*/") if not is_one and path.name not in wanted}:
        remove(gone)
    for name in wanted:  # grows by the bases of deltas
        manifest = place / name / MANIFESTS[1]
        content = manifest.read_bytes() if manifest.is_file() else read(f"{url}/{name}/{manifest.name}")
        if content is not None:
            written = retried(f"{url}/{name}/{manifest.name}", sizes_and_times)[""]["modified"]
            files = {file: {**entry, "modified": written} for file, entry in listed(url, content).items()}
            copy_files(f"{url}/{name}", place / name, files, cache)
            replace_text(manifest, content.decode(), shared=True)
        delta = place / name / "serving" / "delta.json"
        if is_one and delta.is_file():
            wanted.append(PurePosixPath(json.loads(delta.read_text(encoding="utf-8"))["path"]).parts[2])
    return place / only if is_one else place


def relative_path(begin: Path, end: Path) -> str:
    """The path from one directory to another. Both are local, or both are at a URL, of which ``end`` is the copy."""
    if url_of(begin) is None:
        return os.path.relpath(end.resolve(), begin.resolve())
    return os.path.relpath(as_given(end), as_given(begin))


def listed(url: str, content: bytes) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists. Raises DataError."""
    if not content:
        raise Absent(f"{url} is not complete, or not there: it has no {' or '.join(MANIFESTS)}")
    try:
        found = json.loads(content)["files"]
        files = {name: {"bytes": found[name]["bytes"], "sha256": found[name]["sha256"]} for name in found}
        if any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in files):
            raise ValueError("it lists files outside of its directory")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the manifest of {url} is damaged ({error!r}). Upload it again, or use another") from error
    return files


def read(url: str) -> bytes | None:
    """The content of a small file; None if there is none. Raises DataError."""
    with suppress(Absent):
        return bytes(retried(url, lambda files, path: files.cat_file(path)))
    return None


def write(url: str, content: bytes) -> None:
    """Write a small file. Raises DataError."""
    retried(url, lambda files, path: files.pipe_file(path, content))


def delete(url: str) -> None:
    """Delete a file, or a directory with all in it, if it is there. Raises DataError."""
    with suppress(Absent):
        retried(url, lambda files, path: files.rm(path, recursive=True))


def names_in(url: str) -> list[str]:
    """Names of the entries of a directory. Raises DataError."""
    with suppress(Absent):
        return [PurePosixPath(path).name for path in retried(url, lambda files, path: files.ls(path, detail=False))]
    return []


def upload(directory: Path, url: str, manifest: str) -> None:
    """Upload a directory, its manifest last, and delete what only an earlier manifest there lists. Raises DataError."""
    content, before = (directory / manifest).read_bytes(), read(f"{url}/{manifest}")
    if content == before:
        return
    if before is not None:
        delete(f"{url}/{manifest}")
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    _for_each(names - {manifest}, lambda name: _upload(directory / name, f"{url}/{name}"), f"uploaded url={url}")
    _upload(directory / manifest, f"{url}/{manifest}")
    for stale in set(listed(url, before) if before else ()) - names:
        delete(f"{url}/{stale}")


def _upload(local: Path, url: str) -> int:
    size = local.stat().st_size

    def once(files: Any, path: str) -> None:
        files.put_file(str(local), path)
        if (found := files.info(path)["size"]) != size:
            raise OSError(f"{found} bytes arrived instead of {size}")

    retried(url, once)
    return size


def retried(url: str, call: Callable[[Any, str], Any]) -> Any:
    """``call`` (file system, path in it), again for 30 s after it first fails. Raises DataError, and Absent where
    nothing is."""
    begun, wait_s, until = time.monotonic(), _FIRST_WAIT_S, math.inf
    for attempt in itertools.count(1):
        try:
            return call(*filesystem(url))
        except UserError:
            raise
        except FileNotFoundError as error:
            raise Absent(f"{url} is not there") from error
        except Exception as error:  # of many libraries
            reason = printable(f"{type(error).__name__}: {error}".splitlines()[0][:300])
            now = time.monotonic()
            until = min(until, now + _REPEATED_S)
            is_refused = isinstance(error, PermissionError) or "Credential" in type(error).__name__
            if is_refused or now + wait_s > until or isinstance(error, NotImplementedError):
                what = "Check the address, the network, the service and the disk"
                if is_refused:
                    what = "Renew the credentials in the environment, the cloud's files or the role of the machine"
                raise DataError(
                    f"{url}: {attempt} attempt(s) in {now - begun:.0f} s failed, the last with {reason}. {what}; then "
                    "start the same command again, which goes on from what is there"
                ) from error
            log.warning("retry url=%s attempt=%d wait=%.1fs reason=%s", url, attempt, wait_s, reason)
        progress["at"] = time.monotonic()
        time.sleep(wait_s * random.uniform(0.75, 1.25))
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, without earlier listings of directories, and the path there."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs"}.get(url.partition(":")[0])
        remedy = f"pip install 'hstu-trainer[{extra}]'" if extra else str(error)
        raise ConfigError(f"{url}: missing package: {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {error}; expected s3://, gs:// or another protocol of fsspec") from error
    files.invalidate_cache()
    files.retries = 1  # of s3fs. Only ``retried`` repeats: the times of all would multiply
    getattr(files, "config_kwargs", {}).setdefault("retries", {"total_max_attempts": 1})  # of botocore
    return files, path
