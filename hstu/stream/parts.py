"""Where the parts of a stream come from: a directory, or a Kafka topic of JSON objects."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from hstu.base import remote
from hstu.base.errors import DataError
from hstu.base.files import written_aside
from hstu.base.topic import TopicReader

if TYPE_CHECKING:
    from confluent_kafka import Message

_HIDDEN = (".", "_")
"""Names that begin so are no parts: files that are being written, and marks of other programs."""
_TIMEOUT_S = 30.0
EVENTS, QUARANTINE = "events.csv", "quarantine.jsonl"


class Directory:
    """A directory in which each entry is a part: a file, or a directory of files. Parts come in the order of names.

    A part must appear at once, by a rename. One with an earlier name than others that are taken is taken, too: its
    events are late. ``url``: a local path, or any URL of fsspec, whose files are copied.
    """

    def __init__(self, url: str) -> None:
        self._files, root = remote.filesystem(remote.url_of(url) or url)
        self._root, self._url, self._is_local = PurePosixPath(root), url, isinstance(self._files, LocalFileSystem)
        if not self._files.isdir(root):
            raise DataError(f"--source {url}: there is no such directory; each entry of it is to be a part of the data")

    def waiting(self, taken: Sequence[str]) -> list[str]:
        """Names of the complete parts that are not in ``taken``, the next one first."""
        self._files.invalidate_cache()
        names = {PurePosixPath(path).name for path in self._files.ls(str(self._root), detail=False)}
        return sorted(name for name in names - set(taken) if not name.startswith(_HIDDEN))

    def fetch(self, name: str, taken: Sequence[str], folder: Path) -> list[Path]:
        """The local files of a part, which must not change any more. What is fetched or made lies in ``folder``, where
        it is there already if an earlier call was not killed. Raises DataError if the part is empty or gone."""
        part = self._root / name
        found = sorted(PurePosixPath(path) for path in self._files.find(str(part)))
        files = [path for path in found if not any(each.startswith(_HIDDEN) for each in path.relative_to(part).parts)]
        if not files:
            raise DataError(f"--source {self._url}: {name} has no files")
        return [Path(path) if self._is_local else self._copied(path, part, folder) for path in files]

    def _copied(self, path: PurePosixPath, part: PurePosixPath, folder: Path) -> Path:
        target = folder / (path.name if path == part else str(path.relative_to(part)))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(target) as aside:
                url = f"{self._url}/{path.relative_to(self._root)}"
                remote.retried(url, lambda files, source: files.get_file(source, str(aside)))
        return target


class Topic:
    """A Kafka topic, whose messages are JSON objects from column to value. A part is what has come since the last one.

    A part's name has the offsets at which it ends, ``0-1200,1-1187`` of two partitions. The next part begins there, so
    that the results of a stream are all that it knows of its position; Kafka keeps no offsets for it. Messages that are
    no objects of single values go to QUARANTINE in the part's directory, with the reason.

    url: ``kafka://host:port[,host:port]/topic``. most: messages in a part. most_bad: messages in quarantine of a part;
    with more, ``fetch`` raises DataError.
    """

    def __init__(self, url: str, most: int, most_bad: int) -> None:
        self._reader = TopicReader("--source", url)
        self._topic, self._most, self._most_bad = self._reader.topic, most, most_bad

    def waiting(self, taken: Sequence[str]) -> list[str]:
        """As of Directory. One part: all messages that are there, or ``most`` of them. Raises DataError if messages are
        gone that no part has."""
        begins, ends = _ends(taken), dict[int, int]()
        room, partitions = self._most, self._reader.offsets()
        for place, (partition, (low, high)) in enumerate(partitions.items()):
            begin = begins.get(partition, low)
            if begin < low:
                raise DataError(
                    f"topic {self._topic}, partition {partition}: messages {begin} to {low - 1} are gone before they "
                    "were read. Keep messages for longer than the stream may stand still, and begin it anew"
                )
            fair = -(-room // (len(partitions) - place))  # so that no partition waits for another
            ends[partition] = begin + min(high - begin, fair)
            room -= ends[partition] - begin
        return [",".join(f"{each}-{end}" for each, end in ends.items())] if room < self._most else []

    def fetch(self, name: str, taken: Sequence[str], folder: Path) -> list[Path]:
        """As of Directory. Without a good message there is no file."""
        events, quarantine = folder / EVENTS, folder.parent / QUARANTINE
        if not quarantine.exists():
            rows, bad = self._read(name, taken)
            if len(bad) > self._most_bad:
                raise DataError(
                    f"topic {self._topic}: {len(bad):,} messages of the part {name} cannot be read, and --max_bad "
                    f"allows {self._most_bad:,}. The first: {json.dumps(bad[0])}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            if rows:
                columns = dict.fromkeys(column for row in rows for column in row)
                with written_aside(events) as aside, aside.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(columns))
                    writer.writeheader()
                    writer.writerows(rows)
            with written_aside(quarantine) as aside:  # last, because it says that the part is whole
                aside.write_text("".join(json.dumps(each) + "\n" for each in bad), encoding="utf-8")
        return [events] if events.exists() else []

    def _read(self, name: str, taken: Sequence[str]) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
        """(rows, messages of the quarantine) of a part, in the order of partitions and offsets."""
        rows, bad = list[Mapping[str, Any]](), list[dict[str, Any]]()
        begins = {each: low for each, (low, _) in self._reader.offsets().items()} | _ends(taken)
        for partition, end in _ends([name]).items():
            for message in self._messages(partition, begins[partition], end):
                row, reason = _row(message.value())
                if row is not None:
                    rows.append(row)
                else:
                    text = (message.value() or b"")[:1000].decode("utf-8", errors="replace")
                    bad.append({"partition": partition, "offset": message.offset(), "reason": reason, "message": text})
        return rows, bad

    def _messages(self, partition: int, begin: int, end: int) -> Iterator["Message"]:
        position = begin
        while position < end:
            begins = {partition: begin} if position == begin else {}  # later calls go on from there
            messages = self._reader.read(min(10_000, end - position), _TIMEOUT_S, begins)
            if not messages:
                raise DataError(f"topic {self._topic}, partition {partition}, offset {position}: nothing came in time")
            yield from (message for message in messages if (message.offset() or 0) < end)
            position = (messages[-1].offset() or 0) + 1


Source = Directory | Topic
"""Parts with names, in an order. What ``taken`` has, the names of the parts so far, decides what comes next."""


def _ends(taken: Sequence[str]) -> dict[int, int]:
    """Partition → the offset after the last message of the last part."""
    if not taken:
        return {}
    pairs = (each.split("-") for each in taken[-1].split(","))
    return {int(partition): int(end) for partition, end in pairs}


def _row(value: bytes | None) -> tuple[Mapping[str, Any] | None, str]:
    """(the object of a message, ""), or (None, why it is none)."""
    try:
        row = json.loads(value or b"")
    except ValueError as error:
        return None, f"no JSON: {error}"
    if not isinstance(row, dict) or not row:
        return None, "no JSON object"
    for column, each in row.items():
        if isinstance(each, (list, dict)) or (isinstance(each, float) and not math.isfinite(each)):
            return None, f"the value of {column!r} is no text or number"
    return row, ""
