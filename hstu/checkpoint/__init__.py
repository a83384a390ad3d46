"""Saving and loading the state of a run.

- ``store``: saves a run's checkpoints, also in the background, restores them, and keeps the latest and the best.
- ``state``: content of a checkpoint; ``save``: writing it; ``directory``: names, manifests and commits on disk.
- ``load``: reading into a run; ``matching``, ``raw_ids``: other names, sizes, vocabularies and configurations.
- ``tensors``: names and reading of stored tensors; ``dynamic``: dynamic tables.
- ``export``: used by scripts.

Trainer and builder import ``CheckpointStore``, ``TrainState``, ``LoadOptions`` and ``RawIds``.
Scripts import ``export`` and ``directory``. The rest is internal.
"""
