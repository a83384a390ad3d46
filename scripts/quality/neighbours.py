"""Predictions of ratings from the user's earlier ratings of similar items (item-kNN), for each rating of a user."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from scripts.quality.ratings import Ratings

_FEW_USERS = 20.0
"""Similarities of two items are shrunk as if so many more users, who show none, had rated both."""


@dataclass(frozen=True)
class Neighbours:
    """What ratings of some users say of pairs of I items.

    Args:
        similarity: correlation of the ratings, less the means of item and user, shrunk; float32 [I, I].
        when_liked: how much higher than else item i is rated by users who rate j above their mean; float32 [I, I].
        when_disliked: the same of users who rate j below their mean.
    """

    similarity: np.ndarray
    when_liked: np.ndarray
    when_disliked: np.ndarray


def fit(ratings: Ratings, users: np.ndarray, item_means: np.ndarray) -> Neighbours:
    """From the ratings of some users, all of them. ``item_means``: float64 [I]."""
    events, lengths = ratings.events_of(users), ratings.lengths[users]
    rows = np.repeat(np.arange(len(users)), lengths)
    above = ratings.rating[events] - item_means[ratings.item[events]]
    above -= (np.bincount(rows, weights=above) / (lengths + 3.0))[rows]

    def table(values: np.ndarray) -> np.ndarray:
        shape = (len(users), ratings.num_items)
        found = sparse.csr_array((values.astype(np.float32), (rows, ratings.item[events])), shape=shape)
        return np.asarray(found.toarray())

    residuals, rated = table(above), table(np.ones(len(events)))
    both = rated.T @ rated
    squares = (residuals * residuals).T @ rated
    similarity = residuals.T @ residuals / np.sqrt(np.maximum(squares * squares.T, 1e-12))
    similarity *= both / (both + _FEW_USERS)
    liked = table(np.where(above > 0, 1.0, 0.0))
    when_liked = residuals.T @ liked / (rated.T @ liked + _FEW_USERS)
    disliked = rated - liked
    when_disliked = residuals.T @ disliked / (rated.T @ disliked + _FEW_USERS)
    return Neighbours(similarity, when_liked, when_disliked)


def predict_online(
    found: Neighbours, ratings: Ratings, users: np.ndarray, item_means: np.ndarray
) -> dict[str, np.ndarray]:
    """Name → a number for each rating of ``users``, in the order of ``ratings.events_of(users)``; float64 [n].

    knn: expected amount above the item's mean: a mean of the earlier amounts, weighted by similarity. knn_near: the
    same with the third power of similarity, so that few neighbours count. knn_weight: the sum of the weights.
    knn_company: the sum of when_liked and when_disliked over the earlier ratings.
    """
    columns: dict[str, list[np.ndarray]] = {"knn": [], "knn_near": [], "knn_weight": [], "knn_company": []}
    for user in users:
        events = slice(*ratings.offsets[user : user + 2])
        item = ratings.item[events]
        above = (ratings.rating[events] - item_means[item]).astype(np.float32)
        count = np.arange(len(item))
        mean = (np.cumsum(above) - above) / (count + 3)  # the user's mean before each rating
        pair = np.ix_(item, item)
        weights = np.tril(found.similarity[pair], -1)
        for name, each in (("knn", weights), ("knn_near", weights**3)):
            size = np.abs(each).sum(1)
            expected = each @ above - mean * each.sum(1)
            columns[name].append(mean + expected / (size + (1.0 if name == "knn" else 0.02)))
        columns["knn_weight"].append(np.abs(weights).sum(1))
        liked = above > mean
        company = np.where(liked, found.when_liked[pair], found.when_disliked[pair])
        columns["knn_company"].append(np.tril(company, -1).sum(1) / np.sqrt(count + 5.0))
    return {name: np.concatenate(parts) for name, parts in columns.items()}
