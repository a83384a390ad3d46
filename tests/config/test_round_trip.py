"""The configuration in force, written as gin, describes the same run again.

Whatever a file holds, the user gets a configuration or a ConfigError, never a traceback.
"""

import contextlib
import tempfile
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import ConfigError, DataError
from hstu.config import args as a
from hstu.config.args import REGISTRY
from hstu.config.gin_io import load, load_stored, read_and_check
from hstu.config.option import annotations_of, field_problems, is_required
from hstu.config.run_config import RunConfig
from tests.config.gin_files import ALL_RULES, BASES, changed, task_of, write

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
    with pytest.raises(DataError, match="decided the labels or the tables"):
        load_stored(tmp_path / "operative.gin")


CLASSES = [cls.__name__ for cls in REGISTRY]
NAMES = sorted({f.name for cls in REGISTRY for f in fields(cls)})
SCOPES = ["", "item/", "seq/", "a/b/", "x/"]
LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["item", "action", "user", "adam", "AUC", 0, 1, 2, 5]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
).map(repr)
REFERENCES = st.builds("@{}{}{}".format, st.sampled_from(SCOPES), st.sampled_from(CLASSES), st.sampled_from(["()", ""]))
MACROS = st.sampled_from(["%m", "%n", "%gin.REQUIRED", "%a/m"])
VALUES = LITERALS | REFERENCES | MACROS | st.lists(REFERENCES, max_size=3).map(lambda refs: f"[{', '.join(refs)}]")


@st.composite
def bindings(draw: st.DrawFn) -> str:
    """A line that is nearly right: real classes with their own or any parameters, values of any kind."""
    cls = draw(st.sampled_from(list(REGISTRY)))
    name = draw(st.sampled_from([f.name for f in fields(cls)]) | st.sampled_from(NAMES))
    return f"{draw(st.sampled_from(SCOPES))}{cls.__name__}.{name} = {draw(VALUES)}"


LINES = bindings() | st.builds("{} = {}".format, st.sampled_from(["m", "n", "a/m"]), VALUES) | st.text(max_size=20)


def read_anything(text: str | bytes, base: str, extra: tuple[str, ...] = ()) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        config, _ = read_and_check([write(Path(folder), text)], extra, task_of(base), world_size=2, rules=ALL_RULES)  # type: ignore[arg-type]
        assert config.operative_gin()


@settings(max_examples=75, deadline=None)
@given(st.sampled_from(sorted(BASES)), st.lists(LINES, max_size=6))
def test_random_lines_in_a_good_file(base: str, lines: list[str]) -> None:
    good = changed(BASES[base], *(line for line in lines if not line.startswith("-")))
    read_anything(good.encode("utf-8", "surrogatepass"), base)


@settings(max_examples=40, deadline=None)
@given(st.lists(LINES, max_size=4))
def test_random_command_line(lines: list[str]) -> None:
    read_anything(BASES["own"], "own", tuple(lines))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_random_bytes(content: bytes) -> None:
    read_anything(content, "ranking")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(BASES)), st.data())
def test_a_good_file_cut_anywhere(base: str, data: st.DataObject) -> None:
    text = BASES[base]
    start = data.draw(st.integers(0, len(text)))
    read_anything(text[:start] + text[start + data.draw(st.integers(0, 30)) :], base)


def test_very_deep_and_very_long_values() -> None:
    read_anything(BASES["ranking"] + f"NetworkArgs.scaling_seqlen = {'[' * 5000}{']' * 5000}\n", "ranking")
    read_anything(BASES["ranking"] + f"NetworkArgs.scaling_seqlen = {'9' * 10_000}\n", "ranking")
    read_anything(BASES["ranking"] + f"NetworkArgs.scaling_seqlen = 0x{'f' * 10_000}\n", "ranking")
