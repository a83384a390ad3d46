"""Applies a trained model: metrics, predictions, vectors, export, server.

``LoadedModel`` (loaded.py) opens a checkpoint or an export with its data. hstu.api, the interface for notebooks, and
the scripts of docs/use.md call the rest. No earlier room imports this one.

A request is a ``History``, and ``Candidates`` of a ranking model (runtime/requests.py). There is one encoder of
requests (runtime/encode.py); histories.py makes batches of what it gives.

A ``Session`` (session.py) keeps what is computed once per user, so that a request costs what is new in it: an
``IncrementalEncoder`` (prefix.py) fills, extends and reads a ``PrefixCache`` (pages.py) of keys and values.

export.py writes a directory that a service loads with the package of runtime/, which imports nothing but torch and the
standard library: program.py is the traced dense part, contents.py collects what lies beside it.
server/ answers over HTTP with such a directory, and imports nothing of the trainer.
"""
