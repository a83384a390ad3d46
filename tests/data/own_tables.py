"""Stores of users' own tables."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore

COLUMNS = {field.name for field in fields(InteractionColumns)}


def own_store(
    folder: Path, interactions: Path | Sequence[Path], *, name: str = "mine", store: str = "store", **given: Any
) -> SequenceStore:
    """The store in ``folder / store``. ``given``: options of InteractionColumns and of import_interactions."""
    columns = {"user": "u", "item": "i"} | {option: given.pop(option) for option in COLUMNS & given.keys()}
    table = InteractionColumns(interactions=interactions, **columns)
    return SequenceStore.open(import_interactions(name, table, output=folder / store, **given))


def histories(store: SequenceStore) -> dict[object, list[object]]:
    """Raw user → raw items in the store's order."""
    items = store.raw_ids(store.item_feature)[store.sequence(store.item_feature)]
    bounds = store.offsets()
    users = store.raw_ids("user_id").tolist()
    return {user: items[bounds[row] : bounds[row + 1]].tolist() for row, user in enumerate(users)}
