"""The options that RecBole's atomic files imply: ``NAME.inter``, and ``NAME.user`` and ``NAME.item`` beside it.

Format: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hstu.base.errors import DataError
from hstu.data.datasets.raw import probable_delimiter, typed_header


def options_of(inter: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of InteractionColumns for ``inter`` and the files beside it. ``given``: options, which win. Raises
    DataError if its header has no types, or lacks the columns of users and items."""
    types = typed_header(inter, probable_delimiter(inter))
    found: dict[str, Any] = {"user": "user_id", "item": "item_id", **given}
    if not all(types.values()):
        raise DataError(
            f"{inter}:1: the first line must give the types of the columns, divided by tabs, as item_id:token; without "
            "types, name the columns: --user, --item and others"
        )
    for role in ("user", "item"):
        if found[role] not in types or f"{found[role]}_list" in types:
            raise DataError(
                f"{inter}:1: a row must be one event, with the {role} in {found[role]!r}, and the columns are "
                f"{', '.join(types)}; give a file of single events, and the name of the column as --{role}"
            )
    found.setdefault("action", next((name for name in ("rating", "label") if name in types), None))
    found.setdefault("time", "timestamp" if "timestamp" in types else None)
    used = [found["user"], found["item"], found["action"], found["time"], *given.get("event_columns", ())]
    left_out = [name for name in types if name not in used]
    users, items = (inter.with_name(inter.name.replace(".inter", suffix)) for suffix in (".user", ".item"))
    if users.is_file() and "context" not in given:
        left_out += _add_users(users, found)
    if items.is_file() and "items" not in given:
        left_out += _add_items(items, found, {*used, *found.get("context_columns", ())})
    if left_out:
        logging.getLogger(__name__).info("%s: not read are %s", inter, ", ".join(left_out))
    return found


def _add_users(users: Path, found: dict[str, Any]) -> list[str]:
    """Adds the options of the file of users to ``found``, whose own win. Returns the columns that are not read."""
    types = typed_header(users, probable_delimiter(users))
    columns = found.get("context_columns") or tuple(name for name in types if "seq" not in types[name])
    bins = {name: 10 for name in columns if types.get(name) == "float"}
    found.update({"context": users, "context_columns": columns, "bins": bins, **found})
    return [name for name in types if name not in columns]


def _add_items(items: Path, found: dict[str, Any], used: Collection[str]) -> list[str]:
    """As _add_users, of the file of items. ``used``: columns of the other files, which are read there."""
    types = typed_header(items, probable_delimiter(items))
    title = next((name for name in types if name in ("title", "name") or name.endswith("_title")), None)
    features = found.get("item_columns") or tuple(name for name in types if name not in (*used, title))
    numbers, words, vectors = (
        tuple(name for name in features if types.get(name) == kind) for kind in ("float", "token_seq", "float_seq")
    )
    tables = {"items": items, "item_columns": features} if features else {}
    tables |= {"titles": items, "title": title} if title else {}
    lists = dict.fromkeys((*words, *vectors), " ")
    found.update(tables | {"numbers": numbers, "vectors": vectors, "lists": lists} | found)
    return [name for name in types if name in used and name != found["item"]]
