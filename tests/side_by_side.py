"""What two workers of pytest-xdist do at the same time (scripts/test.sh starts two; without them none of this counts).

A file's tests stay together, for what they share. All files that start ranks are one worker's, so that never more than
one launch runs. A test that measures tenths of seconds is marked ``alone``: each waits for what the other worker runs.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
STARTS_RANKS = re.compile(r"tests\.(distributed|reliability)\b|torch\.distributed\.run\b")
KERNELS = "tests/ops/"
"""The longest of the tests without ranks; they go first, lest one worker is left with them."""


@functools.cache
def unit_of(path: str) -> str:
    """The tests of one unit go to one worker. ``path``: of a test file, in the repository."""
    if STARTS_RANKS.search((REPOSITORY / path).read_text(encoding="utf-8")):
        return "ranks"
    return path.rpartition("/")[0] if path.startswith(KERNELS) else path  # a folder shares what is compiled


def _path_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(_path_of(nodeid))

    config.option.loadscopereorder = False  # it would put files of few tests last, however long these are
    return Units(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> tuple[bool, bool]:
        path = _path_of(item.nodeid)
        return unit_of(path) != "ranks", not path.startswith(KERNELS)

    if _is_worker(config):
        items.sort(key=turn)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Before any plugin's: waiting for the other worker does not count as the test's time."""
    if not _is_worker(item.config):
        return (yield)
    with _place(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _place(alone: bool) -> Iterator[None]:
    """Hold the lock of all tests, shared or not. Whoever waits for it holds the turnstile, so that none overtakes."""
    turnstile, place = _locks()
    fcntl.flock(turnstile, fcntl.LOCK_EX)
    fcntl.flock(place, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    fcntl.flock(turnstile, fcntl.LOCK_UN)
    try:
        yield
    finally:
        fcntl.flock(place, fcntl.LOCK_UN)  # by name: processes that the test has forked have the file, too


@functools.cache
def _locks() -> tuple[int, int]:
    """Files that are there anyway, so that nothing is left behind."""
    file = Path(__file__)
    return os.open(file, os.O_RDONLY), os.open(file.parent, os.O_RDONLY)
