"""Apply a trained model: metrics, predictions, vectors, export, server. Only hstu.api and scripts import this package.

loaded.py opens a checkpoint or an export with its data as a ``LoadedModel``, which says what its outputs mean.
runtime/requests.py defines a request: a ``History``, and ``Candidates`` to score. runtime/encode.py looks up its ids,
and histories.py builds batches from them.
export.py writes a directory for services: the program that hstu/model/program.py traces, tables and ids (contents.py).
runtime/ loads that directory with torch and the standard library alone; server/ answers HTTP requests with it,
and keeps users: their events, and in memory the keys and values of their histories (runtime/cache.py).
"""
