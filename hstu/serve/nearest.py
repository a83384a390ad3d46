"""An approximate index of item vectors (HNSW, by faiss), and what it finds of what an exact search finds."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hstu.base.errors import ConfigError
from hstu.checkpoint.directory import put_in_place, temporary_path

LINKS = 32
"""Neighbours that a vector of the graph is linked to."""
_EF_CONSTRUCTION = 200
_QUERIES = 256


@dataclass(frozen=True)
class Recall:
    """How well and how fast an index answers."""

    recall: float
    """Share of the k nearest items that the index finds, on average over the queries."""
    approximate_ms: float
    """Milliseconds per query."""
    exact_ms: float


def require_faiss() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ConfigError("--index needs faiss, which is not installed: pip install faiss-cpu") from None


def build_index(vectors: np.ndarray, path: Path, ef_search: int) -> Any:
    """Index vectors of length 1, float32 [n, E], by inner product, and write the index. Vectors of zeros are left out.

    Its ids are rows of ``vectors``. ``ef_search``: candidates that a search keeps: more find more and take longer.
    """
    faiss = require_faiss()
    graph = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = _EF_CONSTRUCTION, ef_search
    index = faiss.IndexIDMap(graph)
    rows = np.flatnonzero(vectors.any(axis=1))
    index.add_with_ids(np.ascontiguousarray(vectors[rows]), rows)
    aside = temporary_path(path)
    faiss.write_index(index, str(aside))
    put_in_place(aside, path)
    return index


def measure_recall(index: Any, vectors: np.ndarray, queries: np.ndarray, k: int) -> Recall:
    """Compare an index of ``vectors`` with an exact search for ``queries``, float32 [q, E], q at least 1."""
    k = min(k, index.ntotal)
    began = time.perf_counter()
    found = index.search(np.ascontiguousarray(queries), k)[1]
    searched = time.perf_counter()
    exact = _exact(vectors, queries, k)
    compared = time.perf_counter()
    hits = [len(np.intersect1d(*pair)) for pair in zip(found, exact, strict=True)]
    per_query = 1000 / len(queries)
    return Recall(float(np.mean(hits)) / k, (searched - began) * per_query, (compared - searched) * per_query)


def _exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k vectors of the largest products with each query, in any order; int64 [q, k]."""
    is_item = vectors.any(axis=1)
    found = []
    for first in range(0, len(queries), _QUERIES):
        scores = queries[first : first + _QUERIES] @ vectors.T
        scores[:, ~is_item] = -np.inf
        found.append(np.argpartition(-scores, k - 1, axis=1)[:, :k])
    return np.concatenate(found)
