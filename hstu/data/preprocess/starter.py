"""Writes starter gin files with sizes for two CPU cores. Never replaces a file, because users may have edited it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hstu.base.files import replace_text
from hstu.config.args import NetworkArgs, Task
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.features.roles import predefined_embeddings
from hstu.data.store.layout import META_FILE
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore

_HEADROOM, _LEAST_HEADROOM = 0.1, 8
"""Spare rows of a table: fraction of its ids, and the minimum."""
_LONGEST = 200
"""Largest max_sequence_length of a starter file."""
_MOST_CANDIDATES = 100
"""Most candidates per sample; larger requests are divided."""
_COVERED = 0.95
"""Share of users whose whole histories fit, unless _LONGEST cuts them."""
_FULL_SOFTMAX_ITEMS = 20_000
"""With more items, retrieval draws negatives."""
_MOST_CLASSES = 1000
_STEPS, _MOST_EPOCHS = 500, 50
"""A run has about _STEPS iterations, but at least one epoch and at most _MOST_EPOCHS."""
_NETWORK = NetworkArgs(num_layers=2, hidden_size=64, num_attention_heads=2, kv_channels=32, dtype_str="float32")
_CLOCKS = """\
# HR@10 is told the time of the item to find, and HR@10/last_event is not; DatasetArgs.query_time trains for both.
"""
_TEMPLATE = """\
# {title} on {store.name} ({counts}): a start, with sizes for two CPU cores.

DatasetArgs.dataset_name = {store.name!r}
DatasetArgs.dataset_path = {path!r}
DatasetArgs.max_sequence_length = {length}
DatasetArgs.contextual_feature_names = {context!r}
DatasetArgs.shuffle = True

NetworkArgs.num_layers = {network.num_layers}
NetworkArgs.hidden_size = {network.hidden_size}
NetworkArgs.num_attention_heads = {network.num_attention_heads}
NetworkArgs.kv_channels = {network.kv_channels}
NetworkArgs.dtype_str = {network.dtype_str!r}
NetworkArgs.position_encoding = {position_encoding!r}
NetworkArgs.interleave_actions = {is_ranking}
OptimizerArgs.optimizer_str = 'adam'
OptimizerArgs.learning_rate = 0.001

{candidates}TrainerArgs.train_batch_size = {batch}
TrainerArgs.eval_batch_size = 128
TrainerArgs.num_train_epochs = {epochs}
TrainerArgs.log_interval = {log_interval}
TrainerArgs.eval_interval = {quarter}
TrainerArgs.ckpt_save_interval = {quarter}
TrainerArgs.best_metric = {best[0]!r}
TrainerArgs.best_metric_mode = {best[1]!r}

{objective}
{features}# One table per feature, with rows to spare for the ids of later data.
{tables}"""


def write_starters(store: SequenceStore, path: Path) -> Iterator[str]:
    """Write ``<path>_retrieval.gin`` and ``<path>_ranking.gin``, or ``<file>.new`` beside an older file that differs.
    Yields per task how to train, or why not. ``path``: the store, absolute or relative to where training will start."""
    objectives: Mapping[Task, tuple[int, str] | str] = {"retrieval": _retrieval(store), "ranking": _ranking(store)}
    for task, objective in objectives.items():
        if isinstance(objective, str):
            yield f"no starter file for {task}: {objective}"
            continue
        file = path.with_name(f"{path.name}_{task}.gin")
        text = _starter(store, path, task, *objective)
        yield f"train {task}: python pretrain_gr_{task}.py --gin-config-file {file}{_write(file, text, store)}"


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


def _starter(store: SequenceStore, path: Path, task: Task, samples: int, objective: str) -> str:
    """A gin file for about ``samples`` training samples. ``objective``: lines of settings of the task."""
    is_ranking = task == "ranking"
    context = [name for name in store.contextual_features if not (is_ranking and name == USER_FEATURE)]
    covering, candidates = int(np.quantile(np.diff(store.offsets()), _COVERED, method="higher")), ""
    if store.num_requests:
        most = min(int(store.requests().sizes.max()), _MOST_CANDIDATES)
        covering += most
        options = {"DatasetArgs.candidates": "requests", "DatasetArgs.max_num_candidates": most}
        candidates = _gin(options) + "\n" if is_ranking else ""
    batch = 32 if samples < 2000 else 64
    steps_per_epoch = -(-samples // batch)
    epochs = min(max(_STEPS // steps_per_epoch, 1), _MOST_EPOCHS)
    quarter = -(-epochs * steps_per_epoch // 4)
    items = store.cardinality(store.item_feature)
    return _TEMPLATE.format(
        title=task.capitalize(),
        store=store,
        counts=f"{store.num_users:,} users, {items:,} items, {store.num_events:,} events",
        path=str(path),
        length=max(min(covering, _LONGEST), 2),
        context=context,
        network=_NETWORK,
        position_encoding="relative_bias" if store.timestamp_feature else "absolute",
        is_ranking=is_ranking,
        candidates=candidates,
        batch=batch,
        epochs=epochs,
        log_interval=max(quarter // 3, 1),
        quarter=quarter,
        best=("LOGLOSS", "min") if is_ranking else ("NDCG@10", "max"),
        objective=objective,
        features="".join(f"{paragraph}\n" for paragraph in _side(store)),
        tables="\n".join(_tables(store, context)),
    )


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


def _tables(store: SequenceStore, context: Sequence[str]) -> Iterator[str]:
    used = {store.item_feature, store.action_feature, *context, *store.item_side_features, *store.event_features}
    scopes: set[str] = set()
    for table in predefined_embeddings(store, _NETWORK):
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
    lengths, held_out = np.diff(store.offsets()), {}
    if store.split is not None:
        samples = int((_training_lengths(store) >= 2).sum())
    else:
        valid_items = int((lengths >= 4).any())
        held_out = {"DatasetArgs.valid_items": valid_items}
        samples = int((lengths >= 3 + valid_items).sum())
    if not samples:
        needed = "3 events, two to learn from and one to predict" if store.split is None else "2 events marked train"
        return f"no user has {needed}"
    negatives: Mapping[str, object] = {"RetrievalArgs.negatives": "full"}
    if store.cardinality(store.item_feature) > _FULL_SOFTMAX_ITEMS:
        negatives = {"RetrievalArgs.negatives": "uniform", "RetrievalArgs.num_negatives": 128}
    settings = _gin({**held_out, **negatives, "RetrievalArgs.eval_metrics": ("HR@10", "NDCG@10")})
    return samples, (_CLOCKS if store.timestamp_feature else "") + settings


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
    head = {
        "RankingArgs.prediction_head_arch": [_NETWORK.hidden_size, bits or (1 if is_binary else classes)],
        "RankingArgs.num_tasks": bits or 1,
        "RankingArgs.eval_metrics": ("AUC", "GAUC", "LOGLOSS") if is_binary else ("AUC", "ACC", "LOGLOSS"),
    }
    samples = round(0.7 * (store.num_requests or store.num_users))
    if store.split is not None:
        samples = int((_training_lengths(store) > 0).sum())
    return samples, _gin(head)


def _training_lengths(store: SequenceStore) -> np.ndarray:
    """Training events of each user, int64 [U]. The data must have a split."""
    return store.held_out("valid")[0] - store.offsets()[:-1]
