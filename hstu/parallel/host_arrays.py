"""Arrays that all ranks of a host share: one rank computes them, and all map the file that it writes."""

import logging
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

Built = TypeVar("Built")


def once_per_host(build: Callable[[], Built], mesh: Mesh | None, name: str) -> Built:
    """The result of ``build``, whose NumPy arrays the ranks of a host share, read-only. Collective over the host.

    The first rank of the host builds it and writes the arrays to a temporary file (in TMPDIR), which lasts as long as
    its maps. Every rank builds its own if the first one fails. ``name``: equal on all ranks.
    """
    if mesh is None or mesh.store is None or mesh.local_world_size == 1:
        return build()
    first = mesh.rank - mesh.rank % mesh.local_world_size
    key = f"{name} of rank {first}"
    key += f", call {mesh.store.add(f'{key} for rank {mesh.rank}', 1)}"
    if mesh.rank == first:
        written = b""
        try:
            written = _write(build())
        except OSError as error:
            log.warning("each rank keeps its own %s, because its file cannot be written: %s", name, error)
        finally:
            mesh.store.set(key, written)  # type: ignore[arg-type]  # bytes, which get returns
    found = mesh.store.get(key)
    if not found:
        return build()
    path, places, rest = pickle.loads(found)
    try:
        whole = np.memmap(path, np.uint8, "r")
    except OSError as error:  # ranks in containers of their own
        log.warning("this rank keeps its own %s, because it cannot read the file of rank %d: %s", name, first, error)
        return build()
    if mesh.store.add(f"{key}, maps", 1) == mesh.local_world_size:
        Path(path).unlink()
    return pickle.loads(rest, buffers=[whole[place] for place in places])


def _write(built: object) -> bytes:
    """Writes the arrays. Returns (path, place of each array in the file, the rest of the object), pickled."""
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(built, protocol=5, buffer_callback=arrays.append)
    with tempfile.NamedTemporaryFile(prefix="hstu_", delete=False) as file:
        places = []
        for array in arrays:
            begin = file.write(bytes(64 - file.tell() % 64)) and file.tell()
            places.append(slice(begin, begin + file.write(array.raw())))
    return pickle.dumps((file.name, places, rest))
