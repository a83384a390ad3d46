"""The structure of JSON files: accepted, or refused with the place that differs."""

from typing import Any

import pytest

from hstu.base.json_shape import check_shape

SHAPE = {"n": int, "tables?": {str: {"names": [str]}}, "rate?": float}


@pytest.mark.parametrize(
    "value", [{"n": 0}, {"n": 3, "tables": {}}, {"n": 1, "tables": {"a": {"names": ["x"]}}, "rate": 0.5, "more": None}]
)
def test_what_fits_is_accepted(value: Any) -> None:
    check_shape(value, SHAPE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is \\[\\]"),
        ({}, "it has no 'n'"),
        ({"n": True}, "it.n is True"),
        ({"n": 10**400}, "it.n is 10000"),
        ({"n": 1, "tables": {"a": {}}}, "it.tables.a has no 'names'"),
        ({"n": 1, "tables": {"a": {"names": ["x", 7]}}}, r"it.tables.a.names\[1\] is 7"),
        ({"n": 1, "tables": None}, "it.tables is None"),
        ({"n": 1, "rate": float("nan")}, "it.rate is nan"),
    ],
)
def test_the_first_place_that_differs_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check_shape(value, SHAPE)
    assert len(str(caught.value)) < 200
