"""A store of any size opens at once and takes no memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from hstu.base.files import sha256
from hstu.data.store.layout import META_FILE
from hstu.data.store.meta import FORMAT, VERSION, sealed
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import REPOSITORY


def sparse_store(path: Path, users: int, events: int, items: int) -> SequenceStore:
    """A store of any size whose large arrays are sparse files: every code and every time is 0."""
    path.mkdir(parents=True)
    files: dict[str, dict[str, Any]] = {}

    def create(file: str, dtype: str, length: int, values: np.ndarray | None = None) -> None:
        array = open_memmap(path / file, mode="w+", dtype=dtype, shape=(length,))
        if values is not None:
            array[:] = values
        described = {"dtype": dtype, "length": length, "bytes": (path / file).stat().st_size}
        files[file] = {**described, "sha256": "too large to be read" if values is None else sha256(path / file)}

    create("offsets.npy", "<i8", users + 1, np.linspace(0, events, users + 1).astype(np.int64))
    create("context.user_id.npy", "<i4", users, np.arange(users))
    create("sequence.video_id.npy", "<i4", events)
    create("sequence.action.npy", "<i4", events)
    create("sequence.timestamp.npy", "<i8", events)
    create("vocabulary.video_id.npy", "<i8", items)
    create("vocabulary.user_id.npy", "<i8", users, np.arange(users))
    described = ("name", "role", "dtype", "cardinality", "has_vocab")
    features = [
        ("user_id", "context", "<i4", users, True),
        ("video_id", "item", "<i4", items, True),
        ("action", "action", "<i4", 256, False),
        ("timestamp", "timestamp", "<i8", None, False),
    ]
    meta = {
        **{"format": FORMAT, "version": VERSION, "name": "sparse", "command": None, "num_users": users},
        **{"num_events": events, "statistics": {}, "sources": {}, "files": files},
        "features": [dict(zip(described, feature, strict=True)) for feature in features],
    }
    (path / META_FILE).write_text(sealed(meta))
    return SequenceStore.open(path)


OPEN = """
import json, psutil, sys, time
from hstu.data.store.sequence_store import SequenceStore
before = psutil.Process().memory_info().rss
begun = time.perf_counter()
store = SequenceStore.open(sys.argv[1])
seconds = time.perf_counter() - begun
print(json.dumps({"open_s": seconds, "rss_bytes": psutil.Process().memory_info().rss - before}))
"""


def opened(path: Path) -> dict[str, float]:
    """Seconds and resident bytes to open a store, in a fresh process."""
    command = [sys.executable, "-c", OPEN, str(path)]
    found: dict[str, float] = json.loads(
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    )
    return found


def test_a_store_of_322_million_events_opens_in_a_tenth_of_a_second_in_any_memory(tmp_path: Path) -> None:
    store = sparse_store(tmp_path / "large", 27_285, 322_278_385, 32_038_725)
    assert sum(file.stat().st_size for file in store.path.iterdir()) > 5e9
    found = [opened(store.path) for _ in range(3)]
    assert min(each["open_s"] for each in found) < 0.1
    assert max(each["rss_bytes"] for each in found) < 16 << 20
    assert np.asarray(store.sequence("video_id")[200_000_000:200_000_003]).tolist() == [0, 0, 0]
