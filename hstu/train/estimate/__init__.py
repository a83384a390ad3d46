"""What a run will need and how fast it will be, reckoned from its configuration before anything is started.

situation.py: what the run trains on.  parameters.py, activations.py: bytes a rank.  traffic.py: bytes exchanged.
work.py: operators of a step.  machine.py: what a device can do.  calibration.py, timed_ops.py: what this CPU does,
measured.  estimate.py puts them together, report.py shows it. The formulas are explained in docs/distributed.md.
"""
