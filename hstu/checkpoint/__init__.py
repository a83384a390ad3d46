"""Saving and loading the state of a run.

- ``store``: the checkpoints of a run: save, also in the background, restore, keep the latest and the best.
- ``state``: what a checkpoint holds; ``save``: how it is written; ``directory``: names, manifests, commits on disk.
- ``load``: reading into a run; ``matching``, ``raw_ids``: from other names, sizes, vocabularies and configurations.
- ``tensors``: names of stored tensors and reading them; ``dynamic``, ``parquet``: dynamic tables.
- ``export``, ``describe``: what the scripts do with a checkpoint.

Trainer and builder import ``CheckpointStore``, ``BackgroundWriter``, ``TrainState``, ``LoadOptions`` and ``RawIds``.
Scripts import ``describe``, ``export``, ``parquet`` and ``directory``. The rest is used within this folder only.
"""
