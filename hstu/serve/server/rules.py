"""The rules of a shop: which items may be recommended, and how the best of them are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hstu.base.errors import DataError
from hstu.serve.runtime import Model, ServingError

from .watched import WatchedFile

if TYPE_CHECKING:
    from .model import RecommendRequest

_COLUMNS = ("item", "in_stock", "category")
_SHOWN = 5


@dataclass(frozen=True)
class Catalog:
    """What an item file says of the items of a model, in their order; the last entry is for unknown items."""

    in_stock: Tensor | None
    """bool [items + 1]. None: all are."""
    categories: Tensor | None
    """int64 [items + 1]: number of the category; -1 for none. None: the file has no categories."""
    numbers: Mapping[str, int]
    """Category → its number."""


class ItemFile(WatchedFile[pa.Table]):
    """A .csv or .parquet file with the column item and, if wanted, in_stock and category."""

    def read(self) -> pa.Table:
        """The known columns."""
        try:
            if self.path.suffix == ".csv":
                types = pa.csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.string()))
                table = pa.csv.read_csv(self.path, convert_options=types)
            else:
                table = pq.read_table(self.path)
            if "item" not in table.column_names:
                raise ValueError(f"it has no column 'item'; it has {', '.join(table.column_names)}")
            columns = {name: table[name] for name in _COLUMNS if name in table.column_names}
            if pc.count_distinct(columns["item"], mode="all").as_py() < len(table) or columns["item"].null_count:
                raise ValueError("an item is missing or has several rows; give one row per item")
            if "in_stock" in columns:
                columns["in_stock"] = columns["in_stock"].cast(pa.bool_())
                if columns["in_stock"].null_count:
                    raise ValueError("in_stock is missing in a row; give true or false")
            if "category" in columns:
                text = columns["category"].cast(pa.string())
                columns["category"] = pc.if_else(pc.equal(text, ""), None, text)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"--items {self.path} cannot be read: {error}") from error
        return pa.table(columns)

    def catalog(self, model: Model) -> Catalog:
        """The columns in the order of the items of a model. Items that the file lacks are not in stock."""
        items = model.encoder.items
        places = items.places(self.content["item"].to_pylist())
        in_stock = categories = None
        numbers: dict[str, int] = {}
        if "in_stock" in self.content.column_names:
            in_stock = torch.zeros(items.size + 1, dtype=torch.bool)
            in_stock[places] = torch.tensor(self.content["in_stock"].to_pylist(), dtype=torch.bool)
            in_stock[-1] = False  # where unknown items were written
        if "category" in self.content.column_names:
            encoded = self.content["category"].combine_chunks().dictionary_encode()
            numbers = {name: number for number, name in enumerate(encoded.dictionary.to_pylist())}
            categories = torch.full((items.size + 1,), -1)
            categories[places] = torch.tensor(encoded.indices.fill_null(-1).to_pylist(), dtype=torch.int64)
            categories[-1] = -1
        return Catalog(in_stock, categories, numbers)


def chosen_items(
    scores: Tensor, asked: RecommendRequest, catalog: Catalog, vectors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose up to ``asked.k`` of all items by the rules of a request. ``scores``: float32 [items + 1], -inf for items
    that may not be recommended. ``vectors``: unit vectors of the items, float32 [items + 1, E]; None: the request asks
    for no diversity.

    Returns the places of the items, best first, int64, and whether each was drawn at random. Raises ServingError.
    """
    categories, room = catalog.categories, _room(asked, catalog)
    if room is not None and categories is not None:
        scores = scores.masked_fill((categories >= 0) & (room[categories] == 0), -torch.inf)
    drawn = round(asked.exploration * asked.k)
    best = _best(scores, asked.k - drawn, categories, room, vectors, asked.diversity)
    if not drawn:
        return best, torch.zeros(len(best), dtype=torch.bool)
    generator = torch.Generator()
    generator.seed() if asked.seed is None else generator.manual_seed(asked.seed)
    luck = torch.rand(len(scores), generator=generator).masked_fill(scores == -torch.inf, -torch.inf)
    luck[best] = -torch.inf
    if room is not None and categories is not None:
        room = room - categories[best][categories[best] >= 0].bincount(minlength=len(room))
        luck = luck.masked_fill((categories >= 0) & (room[categories] == 0), -torch.inf)
    others = _best(luck, drawn, categories, room, None, 0.0)
    is_drawn = torch.zeros(len(best) + len(others), dtype=torch.bool)
    is_drawn[torch.randperm(len(is_drawn), generator=generator)[: len(others)]] = True
    places = torch.empty(len(is_drawn), dtype=torch.int64)
    places[is_drawn], places[~is_drawn] = others, best
    return places, is_drawn


def _room(asked: RecommendRequest, catalog: Catalog) -> Tensor | None:
    """Category → how many of its items may be recommended, int64. None: any number."""
    if asked.most_per_category is None and not asked.quotas:
        return None
    if catalog.categories is None:
        raise ServingError("the server knows no categories; start it with --items FILE, with a column category")
    if unknown := [name for name in asked.quotas if name not in catalog.numbers]:
        known = ", ".join([*catalog.numbers][:_SHOWN]) + ", …" * (len(catalog.numbers) > _SHOWN)
        raise ServingError(f"no item has the category {unknown[0]!r}; there are {len(catalog.numbers)}: {known}")
    most = asked.k if asked.most_per_category is None else asked.most_per_category
    room = torch.full((len(catalog.numbers) + 1,), most)
    for name, most in asked.quotas.items():
        room[catalog.numbers[name]] = most
    return room


def _best(
    scores: Tensor, k: int, categories: Tensor | None, room: Tensor | None, vectors: Tensor | None, diversity: float
) -> Tensor:
    """Places of the ``k`` best, int64: among all items, though only the best of them are compared.

    Each next item has the largest (1 - diversity) score - diversity max(cosine with an earlier one). No later item
    can have more than ``bounds``, so the result is exact once no item outside the compared ones has a larger bound.
    """
    if room is None and not diversity:
        best, places = scores.topk(min(k, len(scores)))
        return places[best > -torch.inf]
    bounds, allowed, size = scores, int((scores > -torch.inf).sum()), 8 * k + 64
    if vectors is not None and diversity and allowed:
        first = scores.argmax()
        bounds = (1 - diversity) * scores - diversity * (vectors @ vectors[first])
        bounds[first] = torch.inf
    while True:
        largest, pool = bounds.topk(min(size + 1, len(bounds)))
        inside, outside = pool[:size], float(largest[-1]) if size < allowed else -torch.inf
        own = None if categories is None or room is None else categories[inside]
        compared = None if vectors is None else vectors[inside]
        found, lowest = _greedy((1 - diversity) * scores[inside], k, own, room, compared, diversity)
        if size >= allowed or (len(found) == k and lowest >= outside):
            return inside[found]
        size *= 8


def _greedy(
    values: Tensor, k: int, categories: Tensor | None, room: Tensor | None, vectors: Tensor | None, diversity: float
) -> tuple[list[int], float]:
    """(indices of the chosen, the lowest value that one but the first had when it was chosen)."""
    found, lowest, left = list[int](), torch.inf, [] if room is None else room.tolist()
    closest = torch.zeros_like(values)
    while len(found) < k:
        now = values - diversity * closest
        place = int(now.argmax())
        if now[place] == -torch.inf:
            break
        lowest = min(lowest, float(now[place])) if found else lowest
        found.append(place)
        values[place] = -torch.inf
        if categories is not None and (category := int(categories[place])) >= 0:
            left[category] -= 1
            if not left[category]:
                values[categories == category] = -torch.inf
        if vectors is not None and diversity:
            cosines = vectors @ vectors[place]
            closest = cosines if len(found) == 1 else torch.maximum(closest, cosines)
    return found, lowest
