"""Slots looked up in two tables give the rows that they have in one."""

from __future__ import annotations

import pytest
import torch
from torchrec import KeyedJaggedTensor

from hstu.parallel.dynamic.split import Parting

FEATURES = ["user", "item", "negatives"]
FIRST = {"item": 3, "negatives": 3}
"""Slots in the first part of the item table; that of users is whole."""
LOOKED_UP = ["item", "negatives", "user", "item/host", "negatives/host"]


def features(most: int) -> KeyedJaggedTensor:
    """Three bags a feature, of slots below ``most``."""
    lengths = torch.tensor([2, 0, 3, 1, 1, 0, 0, 4, 2], dtype=torch.int32)
    slots = torch.randint(most, (13,), generator=torch.Generator().manual_seed(most))
    return KeyedJaggedTensor(keys=FEATURES, values=slots, lengths=lengths, stride=3)


@pytest.mark.parametrize("most", [8, 3, 1], ids=["both parts", "first part", "one row"])
def test_each_slot_finds_its_row_and_bags_stay_together(most: int) -> None:
    whole, tables = features(most), {"user": torch.arange(8.0), "item": 10 + torch.arange(8.0)}
    lookup, places = Parting(FEATURES, LOOKED_UP, FIRST, torch.device("cpu"))(whole)
    assert lookup.keys() == LOOKED_UP
    parts = {"item": tables["item"][:3], "item/host": tables["item"][3:], "user": tables["user"]}
    parts |= {"negatives": parts["item"], "negatives/host": parts["item/host"]}
    found = torch.cat([parts[key][lookup[key].values()] for key in LOOKED_UP])[places]
    expected = [
        tables[key][whole[feature].values()] for feature, key in zip(FEATURES, ("user", "item", "item"), strict=True)
    ]
    assert torch.equal(found, torch.cat(expected))
    for key in ("item", "negatives"):
        assert torch.equal(lookup[key].lengths() + lookup[f"{key}/host"].lengths(), whole[key].lengths())
        in_host = [int((bag >= 3).sum()) for bag in whole[key].to_dense()]
        assert lookup[f"{key}/host"].lengths().tolist() == in_host
    assert torch.equal(lookup["user"].lengths(), whole["user"].lengths())
