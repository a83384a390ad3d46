"""Writes starter gin files with sizes from the data. Never replaces a file, because users may have edited it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hstu.base import remote
from hstu.base.files import replace_text
from hstu.base.shipped import command
from hstu.config.args import NetworkArgs, Task
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.features.roles import predefined_embeddings
from hstu.data.store.layout import META_FILE
from hstu.data.store.sequence_store import SequenceStore

_HEADROOM, _LEAST_HEADROOM = 0.1, 8
"""Spare rows of a table: fraction of its ids, and the minimum."""
_LONGEST = 200
"""Largest max_sequence_length of a starter file."""
_MOST_CANDIDATES = 100
"""Most candidates per sample; larger requests are divided."""
_COVERED = 0.99
"""Share of users whose whole histories fit, unless _LONGEST cuts them."""
_FULL_SOFTMAX_ITEMS = 20_000
"""With more items, retrieval draws negatives."""
_SHORT = 20
"""Histories with fewer events on average are short."""
_MOST_CLASSES = 1000
_SHARED = 5
"""A feature of users with fewer users per value names users, not groups, and is left out."""
_STEPS: Mapping[Task, tuple[int, int, int]] = {"retrieval": (3000, 16, 40), "ranking": (800, 4, 40)}
_QUICK_STEPS = (500, 1, 50)
"""Iterations of a run, its fewest and its most epochs."""
_EVALUATIONS, _PATIENCE = 12, 4
_FACTORS = """\
# A factor model inside the network, for numbers such as stars: it is fitted to those before each event.
NetworkArgs.num_factors = 12
"""
_CLOCKS = """\
# HR@10 is told the time of the item to find, and HR@10/last_event is not; DatasetArgs.query_time trains for both.
"""


def write_starters(store: SequenceStore, path: Path, quick: bool = False) -> Iterator[str]:
    """Write ``<path>_retrieval.gin`` and ``<path>_ranking.gin``, or ``<file>.new`` beside an older file that differs.
    Yields per task how to train, or why not. ``path``: the store, absolute or relative to where training will start.
    ``quick``: write ``<path>_retrieval_quick.gin``, … instead, a small model and few iterations."""
    objectives: Mapping[Task, tuple[int, str] | str] = {"retrieval": _retrieval(store), "ranking": _ranking(store)}
    for task, objective in objectives.items():
        if isinstance(objective, str):
            yield f"no starter file for {task}: {objective}"
            continue
        name, given = f"{path.name}_{task}{'_quick' if quick else ''}.gin", remote.as_given(path)
        file = Path(name) if remote.url_of(given) else path.with_name(name)
        text = _starter(store, given, task, quick, *objective)
        train = command(f"pretrain_gr_{task}.py")
        yield f"train {task}: {train} --gin-config-file {file}{_write(file, text, store)}"


def _write(file: Path, text: str, store: SequenceStore) -> str:
    """Write the file unless it exists. Returns a suffix for the message."""
    if not file.exists():
        replace_text(file, text, shared=True)
    elif file.read_text(encoding="utf-8", errors="replace") != text:
        if file.stat().st_mtime >= (store.path / META_FILE).stat().st_mtime:
            return " (edited, kept)"
        new = file.with_name(f"{file.name}.new")
        replace_text(new, text, shared=True)
        return f" (of an earlier store, for its checkpoints while its tables have rows left; for a new run: {new})"
    return ""


def _starter(store: SequenceStore, path: str, task: Task, quick: bool, samples: int, objective: str) -> str:
    """A gin file for about ``samples`` training samples. ``objective``: lines of settings of the task."""
    items, is_ranking = _items(store), task == "ranking"
    per_user, per_item = store.num_events / store.num_users, store.num_events / items
    width = 64 if quick or items <= 5000 else 256
    heads = max(width // 64, 2)
    batch = next(size for size in (16, 32, 64, 128) if size == 128 or 100 * size >= samples)
    steps, fewest, most = _QUICK_STEPS if quick else _STEPS[task]
    steps_per_epoch = -(-samples // batch)
    epochs = min(max(steps // steps_per_epoch, fewest), most)
    interval = -(-epochs * steps_per_epoch // _EVALUATIONS)
    context = [name for name in store.contextual_features if store.num_users >= _SHARED * store.cardinality(name)]
    covering = int(np.quantile(np.diff(store.offsets()), _COVERED, method="higher"))
    if store.num_requests:
        shown = min(int(store.requests().sizes.max()), _MOST_CANDIDATES)
        covering += shown
        if is_ranking:
            objective = (
                _gin({"DatasetArgs.candidates": "requests", "DatasetArgs.max_num_candidates": shown}) + objective
            )
    positions: dict[str, object] = {"NetworkArgs.position_encoding": "relative_bias"}
    if store.timestamp_feature is None:
        positions = {"NetworkArgs.position_encoding": "absolute", "NetworkArgs.num_position_buckets": 256}
    metric, mode = ("LOGLOSS", "min") if is_ranking else ("NDCG@10", "max")
    purpose = ": two layers of width 64, for a first look" if quick else ": a recipe with sizes from the data"
    paragraphs = "".join(f"{paragraph}\n" for paragraph in _side(store))
    tables = "\n".join(_tables(store, width, context))
    return f"""\
# {task.capitalize()} on {store.name} ({store.num_users:,} users, {items:,} items, {store.num_events:,} events){purpose}

DatasetArgs.dataset_name = {store.name!r}
DatasetArgs.dataset_path = {path!r}
# All events of {_COVERED:.0%} of the users, but no more than {_LONGEST} of a user.
DatasetArgs.max_sequence_length = {max(min(covering, _LONGEST), 2)}
# Features of users with at least {_SHARED} users per value.
DatasetArgs.contextual_feature_names = {context!r}
DatasetArgs.shuffle = True

# {per_user:.0f} events per user: 4 layers from {_SHORT} on, else 2; in retrieval temperature
# 0.05, else 0.07 and later targets.
NetworkArgs.num_layers = {2 if quick or _are_short(store) else 4}
# {items:,} items: width 64 and learning rate 0.002 up to 5,000, else 256 and 0.001.
NetworkArgs.hidden_size = {width}
NetworkArgs.num_attention_heads = {heads}
NetworkArgs.kv_channels = {width // heads}
OptimizerArgs.optimizer_str = 'adam'
OptimizerArgs.learning_rate = {0.002 if width == 64 else 0.001}
OptimizerArgs.adam_beta2 = 0.98
# {per_item:.0f} events per item: dropout 0.2 from 100 on with 250,000 events in all, and in ranking; else 0.5.
NetworkArgs.hidden_dropout = {0.2 if is_ranking or store.num_events >= max(250_000, 100 * items) else 0.5}
NetworkArgs.dtype_str = 'float32'
{_gin(positions)}NetworkArgs.interleave_actions = {is_ranking}

# {samples:,} training samples: a batch of 16 to 128, for about 100 iterations per epoch.
TrainerArgs.train_batch_size = {batch}
TrainerArgs.eval_batch_size = 128
# About {steps:,} iterations, in {fewest} to {most} epochs, over which the learning rate falls to 0.
TrainerArgs.num_train_epochs = {epochs}
LRScheduleArgs.schedule = 'cosine'
LRScheduleArgs.warmup_ratio = 0.05
# {_EVALUATIONS} evaluations on validation. The best model counts; {_PATIENCE} without a better one end the run.
TrainerArgs.best_metric = {metric!r}
TrainerArgs.best_metric_mode = {mode!r}
TrainerArgs.early_stop_patience = {_PATIENCE}
TrainerArgs.log_interval = {max(interval // 2, 1)}
TrainerArgs.eval_interval = {interval}
TrainerArgs.ckpt_save_interval = {interval}
TrainerArgs.ckpt_keep_last = 1

{objective}
{paragraphs}# One table per feature, with rows to spare for the ids of later data.
{tables}"""


def _items(store: SequenceStore) -> int:
    return store.cardinality(store.item_feature)


def _are_short(store: SequenceStore) -> bool:
    return store.num_events < _SHORT * store.num_users


def _gin(settings: Mapping[str, object]) -> str:
    return "".join(f"{option} = {value!r}\n" for option, value in settings.items())


def _side(store: SequenceStore) -> Iterator[str]:
    events = [*store.event_features, *store.event_number_features]
    if names := [*store.item_side_features, *store.item_number_features, *events]:
        comment = "# Remove from known_after what is known before the event, such as a device or an hour.\n"
        after = [name for name in events if name not in store.running_statistics]
        known_after = {"DatasetArgs.known_after": after} if after else {}
        yield (comment if after else "") + _gin({"DatasetArgs.side_feature_names": names, **known_after})
    numbers = (*store.item_number_features, *store.event_number_features)
    for scope, is_vector in (("numbers", False), ("vectors", True)):  # which have other transforms
        if named := [name for name in numbers if (store.features[name].width > 1) == is_vector]:
            option = f"{scope}/NumericFeatureArgs"
            yield _gin({f"{option}.feature_names": named, f"{option}.transform": "standardize"})


def _tables(store: SequenceStore, width: int, context: Sequence[str]) -> Iterator[str]:
    used = {store.item_feature, store.action_feature, *context, *store.item_side_features, *store.event_features}
    scopes: set[str] = set()
    network = NetworkArgs(num_layers=1, hidden_size=width, num_attention_heads=1, kv_channels=1, dtype_str="float32")
    for table in predefined_embeddings(store, network):
        if table.table_name not in used:
            continue
        scope = re.sub(r"^(?=\d)|\W", "_", table.table_name, flags=re.ASCII)  # an identifier
        while scope in scopes:
            scope += "_"
        scopes.add(scope)
        rows = table.item_vocab_size_or_capacity
        if table.table_name != store.action_feature:  # new actions would also need new classes
            rows += max(int(_HEADROOM * rows), _LEAST_HEADROOM)
        option = f"{scope}/{type(table).__name__}"  # a DynamicEmbeddingArgs for raw ids
        yield _gin(
            {
                f"{option}.feature_names": table.feature_names,
                f"{option}.table_name": scope,
                f"{option}.item_vocab_size_or_capacity": rows,
                f"{option}.sharding_type": table.sharding_type,
            }
        )


def _retrieval(store: SequenceStore) -> tuple[int, str] | str:
    """Training samples and settings of retrieval, or the reason why the data does not allow it."""
    lengths, settings = np.diff(store.offsets()), dict[str, object]()
    if store.split is not None:
        samples = int((_training_lengths(store) >= 2).sum())
    else:
        valid_items = int((lengths >= 4).any())
        settings["DatasetArgs.valid_items"] = valid_items
        samples = int((lengths >= 3 + valid_items).sum())
    if not samples:
        needed = "3 events, two to learn from and one to predict" if store.split is None else "2 events marked train"
        return f"no user has {needed}"
    if np.maximum(lengths - _LONGEST, 0).sum() > 0.2 * store.num_events:
        settings["DatasetArgs.window_stride"] = "random"  # else these events would never be trained on
    settings |= {"RetrievalArgs.negatives": "full", "RetrievalArgs.mask_seen": True}
    if _items(store) > _FULL_SOFTMAX_ITEMS:
        settings |= {"RetrievalArgs.negatives": "uniform", "RetrievalArgs.num_negatives": 128}
    if store.item_side_features:
        settings["RetrievalArgs.item_tower"] = True
    if _are_short(store):
        settings |= {"RetrievalArgs.temperature": 0.07, "RetrievalArgs.later_target_weights": [0.5, 0.25]}
    else:
        settings["RetrievalArgs.temperature"] = 0.05
    settings["RetrievalArgs.eval_metrics"] = ("HR@10", "NDCG@10")
    return samples, (_CLOCKS if store.timestamp_feature else "") + _gin(settings)


def _ranking(store: SequenceStore) -> tuple[int, str] | str:
    """As _retrieval: one sigmoid per bit of the action, one sigmoid for 0 and 1, or one class per value."""
    action = store.action_feature
    if action is None:
        return "the data has no action; for your own table, name its column with --action"
    if store.num_users < 2 and store.split is None:
        return "it is trained on some users and evaluated on others, and the data has only one"
    least, most = store.least_value(action), max(int(values.max()) for values in store.columns(action))
    if least == most:
        return f"{action!r} is always {least}, so there is nothing to predict"
    name = resolve_name(store.name)
    bits = len(DATASETS[name].action_bits) if name else 0
    classes = store.cardinality(action) - (least > 0)  # without 0, class 0 is the action 1
    if classes > _MOST_CLASSES and not bits:
        return f"{action!r} goes up to {most:,}, too many classes for a head; group its values"
    is_binary = bits > 0 or store.cardinality(action) == 2
    head: dict[str, object] = {
        "RankingArgs.prediction_head_arch": [64, bits or (1 if is_binary else classes)],
        "RankingArgs.num_tasks": bits or 1,
        "RankingArgs.eval_metrics": ("AUC", "GAUC", "LOGLOSS") if is_binary else ("AUC", "ACC", "LOGLOSS"),
    }
    samples = round(0.7 * (store.num_requests or store.num_users))
    if store.split is not None:
        samples = int((_training_lengths(store) > 0).sum())
    elif store.num_users >= 10:  # a test beside the validation, which chooses
        head["DatasetArgs.valid_fraction"] = 0.1
    is_text = store.feature(action).has_vocab and store.raw_ids(action).dtype == object
    return samples, _gin(head) + ("" if is_binary or is_text else _FACTORS)


def _training_lengths(store: SequenceStore) -> np.ndarray:
    """Training events of each user, int64 [U]. The data must have a split."""
    return store.held_out("valid")[0] - store.offsets()[:-1]
