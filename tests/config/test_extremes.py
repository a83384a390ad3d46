"""Extreme values of every field of every class: a message that names the place, or a configuration that is kept.

The values follow from the type that a field declares, so a field added later is covered.
"""

import math
from collections.abc import Iterator
from dataclasses import Field
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import CLASSES, REGISTRY
from hstu.config.gin_io import read_and_check
from hstu.config.option import Args, annotation_of, field_problems, options_of
from hstu.config.run_config import RunConfig
from tests.config.gin_files import (
    ALL_RULES,
    BENCHMARK,
    OWN_DATA,
    RETRIEVAL,
    USER_TASKS,
    changed,
    table,
    task_of,
    text,
    write,
)

ANYTHING = (None, True, 0, -1, "", [], (), {}, [None], [[]], "item")
INTEGERS = (1, 2**31, 2**63 - 1, 2**63, -(2**63), 1e12, 10**400)
NUMBERS = (0.5, -0.0, 5e-324, 3.5e38, 1e308, math.inf, -math.inf, math.nan)
TEXTS = (" ", "a.b", "../x", "\x00", "\n", "☃", "\ud800", "%s {x}", "x" * 50_000)
EXTREMES = {bool: (), int: INTEGERS, float: (*INTEGERS, *NUMBERS), str: TEXTS}
MANY = 300
LONGEST_LINE = 3000

DYNAMIC = RETRIEVAL.replace("ml-1m", "own") + text(table("item", 100, "DynamicEmbeddingArgs"))
RANDOM = changed(
    BENCHMARK,
    "seq/FeatureArgs.seqlen_dist = @any/RandomDistribution()",
    'any/RandomDistribution.dist_type = "normal"',
    "OptimizerArgs.part_optimizers = [@any/PartOptimizerArgs()]",
    'any/PartOptimizerArgs.regex = "head"',
    "any/PartOptimizerArgs.learning_rate = 0.1",
)
FILES = {
    "DatasetArgs": ("own", OWN_DATA, ""),
    "DynamicEmbeddingArgs": ("retrieval", DYNAMIC, "item/"),
    "RetrievalArgs": ("retrieval", RETRIEVAL, ""),
    "EmbeddingArgs": ("benchmark", RANDOM, "item/"),
    "FeatureArgs": ("benchmark", RANDOM, "seq/"),
    "RandomDistribution": ("benchmark", RANDOM, "any/"),
    "PartOptimizerArgs": ("benchmark", RANDOM, "any/"),
    "RankingTaskArgs": ("tasks", USER_TASKS, "stars/"),
}
"""Class → the base, its text and the scope of the class in it; the other classes are in ``RANDOM`` without a scope."""

UNLIMITED = {
    "TrainerArgs": "eval_interval log_interval max_train_iters num_train_epochs max_eval_iters profile_step_start "
    "profile_step_end ckpt_save_interval ckpt_keep_last tokens_per_rank early_stop_patience max_grad_norm "
    "gc_interval",
    "EmbeddingArgs": "item_vocab_size_or_capacity",  # the memory of the machine is the limit
    "DynamicEmbeddingArgs": "item_vocab_size_or_capacity global_hbm_for_values item_vocab_gpu_capacity "
    "admission_threshold",
    "DatasetArgs": "max_sequence_length max_num_candidates window_stride",
    "BenchmarkDatasetArgs": "max_num_candidates",
    "RandomDistribution": "low high mean std alpha",
    "NetworkArgs": "norm_epsilon target_group_size scaling_seqlen",
    "OptimizerArgs": "adam_eps weight_decay sparse_max_gradient",
    "PartOptimizerArgs": "weight_decay",
    "LRScheduleArgs": "warmup_iters decay_iters milestones",
    "PrecisionArgs": "growth_interval",
    "TensorModelParallelArgs": "tensor_model_parallel_size",
    "DataParallelArgs": "shard_group_size",
    "ContextParallelArgs": "context_parallel_size",
    "RankingArgs": "num_tasks",
}
"""Numbers without an upper limit: runs with 2^63 - 1 or 1e308 there train, or end with a message."""


def kinds_of(cls: type[Args], field: Field[Any]) -> set[type]:
    """The plain types of the field and of its elements."""
    found, left = set(), [annotation_of(cls, field)]
    while left:
        kind = left.pop()
        found |= {kind} & EXTREMES.keys()
        left += getattr(kind, "__args__", ())
    return found


def extremes_of(cls: type[Args], field: Field[Any]) -> Iterator[Any]:
    """Values alone and in lists."""
    values = [value for kind, some in EXTREMES.items() if kind in kinds_of(cls, field) for value in some]
    bounds = [field.metadata[name] for name in ("minimum", "maximum", "above", "below")]
    values += [bound for bound in bounds if bound is not None]
    yield from (*ANYTHING, *values)
    if "[" in str(field.type):
        yield from ([value] for value in values)
        yield from (["item"] * MANY, [f"f{number}" for number in range(MANY)], [5] * MANY)


def as_gin(value: Any) -> str:
    """Infinities as a file can hold them."""
    return repr(value).replace("inf", "1e999")


def check_file(base: str, gin: str, folder: Path) -> RunConfig | None:
    """The configuration of a file; None if it is refused, of which each problem must have its place."""
    path = write(folder, gin.encode("utf-8", "surrogatepass"))
    try:
        return read_and_check([path], (), task_of(base), 1, ALL_RULES)[0]  # type: ignore[arg-type]
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            line, _, said = problem.removeprefix(f"{path}:").partition(": ")
            assert problem.startswith(f"{path}:") and line.isdecimal(), problem
            assert 0 < len(said) < LONGEST_LINE, problem
    return None


@pytest.mark.parametrize("cls", REGISTRY, ids=lambda cls: cls.__name__)
def test_every_field_takes_an_extreme_value_or_says_what_is_allowed(cls: type[Args], tmp_path: Path) -> None:
    base, gin, scope = FILES.get(cls.__name__, ("benchmark", RANDOM, ""))
    assert check_file(base, gin, tmp_path) is not None
    for field in options_of(cls):
        refused, allowed = [], []
        for value in extremes_of(cls, field):
            problems = field_problems(cls, field, value)
            assert all("expected" in problem for problem in problems), problems
            (refused if problems else allowed).append(value)
        # What a field refuses by itself reads alike; what it allows may be refused by a rule.
        writable = [value for value in refused if value == value and value != 10**400]
        configs = [
            check_file(base, changed(gin, f"{scope}{cls.__name__}.{field.name} = {as_gin(value)}"), tmp_path)
            for value in (*writable[-1:], *allowed)
        ]
        assert configs[0] is None
        kept = [config for config in configs if config is not None]
        if kept:
            stored = kept[-1].operative_gin()
            assert check_file(base, stored, tmp_path) == kept[-1]


def test_every_number_has_a_largest_value_or_was_tried_without_one() -> None:
    unlimited = {
        name: " ".join(
            field.name
            for field in options_of(cls)
            if kinds_of(cls, field) & {int, float}
            and all(field.metadata[limit] is None for limit in ("maximum", "below", "choices"))
        )
        for name, cls in CLASSES.items()
    }
    assert {name: fields for name, fields in unlimited.items() if fields} == UNLIMITED
