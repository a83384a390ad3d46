"""Checks that the content of a JSON file has the structure that its reader expects."""

from types import UnionType
from typing import Any, get_args


def check_shape(value: Any, shape: Any, where: str = "it") -> None:
    """Raise ValueError that names the first place where a JSON value has another shape.

    shape: int (of [0, 2^63)), float (a finite number), str (not empty, without null characters) or a union of types;
    [shape of each element]; or a dict with the shape of each named entry, or of every entry under the key ``str``. An
    entry whose name ends with "?" may be missing or empty; others are ignored.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        for name, part in shape.items():
            for key in value if name is str else [name.rstrip("?")]:
                if name is str or name == key or value.get(key, {}) != {}:
                    if key not in value:
                        raise ValueError(f"{where} has no {key!r}")
                    check_shape(value[key], part, f"{where}.{key}")
    elif isinstance(shape, list) and isinstance(value, list):
        for place, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{place}]")
    elif isinstance(shape, (dict, list)) or not _fits(value, shape):
        raise ValueError(f"{where} is {value!r:.60}")


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, UnionType):
        return any(_fits(value, each) for each in get_args(shape))
    if shape is str:
        return isinstance(value, str) and value != "" and "\0" not in value
    if shape is int:
        return type(value) is int and 0 <= value < 2**63
    return type(value) in (int, float) and -1e300 < value < 1e300 if shape is float else isinstance(value, shape)
