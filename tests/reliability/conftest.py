import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import write_small_store
from tests.train.tiny import walks


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 31 users."""
    path = tmp_path_factory.mktemp("reliability") / "store"
    write_small_store(path, **walks(31))
    return str(path)


@pytest.fixture
def disk() -> Iterator[Callable[[Path, str], None]]:
    """``disk(directory, options)`` mounts a tmpfs there."""
    mounted: list[Path] = []

    def mount(directory: Path, options: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("NEEDS THE RIGHT TO MOUNT: a small disk of its own")
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)
