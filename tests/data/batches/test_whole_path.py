"""Random tables with ties, gaps and dirt -> file -> store -> samples, against a few lines of pandas."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs, Task
from hstu.data.features.roles import FeatureRoles
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.sampling.sampler import BatchPlan, SamplerPosition
from hstu.data.sampling.samples import SampleTable, Split, build_samples
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import SequenceStore

SEED = 7
DIRT = ["", "-1", "x", "9e99"]
Sample = tuple[str, list[str], list[int], int, int, str | None]
"""User, items, actions, labels, candidates, held-out item."""


@st.composite
def tables(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows as written, usable rows), of text; times have ties and gaps, some values are dirt."""
    seed, rows = draw(st.integers(0, 2**32)), draw(st.integers(1, 120))
    users, moments = draw(st.integers(1, 8)), draw(st.sampled_from([1, 5, 40, 10**9]))
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "u": np.char.add("user ", rng.integers(0, users, rows).astype(str)),
            "i": rng.integers(0, 12, rows).astype(str),
            "a": rng.integers(0, 4, rows).astype(str),
            "t": rng.integers(0, moments, rows).astype(str),
        }
    )
    dirty = rng.random(rows) < draw(st.sampled_from([0, 0.1]))
    dirty[0] = False
    written = table.copy()
    for row in np.flatnonzero(dirty):
        written.loc[row, rng.choice(["a", "t"])] = rng.choice(DIRT)
    return written, table[~dirty]


def reference(usable: pd.DataFrame, args: DatasetArgs, task: Task, split: Split, chosen: set[str]) -> list[Sample]:
    """The samples by the definitions, one history at a time; ``chosen``: the users of a holdout's split."""
    ordered = usable.assign(t=usable.t.astype(int), a=usable.a.astype(int)).sort_values(["u", "t"], kind="stable")
    times = np.sort(ordered.t.to_numpy())
    cut = times[min(int(args.train_fraction * len(times)), len(times) - 1)]
    length, stride, candidates = args.max_sequence_length, args.window_stride, args.max_num_candidates
    samples: list[Sample] = []
    for user, history in ordered.groupby("u"):
        target, later = None, None
        if task == "retrieval":
            held_out = 1 + args.valid_items if split == "train" else 1 + (args.valid_items if split == "valid" else 0)
            target = None if split == "train" else (list(history.i)[-held_out:] or [None])[0]
            history = history[:-held_out] if len(history) >= held_out else history[:0]
        elif args.split == "time":
            later = None if split == "train" else int((history.t >= cut).sum())
            history = history[history.t < cut] if split == "train" else history
        if user not in chosen or later == 0:
            continue
        end, begin, first = len(history), 0, True
        while first or (split == "train" and stride and begin > 0):
            begin = max(0, end - length)
            window = history[begin:end]
            oldest = begin == 0 or stride is None
            few = len(window) if later is None else min(later, len(window))
            shown = min(candidates, few if later is not None else len(window) - 1 if not first else candidates)
            labels = few if task == "ranking" else len(window) - 1 if split == "train" else 0
            labels = labels if oldest or split != "train" else min(labels, stride or 0)
            labels = shown if candidates else labels
            enough = 2 if task == "retrieval" and split == "train" else 1 + shown
            if len(window) >= enough and (first or shown or not candidates):
                samples.append((str(user), list(window.i), list(window.a), labels, shown, target))
            end, first = end - (stride or 0), False
    return samples


def found(store: SequenceStore, table: SampleTable) -> list[Sample]:
    """The samples as a reader gives them, in raw ids."""
    reader = StoreReader(store, table, FeatureRoles("i", "a", ()))
    places = np.arange(len(table))
    rows = reader.read(BatchPlan(places, places, 0, 0, SamplerPosition()))
    items, ends = store.raw_ids("i"), np.cumsum(rows.lengths)
    users = store.raw_ids("user_id")
    return [
        (
            str(users[rows.user_ids[row]]),
            [str(item) for item in items[rows.items[end - length : end]]],
            [] if rows.actions is None else rows.actions[end - length : end].tolist(),
            int(rows.num_labels[row]),
            int(rows.num_candidates[row]),
            None if rows.held_out is None else str(items[rows.held_out[row]]),
        )
        for row, (length, end) in enumerate(zip(rows.lengths, ends, strict=True))
    ]


CASES: list[tuple[Task, dict[str, Any], tuple[Split, ...]]] = [
    ("retrieval", {"valid_items": 1}, ("train", "valid", "test")),
    ("retrieval", {"valid_items": 0}, ("train", "test")),
    ("ranking", {"split": "user_holdout"}, ("train", "valid")),
    ("ranking", {"split": "time"}, ("train", "valid")),
    ("ranking", {"split": "time", "max_num_candidates": 2}, ("train", "valid")),
    ("ranking", {"split": "user_holdout", "max_num_candidates": 3}, ("train", "valid", "all")),
]


@settings(max_examples=10)
@given(tables(), st.integers(4, 30), st.none() | st.integers(1, 4))
def test_samples_are_those_of_the_reference(
    rows: tuple[pd.DataFrame, pd.DataFrame], length: int, stride: int | None
) -> None:
    written, usable = rows
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.csv"
        written.to_csv(file, index=False)
        columns = InteractionColumns(interactions=file, user="u", item="i", action="a", time="t")
        store = SequenceStore.open(
            import_interactions("mine", columns, output=Path(folder) / "s", bad_row_policy="skip")
        )
        assert sum(store.statistics["skipped_rows"].values()) == len(written) - len(usable)
        for task, options, splits in CASES:
            args = DatasetArgs(dataset_name="mine", max_sequence_length=length, window_stride=stride, **options)
            users_of: dict[Split, set[str]] = {}
            for split in splits:
                table = build_samples(store, args, task, split, SEED)
                everyone = set(usable.u)
                chosen = everyone
                if args.split == "user_holdout" and split != "all":
                    # Who is held out is a matter of hashing (test_samples.py): of the users, none is in both.
                    chosen = {str(user) for user in store.raw_ids("user_id")[holdout(store, args, split)]}
                    users_of[split] = chosen
                assert found(store, table) == reference(usable, args, task, split, chosen), (task, options, split)
            if users_of:
                assert users_of["train"] | users_of["valid"] == everyone
                assert not users_of["train"] & users_of["valid"]
                assert len(users_of["train"]) == round(args.train_fraction * len(everyone))


def holdout(store: SequenceStore, args: DatasetArgs, split: Split) -> np.ndarray:
    """Rows of the users of a holdout's split, whatever becomes of their histories."""
    all_of_them = DatasetArgs(dataset_name="mine", max_sequence_length=1000, train_fraction=args.train_fraction)
    return np.unique(build_samples(store, all_of_them, "ranking", split, SEED).user)
