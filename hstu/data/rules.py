"""Rules that need the registry of built-in datasets, which hstu.config must not import. NumPy and torch stay out."""
# ruff: noqa: D103

from collections.abc import Iterator

from hstu.base.shipped import command
from hstu.config.args import DatasetArgs
from hstu.config.option import problem
from hstu.config.problems import Problem, did_you_mean
from hstu.config.run_config import RunConfig
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.store.layout import TIME_FEATURES


def dataset_is_built_in_or_described(run: RunConfig) -> Iterator[Problem]:
    dataset = run.dataset
    if isinstance(dataset, DatasetArgs) and resolve_name(dataset.dataset_name) is None and not run.embeddings:
        guess = did_you_mean(dataset.dataset_name, DATASETS) or "."
        script = command("scripts/preprocess_dataset.py")
        text = (
            f"is not a built-in dataset{guess} Built in: {', '.join(DATASETS)}. For your own data: make it with "
            f"{script} --dataset_name {dataset.dataset_name} --interactions FILE --user COLUMN "
            "--item COLUMN, set DatasetArgs.dataset_path to it, and bind EmbeddingArgs for each feature"
        )
        yield problem(dataset, "dataset_name", text)


def features_of_own_data_have_tables(run: RunConfig) -> Iterator[Problem]:
    dataset = run.dataset
    if not isinstance(dataset, DatasetArgs) or resolve_name(dataset.dataset_name) is not None or not run.embeddings:
        return
    known = [name for table in run.embeddings for name in table.feature_names]
    numbers = [name for each in run.numbers for name in each.feature_names]
    for parameter in ("item_feature_name", "action_feature_name", "contextual_feature_names", "side_feature_names"):
        value = getattr(dataset, parameter, None)
        for name in value if isinstance(value, list) else [value]:
            if not name or name in (*known, *numbers, *TIME_FEATURES):  # "": no feature; None: the store's feature
                continue
            guess = did_you_mean(name, known)
            if parameter != "side_feature_names":
                text = f"no EmbeddingArgs has the feature {name!r}; choose one of {', '.join(known)}, or add a table"
                yield problem(dataset, parameter, text + guess)
            elif guess:  # otherwise it may be a number, which needs neither; only the data shows it
                text = f"no EmbeddingArgs has the feature {name!r}; add a table, or NumericFeatureArgs for a number"
                yield problem(dataset, parameter, text + guess)


DATA_RULES = (dataset_is_built_in_or_described, features_of_own_data_have_tables)
