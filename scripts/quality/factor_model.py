"""A probabilistic factor model of ratings, and its predictions for each rating from the user's earlier ones.

A rating is c_i + w_i · z_u + noise. The factors z_u of a user are N(0, 1), and (c_i, w_i) of an item are normal with a
mean and covariance that are estimated, too, so that rare items are like the average one. Users and items are estimated
in turn, each with their uncertainty (variational Bayes). Predictions filter: the user's factors are a normal
distribution that each rating updates in closed form (Kalman).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from scripts.quality.ratings import Ratings


@dataclass(frozen=True)
class FactorModel:
    """What a model knows of I items: k factors, and the constant before them.

    Args:
        mean: of (c_i, w_i), float64 [I, 1 + k].
        covariance: of the same, float64 [I, 1 + k, 1 + k].
        noise: variance of a rating that all factors are known of.
    """

    mean: np.ndarray
    covariance: np.ndarray
    noise: float

    @property
    def num_factors(self) -> int:
        """k."""
        return self.mean.shape[1] - 1


@dataclass(frozen=True)
class Filtered:
    """What is known before each of n ratings."""

    prediction: np.ndarray
    """float64 [n]"""
    deviation: np.ndarray
    """Standard deviation of the rating around the prediction, float64 [n]."""
    factors: np.ndarray
    """Mean of the user's factors, float64 [n, k]."""


def fit(ratings: Ratings, users: np.ndarray, num_factors: int, rounds: int = 35, seed: int = 0) -> FactorModel:
    """A model of the ratings of some users."""
    events = ratings.events_of(users)
    rows = np.repeat(np.arange(len(users)), ratings.lengths[users])
    shape = (len(users), ratings.num_items)
    centre = ratings.rating[events].mean()
    rated = sparse.csr_array((np.ones(len(events)), (rows, ratings.item[events])), shape=shape)
    values = sparse.csr_array((ratings.rating[events] - centre, (rows, ratings.item[events])), shape=shape)

    has_ratings = np.bincount(ratings.item[events], minlength=ratings.num_items) > 0
    width = num_factors + 1
    rng = np.random.default_rng(seed)
    prior_mean, prior_covariance = np.zeros(width), np.eye(width) * 0.1
    mean = rng.normal(0, 0.1, (ratings.num_items, width))
    mean[:, 1] += 0.4  # the first factor is how high the user rates everything
    covariance = np.zeros((ratings.num_items, width, width))
    noise = float(ratings.rating[events].var())
    for _ in range(rounds):
        moments = mean[:, :, None] * mean[:, None, :] + covariance
        grams = (rated @ moments.reshape(-1, width * width)).reshape(-1, width, width) / noise
        sides = (values @ mean - grams[:, :, 0] * noise)[:, 1:] / noise
        spread = np.linalg.inv(grams[:, 1:, 1:] + np.eye(num_factors))
        known = np.concatenate([np.ones((len(users), 1)), np.einsum("ukl,ul->uk", spread, sides)], axis=1)
        squares = known[:, :, None] * known[:, None, :]
        squares[:, 1:, 1:] += spread

        grams = (rated.T @ squares.reshape(-1, width * width)).reshape(-1, width, width) / noise
        precision = np.linalg.inv(prior_covariance)
        covariance = np.linalg.inv(grams + precision)
        sides = (values.T @ known) / noise + precision @ prior_mean
        mean = np.einsum("ikl,il->ik", covariance, sides)
        deviation = mean[has_ratings] - prior_mean
        prior_covariance = (deviation.T @ deviation) / has_ratings.sum() + covariance[has_ratings].mean(axis=0)
        prior_mean = mean[has_ratings].mean(axis=0)

        moments = mean[:, :, None] * mean[:, None, :] + covariance
        explained = np.einsum("ikl,ikl->", moments, grams) * noise - 2 * np.einsum("ik,ik->", mean, values.T @ known)
        noise = float((np.square(ratings.rating[events] - centre).sum() + explained) / len(events))
    mean[:, 0] += centre
    return FactorModel(mean, covariance, noise)


def predict_online(model: FactorModel, ratings: Ratings, users: np.ndarray, memory: float = 1.0) -> Filtered:
    """Each rating of ``users``, in the order of ``ratings.events_of(users)``, from the user's earlier ones.

    memory: below 1, the factors of a user drift: each rating keeps this share of them.
    """
    k, lengths = model.num_factors, ratings.lengths[users]
    place = np.zeros(len(ratings), dtype=np.int64)
    place[ratings.events_of(users)] = np.arange(lengths.sum())
    found = Filtered(*(np.zeros((int(lengths.sum()), *rest)) for rest in ((), (), (k,))))
    state, spread = np.zeros((len(users), k)), np.tile(np.eye(k), (len(users), 1, 1))
    for rows, events in ratings.steps(users):
        z, p = state[rows], spread[rows]
        item = ratings.item[events]
        v, c = model.mean[item], model.covariance[item]
        w = v[:, 1:]
        pw = np.einsum("nkl,nl->nk", p, w)
        prediction = v[:, 0] + (w * z).sum(1)
        extended = np.concatenate([np.ones((len(rows), 1)), z], axis=1)
        unknown = np.einsum("nk,nkl,nl->n", extended, c, extended) + np.einsum("nkl,nkl->n", c[:, 1:, 1:], p)
        variance = (w * pw).sum(1) + model.noise + unknown
        here = place[events]
        found.prediction[here], found.deviation[here], found.factors[here] = prediction, np.sqrt(variance), z
        gain = pw / variance[:, None]
        state[rows] = memory * (z + gain * (ratings.rating[events] - prediction)[:, None])
        p = p - gain[:, :, None] * pw[:, None, :]
        spread[rows] = p if memory == 1 else memory**2 * p + (1 - memory**2) * np.eye(k)
    return found
