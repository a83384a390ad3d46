"""Estimates the memory, communication and step time of a run from its configuration, before the run starts.

dry_run.py runs one step of the real model without data and processes; record.py counts its work, memory and traffic.
sharding.py computes what cannot run without data: tables, DDP and FSDP. validate.py implements
``--validate-only``. Only scripts, hstu/entry.py and hstu/api.py import this package.
"""
