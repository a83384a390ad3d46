"""The check of a single value against what its field declares."""

from dataclasses import fields
from typing import Any, Optional

import pytest

from hstu.config.args import REGISTRY, EmbeddingArgs, RankingArgs
from hstu.config.option import Mismatch, coerce, default_of, describe, field_problems, is_required


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
    assert described["prediction_head_arch"] == "list of int, each at least 1, not empty"
    assert described["prediction_head_act_type"] == "one of 'relu', 'gelu'"
    assert described["eval_metrics"] == "one or more of AUC, AUC>=K, GAUC, ACC, LOGLOSS, NE"
