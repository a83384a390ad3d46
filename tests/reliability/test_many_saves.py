"""Saving many times."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

from hstu.checkpoint.directory import complete_checkpoints
from hstu.checkpoint.store import CheckpointStore
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import run_cases
from tests.distributed.toy import new_state, train_state

BEST, KEPT = 5, 3


def save_many(mesh: Mesh, directory: str, saves: int, keep: int) -> dict[str, Any]:
    """Save repeatedly while a thread counts the complete checkpoints; return the counts."""
    state = new_state(mesh, optimizer="adam")
    store = CheckpointStore(directory, "", mesh, keep, background_timeout_s=60.0)
    store.claim()
    seen: list[int] = []
    looking = threading.Event()

    def look() -> None:
        while not looking.wait(0.002):
            if state.iteration > keep + 2:
                seen.append(len(complete_checkpoints(Path(directory))))

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(saves):
        train_state(state, mesh, 1)
        store.save(state)
        if state.iteration == BEST:
            store.mark_best(BEST)
        store.poll()
    store.wait()
    looking.set()
    watcher.join()
    names = sorted(path.name for path in Path(directory).iterdir() if path.name != ".lock")
    return {"seen": [min(seen), max(seen), len(seen)], "names": names}


def test_the_best_is_kept_besides_the_last_ones(tmp_path: Path) -> None:
    saves = 12
    call = partial(save_many, directory=str(tmp_path / "checkpoints"), saves=saves, keep=KEPT)
    result = run_cases(1, {"save": call})[0]["save"]
    fewest, most, looked = result["seen"]
    assert looked > saves / 2 and fewest >= 2 and most <= KEPT + 2
    last = [f"iteration_{saves - back:08d}" for back in (2, 1, 0)]
    assert result["names"] == ["best", f"iteration_{BEST:08d}", *last, "latest"]
