"""Estimates the memory, communication and step time of a run from its configuration, before the run starts.

dry_run.py runs one step of the real model without data and processes; record.py counts its work, memory and traffic.
sharding.py computes what cannot run without data: tables, DDP and FSDP. scripts/estimate.py prints the estimate, the
fastest plan (fit.py) or a simulated cluster (cluster.py). validate.py is ``--validate-only``. Only entry points import it.
"""
