"""The check of a single value against what its field declares."""

from dataclasses import fields
from typing import Any, Optional

import pytest

from hstu.config.args import REGISTRY, EmbeddingArgs, NetworkArgs, OptimizerArgs, RankingArgs, TrainerArgs
from hstu.config.option import (
    Args,
    Mismatch,
    coerce,
    default_of,
    describe,
    field_problems,
    is_required,
    options_of,
)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (float, 1, 1.0),
        (float, 2**53, float(2**53)),
        (Optional[float], None, None),
        (Optional[int], 3, 3),
        (list[int], (1, 2), [1, 2]),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[str, ...], "a", ("a",)),
        (list[float], [1, 0.5], [1.0, 0.5]),
    ],
)
def test_conversion_that_loses_nothing(annotation: Any, value: Any, expected: Any) -> None:
    result = coerce(annotation, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 1.0),
        (int, True),
        (int, "1"),
        (int, None),
        (int, 2**63),
        (float, True),
        (float, "1"),
        (float, 2**53 + 1),
        (float, 10**400),
        (float, float("nan")),
        (float, float("inf")),
        (bool, 0),
        (bool, "True"),
        (str, 1),
        (list[str], "a"),
        (list[int], [1, None]),
        (tuple[str, ...], [1]),
        (EmbeddingArgs, {"table_name": "x"}),
    ],
)
def test_conversion_that_would_lose_something_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(Mismatch):
        coerce(annotation, value)


@pytest.mark.parametrize("cls", REGISTRY, ids=lambda cls: cls.__name__)
def test_every_default_but_the_sharding_type_is_valid(cls: type) -> None:
    wrong = [f.name for f in fields(cls) if not is_required(f) and field_problems(cls, f, default_of(f))]
    assert wrong == (["sharding_type"] if cls is EmbeddingArgs else [])


def test_descriptions_are_words() -> None:
    described = {field.name: describe(RankingArgs, field) for field in fields(RankingArgs)}
    assert described["prediction_head_arch"] == "list of int, each at least 1, at most 1000000, not empty"
    assert described["prediction_head_act_type"] == "one of 'relu', 'gelu'"
    assert described["eval_metrics"] == "one or more of AUC, AUC>=K, GAUC, ACC, LOGLOSS, NE"


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (NetworkArgs, "hidden_size", 2**31),
        (NetworkArgs, "attention_scale", 1e308),
        (TrainerArgs, "train_batch_size", 10**18),
        (TrainerArgs, "gradient_accumulation_steps", 2**31),
        (TrainerArgs, "collective_timeout_s", 1e308),
        (OptimizerArgs, "learning_rate", 1e308),
    ],
)
def test_numbers_beyond_any_machine_are_refused(cls: type[Args], name: str, value: float) -> None:
    field = next(field for field in options_of(cls) if field.name == name)
    (problem,) = field_problems(cls, field, value)
    assert "at most" in problem
