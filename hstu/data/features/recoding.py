"""How a second store, DatasetArgs.eval_dataset_path, is read with the codes of the training data."""

from __future__ import annotations

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.data.features.roles import FeatureRoles
from hstu.data.store.sequence_store import SequenceStore


def recoding_of(theirs: SequenceStore, ours: SequenceStore, roles: FeatureRoles) -> dict[str, np.ndarray]:
    """Codes of the second store → codes of the first. Each store numbers the raw ids that occur in it."""
    recoding, problems = {}, []
    for name in roles.names:
        if name in theirs.features and ours.feature(name).raw != theirs.feature(name).raw:
            having, lacking = (ours, theirs) if ours.feature(name).raw else (theirs, ours)
            problems.append(
                f"DatasetArgs.eval_dataset_path: {having.path} keeps raw ids of {name!r}, {lacking.path} does not; "
                "preprocess both with the same --raw_ids"
            )
        elif ours.feature(name).raw:
            continue
        elif ours.feature(name).has_vocab:
            try:
                recoding[name] = ours.encode(name, theirs.raw_ids(name))
            except DataError as error:
                raise DataError(
                    f"DatasetArgs.eval_dataset_path: {theirs.path} has ids that the training data lacks. "
                    f"{error}. Preprocess the training data so that it has them, or leave the feature out"
                ) from error
        elif theirs.cardinality(name) > ours.cardinality(name):
            problems.append(
                f"DatasetArgs.eval_dataset_path: {name!r} is up to {theirs.cardinality(name) - 1} in {theirs.path} "
                f"and up to {ours.cardinality(name) - 1} in the training data, {ours.path}"
            )
    for name in roles.numbers:
        width, found = ours.features[name].width, theirs.features.get(name)
        if found is None or (found.role, found.width) != (ours.features[name].role, width):
            problems.append(
                f"DatasetArgs.eval_dataset_path: {theirs.path} has no number or vector {name!r} like that of the "
                "training data; preprocess both with the same --numbers and --vectors"
            )
    if problems:
        raise ConfigError(problems)
    return recoding
