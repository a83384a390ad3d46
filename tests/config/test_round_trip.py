"""The configuration in force, written as gin, describes the same run again."""

import tempfile
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import DataError
from hstu.config import args as a
from hstu.config.gin_io import load, load_stored
from hstu.config.option import annotations_of, field_problems, is_required
from hstu.config.run_config import RunConfig
from tests.config.gin_files import BASES, write

TEXT = st.text(max_size=8)
SIMPLE = {
    bool: st.booleans(),
    str: TEXT,
    list[str]: st.lists(TEXT, max_size=40),
    list[int]: st.lists(st.integers(0, 99), max_size=4),
    list[float]: st.lists(st.floats(0.01, 1), max_size=4),
}


def numbers(kind: type, field: Any) -> st.SearchStrategy[Any]:
    """Numbers between the limits of a field, and up to 2^40 or 10^6 where it has no upper one."""
    limits = field.metadata
    lowest, highest = limits["minimum"] or limits["above"] or 0, limits["maximum"] or limits["below"]
    if kind is int:
        return st.integers(-1 if lowest == 0 else int(lowest), 2**40 if highest is None else int(highest))
    highest = 1e6 if highest is None else highest
    return st.floats(lowest, highest) | st.floats(lowest, min(1, highest))


def values_of(cls: type, field: Any) -> st.SearchStrategy[Any]:
    """Valid values of a field that does not hold other argument objects."""
    annotation = annotations_of(cls)[field.name]
    if field.metadata["choices"] is not None:
        choice = st.sampled_from(field.metadata["choices"])
        return st.lists(choice, max_size=3) if typing.get_origin(annotation) is list else choice
    if field.name == "eval_metrics":
        metrics = ["AUC", "GAUC", "AUC>=3"] if cls is a.RankingArgs else ["HR@5", "NDCG@100", "MRR"]
        return st.lists(st.sampled_from(metrics), min_size=1).map(tuple)
    if field.metadata["words"]:
        kind = int if int in typing.get_args(annotation) else float
        words = st.none() | st.sampled_from(field.metadata["words"]) | numbers(kind, field)
        return words.filter(lambda value: not field_problems(cls, field, value))
    optional = [inner for inner in typing.get_args(annotation) if inner in SIMPLE]
    optional = optional or [inner for inner in typing.get_args(annotation) if inner in (int, float)]
    simple = annotation if annotation in (*SIMPLE, int, float) else optional[0]
    values = numbers(simple, field) if simple in (int, float) else SIMPLE[simple]
    values = values if annotation is simple else values | st.none()
    return values.filter(lambda value: not field_problems(cls, field, value))


def instances(cls: type, **given_fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Valid objects of a class; fields with defaults are sometimes left out."""
    strategies = {f.name: given_fields[f.name] if f.name in given_fields else values_of(cls, f) for f in fields(cls)}
    needed = {f.name for f in fields(cls) if is_required(f)} | set(given_fields) | {"sharding_type"} & set(strategies)
    return st.fixed_dictionaries(
        {name: strategies[name] for name in needed},
        optional={name: strategy for name, strategy in strategies.items() if name not in needed},
    ).map(lambda values: cls(**values))


TABLES = st.lists(instances(a.EmbeddingArgs) | instances(a.DynamicEmbeddingArgs), max_size=4)
DISTRIBUTION = instances(a.RandomDistribution)
FEATURES = instances(
    a.FeatureArgs,
    seqlen_dist=st.none() | DISTRIBUTION,
    value_dists=st.none() | st.lists(DISTRIBUTION, max_size=3) | st.dictionaries(TEXT, DISTRIBUTION, max_size=3),
)
BENCHMARKS = instances(
    a.BenchmarkDatasetArgs, feature_args=st.lists(FEATURES, min_size=1, max_size=3), embedding_args=TABLES.filter(len)
)


OPTIMIZERS = instances(
    a.OptimizerArgs, part_optimizers=st.lists(instances(a.PartOptimizerArgs, regex=TEXT.filter(len)), max_size=3)
)
METRICS = ["AUC", "AUC>=3", "RMSE", "NDCG@5"]
RANKING = instances(
    a.RankingArgs,
    tasks=st.none()
    | st.lists(
        instances(
            a.RankingTaskArgs,
            name=st.none() | st.sampled_from(["click", "stars"]),
            loss=st.none() | st.sampled_from(["bce", "mse"]),
            metrics=st.none() | st.lists(st.sampled_from(METRICS), min_size=1, max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=3,
    ),
)


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    task: a.Task = draw(st.sampled_from(get_args(a.Task)))
    dataset = draw(instances(a.DatasetArgs) | BENCHMARKS)
    return RunConfig(
        task=task,
        trainer=draw(instances(a.TrainerArgs)),
        dataset=dataset,
        embeddings=() if isinstance(dataset, a.BenchmarkDatasetArgs) else tuple(draw(TABLES)),
        network=draw(instances(a.NetworkArgs)),
        optimizer=draw(OPTIMIZERS),
        schedule=draw(instances(a.LRScheduleArgs)),
        table_schedule=draw(st.none() | instances(a.LRScheduleArgs)),
        precision=draw(instances(a.PrecisionArgs)),
        tensor_parallel=draw(instances(a.TensorModelParallelArgs)),
        data_parallel=draw(instances(a.DataParallelArgs)),
        context_parallel=draw(instances(a.ContextParallelArgs)),
        task_args=draw(RANKING if task == "ranking" else instances(a.RetrievalArgs)),
    )


@settings(max_examples=30, deadline=None)
@given(run_configs())
def test_operative_gin_loads_to_an_equal_config(config: RunConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = load([write(Path(folder), config.operative_gin())], [], config.task)
    assert again == config
    assert again.operative_gin() == config.operative_gin()


@pytest.mark.parametrize("line", ["RetrievalArgs.request_time = 'last_event'", "DatasetArgs.dynamic_tables = False"])
def test_a_stored_configuration_may_have_what_was_removed(tmp_path: Path, line: str) -> None:
    text = load([write(tmp_path, BASES["retrieval"])], [], "retrieval").operative_gin()
    (tmp_path / "operative.gin").write_text(f"{text}\n{line}\n")
    assert load_stored(tmp_path / "operative.gin").operative_gin() == text


@pytest.mark.parametrize("line", ["DatasetArgs.dynamic_tables = True", "like/RankingTaskArgs.bit_mask = 4"])
def test_a_removed_option_that_decided_labels_or_tables_is_not_ignored(tmp_path: Path, line: str) -> None:
    text = load([write(tmp_path, BASES["ranking"])], [], "ranking").operative_gin()
    (tmp_path / "operative.gin").write_text(f"{text}\n{line}\n")
    with pytest.raises(DataError, match="was removed; bind"):
        load_stored(tmp_path / "operative.gin")
