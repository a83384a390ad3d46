"""Memory, communication and step time of a run, estimated from its configuration before anything is started.

The estimate reads the model on the meta device, the samplers and the costs of the operators. No other room imports
this one. scripts/estimate.py calls ``plan_workload`` (plan.py), ``gpu`` or ``this_cpu`` (machine.py) and
``estimate`` (estimate.py); for a cluster ``plan_cluster`` (plan.py) and ``simulate`` (simulate.py).
docs/distributed.md explains the formulas. The entry scripts apply the rules of preflight.py for ``--validate-only``.
"""
