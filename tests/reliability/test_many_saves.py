"""Saving many times."""

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hstu.checkpoint.directory import complete_checkpoints
from hstu.checkpoint.store import BackgroundWriter, CheckpointStore
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.toy import new_state, train_state

BEST, KEPT = 5, 3
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WARM_UP = 100  # saves before memory is measured, while allocators and caches fill


def save_and_look(directory: Path, saves: int, background: bool) -> dict[str, Any]:
    """Save on one rank, with an early best; check the checkpoints seen meanwhile and those left at the end."""
    call = partial(save_many, directory=str(directory / "checkpoints"), saves=saves, keep=KEPT, background=background)
    result = run_cases(Launch(1, timeout_s=240), {"save": call})[0]["save"]
    fewest, most, looked = result["seen"]
    print(f"{saves} saves in {result['seconds']:.1f} s, looked {looked} times, saw {fewest} to {most} commits")
    assert looked > saves / 2 and fewest >= 2 and most <= KEPT + 2
    last = [f"iteration_{saves - back:08d}" for back in (2, 1, 0)]
    assert result["names"] == ["best", f"iteration_{BEST:08d}", *last, "latest"]
    return result


def save_many(mesh: Mesh, directory: str, saves: int, keep: int, background: bool) -> dict[str, Any]:
    """Save repeatedly while a thread counts the complete checkpoints; return the counts and memory use."""
    state = new_state(mesh, optimizer="adam")
    store = CheckpointStore(directory, "", mesh, keep, BackgroundWriter(mesh, 60) if background else None)
    store.claim()
    seen: list[int] = []
    memory: list[int] = []
    looking = threading.Event()

    def look() -> None:
        while not looking.wait(0.002):
            if state.iteration > keep + 2:
                seen.append(len(complete_checkpoints(Path(directory))))

    watcher = threading.Thread(target=look)
    watcher.start()
    begun = time.monotonic()
    for _ in range(saves):
        train_state(state, mesh, 1)
        store.save(state)
        if state.iteration == BEST:
            store.mark_best(BEST)
        store.poll()
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES)
    store.wait()
    seconds = time.monotonic() - begun
    looking.set()
    watcher.join()
    names = sorted(path.name for path in Path(directory).iterdir() if path.name != ".lock")
    return {"seen": [min(seen), max(seen), len(seen)], "memory": memory, "names": names, "seconds": seconds}


@pytest.mark.parametrize("background", [False, True])
def test_the_best_is_kept_besides_the_last_ones(tmp_path: Path, background: bool) -> None:
    save_and_look(tmp_path, 12, background)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_memory_does_not_grow_over_500_saves(tmp_path: Path, background: bool) -> None:
    result = save_and_look(tmp_path, 500, background)
    growth = max(result["memory"][WARM_UP:]) / result["memory"][WARM_UP] - 1
    print(f"memory grew by {growth:.2%}")
    assert growth < 0.05
