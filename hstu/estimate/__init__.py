"""Memory, communication and step time of a run, from its configuration, before anything is started.

The model is not described here a second time: dry_run.py builds the real one and runs one real training step without
data and processes, and record.py counts what that step computes, keeps and exchanges. Only what does not run without
data is a model of its own: tables, DDP and FSDP (sharding.py). No other room imports this one. scripts/estimate.py
prints the estimate of a run, the fastest plan (fit.py) or a cluster (cluster.py). validate.py is ``--validate-only``.
"""
