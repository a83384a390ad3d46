"""Small factories that the tests of every room share."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu.data.batches.batch import NEGATIVES, BatchNegatives, HSTUBatch, ItemColumns, SeenIds, keyed_jagged


def _flat(lists: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([value for row in lists for value in row], dtype=np.int64)


def _newest(lists: Sequence[Sequence[int]], counts: Sequence[int]) -> np.ndarray:
    return _flat([row[len(row) - count :] for row, count in zip(lists, counts, strict=True)])


def _tensor(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype)


def make_batch(
    item_lists: Sequence[Sequence[int]],
    action_lists: Sequence[Sequence[int]] | None = None,
    context: Mapping[str, Sequence[int]] | None = None,
    *,
    task: str = "ranking",
    num_candidates: Sequence[int] | None = None,
    num_labels: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    timestamp_lists: Sequence[Sequence[int]] | None = None,
    negatives: Sequence[int] | None = None,
    draws: Sequence[Sequence[int]] | None = None,
    in_batch_pool: bool = False,
    seen_lists: Sequence[Sequence[int]] | None = None,
    item: str = "item",
    action: str = "action",
) -> HSTUBatch:
    """An HSTUBatch written out by hand; an empty item list is a padding sequence.

    ``task``: "ranking" (labels: actions of the candidates, or of all items without candidates), "retrieval" (labels:
    every item but the first) or "retrieval_eval" (give ``labels``, the held-out items, one a sequence).
    ``num_labels`` and ``labels`` override that. ``context``: one id a sequence for each feature.
    """
    lengths = np.array([len(row) for row in item_lists], dtype=np.int64)
    candidates = np.array(num_candidates if num_candidates is not None else [0] * len(lengths), dtype=np.int64)
    if num_labels is None:
        per_task = {"ranking": candidates if candidates.any() else lengths, "retrieval": np.maximum(lengths - 1, 0)}
        num_labels = per_task.get(task, np.zeros_like(lengths)).tolist()
    if labels is None:
        if task == "retrieval_eval":
            raise ValueError("retrieval_eval needs labels: the held-out item of each sequence")
        rows = item_lists if task == "retrieval" else action_lists
        labels = _newest(rows if rows is not None else [[0] * len(row) for row in item_lists], num_labels).tolist()

    values: dict[str, np.ndarray] = {}
    jagged_lengths: dict[str, np.ndarray] = {}
    for name, ids in (context or {}).items():
        jagged_lengths[name] = (lengths > 0).astype(np.int64)
        values[name] = np.array(ids, dtype=np.int64)[lengths > 0]
    for name, lists in ((item, item_lists), (action, action_lists)):
        if lists is not None:
            values[name], jagged_lengths[name] = _flat(lists), lengths
    if negatives is not None:
        values[NEGATIVES] = np.array(negatives, dtype=np.int64)
        jagged_lengths[NEGATIVES] = np.array([len(negatives)] + [0] * (len(lengths) - 1), dtype=np.int64)

    pool = np.unique(values[item], return_index=True)[1] if in_batch_pool else None
    user_ids = np.where(lengths > 0, np.arange(len(lengths)), -1)
    return HSTUBatch(
        features=keyed_jagged(values, jagged_lengths),
        num_candidates=torch.from_numpy(candidates),
        num_labels=torch.tensor(num_labels, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        user_ids=torch.from_numpy(user_ids),
        items=ItemColumns(timestamps=None if timestamp_lists is None else torch.from_numpy(_flat(timestamp_lists))),
        negatives=BatchNegatives(
            draws=_tensor(draws, torch.int32), pool_positions=None if pool is None else torch.from_numpy(pool)
        ),
        seen=None
        if seen_lists is None
        else SeenIds(
            values=torch.from_numpy(_flat(seen_lists)),
            lengths=torch.tensor([len(row) for row in seen_lists]),
        ),
        real_batch_size=int((lengths > 0).sum()),
        item_lengths=lengths,
        num_candidates_host=candidates,
        num_labels_host=np.array(num_labels, dtype=np.int64),
    )


def begin_script(file: Path, *arguments: str, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """A shell script that leads a session of its own, with all that it says in ``stdout``."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(file), *arguments], cwd=cwd, env=env, start_new_session=True, **pipes)


def flip(file: Path, position: int | None = None) -> None:
    """Change one bit of a file, by default in its middle."""
    content = bytearray(file.read_bytes())
    position = len(content) // 2 if position is None else position
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


def error_of(call: Callable[[], Any], kind: type[Exception]) -> str:
    """The message of the error that a call raises; "no error" if it raises none."""
    try:
        call()
    except kind as error:
        return str(error)
    return "no error"


class Allocations(TorchDispatchMode):
    """Records the size of the largest tensor with new storage that an operation creates."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            own = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if own and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result
