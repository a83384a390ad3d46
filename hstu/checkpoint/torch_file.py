"""torch.save that tells what the file system has said where it refuses; torch says "unexpected pos 704 vs 598"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def write_file(value: Any, path: Path) -> None:
    """torch.save to a file. Raises OSError where the file system refuses."""
    with system_errors(), path.open("wb") as file:
        torch.save(value, file)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise the OSError that a RuntimeError of torch.save came from."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
