"""What a raw file really is, from its first bytes: said in one line before a parser trips over it."""

from __future__ import annotations

import codecs

from hstu.config.errors import DataError
from hstu.data.preprocess.tables import RawFile, open_bytes

_SNIFFED_BYTES = 1 << 16
_SIGNATURES = (
    (b"\x1f\x8b", "gzip-compressed; unpack it, or let its name end in .gz"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"BZh", "bzip2-compressed; unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it"),
    (b"\xfd7zXZ", "xz-compressed; unpack it"),
    (b"PAR1", "a Parquet file; let its name end in .parquet"),
    (b"SQLite format 3", "a SQLite database; export the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook; save the sheet as CSV"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
)
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


def check_readable(raw: RawFile) -> None:
    """Raises DataError if the file is missing, empty, or not what its name and RawFile say."""
    file = raw.path
    with open_bytes(file) as stream:
        head = stream.read(_SNIFFED_BYTES)
    if not head:
        raise DataError(f"{file} is empty")
    if raw.is_text:
        _check_text(raw, head)
    elif not head.startswith(b"PAR1"):
        raise DataError(f"{file} is not a Parquet file, whatever its name says")


def _check_text(raw: RawFile, head: bytes) -> None:
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            raise DataError(f"{raw.path} is {what}")
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{raw.path} is a web page, perhaps an error message instead of the download; get it again")
    if b"\0" in head:
        line = head.count(b"\n", 0, head.index(0)) + 1
        raise DataError(f"{raw.path}:{line}: a zero byte; this is not a text file, or a damaged one")
    breaks = head.count(b"\r\n"), head.replace(b"\r\n", b"").count(b"\n")
    if all(breaks):
        raise DataError(f"{raw.path}: some lines end in CR LF and some in LF; convert it, e.g. with dos2unix")
    if not raw.header:
        _check_columns_of_first_line(raw, head)


def _check_columns_of_first_line(raw: RawFile, head: bytes) -> None:
    assert raw.columns is not None
    line = head.splitlines()[0].decode("utf-8", errors="replace")
    found, expected = len(line.split(raw.delimiter)), len(raw.columns)
    if found == 1 < expected:
        raise DataError(
            f"{raw.path}:1: expected {expected} columns ({', '.join(raw.columns)}) separated by {raw.delimiter!r}, "
            f"found {line[:80]!r}"
        )
