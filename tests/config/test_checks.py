"""What a single value must satisfy, and the spellings of the built-in datasets."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Optional

import pytest

from hstu.config.args import ARGS_CLASSES, EmbeddingArgs, RankingArgs
from hstu.config.checks import Mismatch, coerce, default_of, describe, field_problems, is_required
from hstu.config.dataset_names import BUILT_IN_DATASETS, resolve_dataset_name


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


@pytest.mark.parametrize("cls", ARGS_CLASSES, ids=lambda cls: cls.__name__)
def test_every_default_but_the_sharding_type_is_valid(cls: type) -> None:
    wrong = [f.name for f in fields(cls) if not is_required(f) and field_problems(cls, f, default_of(f))]
    assert wrong == (["sharding_type"] if cls is EmbeddingArgs else [])


def test_descriptions_are_words() -> None:
    described = {field.name: describe(RankingArgs, field) for field in fields(RankingArgs)}
    assert described["prediction_head_arch"] == "list of int, each at least 1, not empty"
    assert described["prediction_head_act_type"] == "one of 'relu', 'gelu'"
    assert described["eval_metrics"] == "one or more of AUC, AUC>=K, GAUC, ACC, LOGLOSS, NE"


@pytest.mark.parametrize("name", BUILT_IN_DATASETS)
def test_a_canonical_name_is_its_own(name: str) -> None:
    assert resolve_dataset_name(name) == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("movielens-1m", "ml-1m"),
        ("MovieLens_20M", "ml-20m"),
        ("ML100K", "ml-100k"),
        ("KuaiRand-1K", "kuairand-1k"),
        ("kuairand_27k", "kuairand-27k"),
        ("KuaiRand-Pure", "kuairand-pure"),
        ("criteo", None),
        ("ml", None),
        ("", None),
    ],
)
def test_other_spellings(written: str, name: str | None) -> None:
    assert resolve_dataset_name(written) == name
