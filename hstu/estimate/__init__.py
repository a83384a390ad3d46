"""Memory, communication and step time of a run, from its configuration, before anything is started.

The model is not described here a second time: dry_run.py builds the real one and runs one real training step without
data and processes, and record.py counts what that step computes, keeps and exchanges. Only what does not run without
data is a model of its own: tables (tables.py), and DDP and FSDP (data_parallel.py). No other room imports this one.
scripts/estimate.py calls ``plan_workload`` (plan.py), ``gpu`` or ``this_cpu`` (machine.py) and ``estimate``
(estimate.py); for a cluster ``plan_cluster`` (plan.py) and ``simulate`` (cluster.py). The entry scripts apply the rules
of preflight.py for ``--validate-only``.
"""
