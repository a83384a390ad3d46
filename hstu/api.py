"""The Python interface for notebooks: make data, train, load a trained model, inspect it, and compute with it.

    from hstu import api

    trained = api.load("runs/quickstart")
    print(api.format_recommendations(trained.recommend(["1", "2"], top=10)))

docs/python_api.md shows each function with its output. Importing this module imports torch and TorchRec.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import compress, islice
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError, printable
from hstu.base.files import sha256
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.tensors import TABLES, StoredTensors
from hstu.config.args import Task
from hstu.config.gin_io import read_and_check
from hstu.config.problems import literal
from hstu.config.rules import RULES
from hstu.data.batches.batch import HSTUBatch
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.preprocess.report import format_report as format_report
from hstu.data.preprocess.starter import write_starters
from hstu.data.preprocess.state import open_engine
from hstu.data.rules import DATA_RULES
from hstu.data.sampling.splits import Split
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.estimate.estimate import beside_tables_of_run
from hstu.parallel.dynamic.table import merged
from hstu.serve.histories import histories as histories
from hstu.serve.loaded import LoadedModel, mesh_of_this_process
from hstu.serve.predict import evaluate_split, item_vectors
from hstu.serve.runtime.requests import History
from hstu.train.corpus import Corpus, Queries, recommend
from hstu.train.inference import StoredSource
from hstu.train.main import start_mesh, train_here
from hstu.train.metrics import retrieval_metrics

open_store = SequenceStore.open


@dataclass(frozen=True)
class Recommendation:
    """The best items of one user, best first, with raw ids."""

    user: Any
    items: list[Any]
    titles: list[str]
    """Titles, or raw ids if the data has no titles."""
    scores: list[float]
    """Cosine similarities of the user vector and the item vectors."""


@dataclass(frozen=True)
class Table:
    """A whole embedding table in host memory."""

    ids: Tensor | None
    """int64 [n], ascending: the id of each row of a dynamic table. None for a static table: row i belongs to code i."""
    rows: Tensor
    """float32 [n, dim]."""


def dataset(interactions: Any, *, output: str | Path, quick: bool = False, **options: Any) -> SequenceStore:
    """Make the store of your own tables, and the starter files ``<output>_retrieval.gin`` and ``<output>_ranking.gin``.

    ``options`` are those of scripts/preprocess_dataset.py, such as ``user``, ``item``, ``time``, ``context``, ``force``
    and ``append``, with tuples for ``a,b`` and dicts for ``a=1,b=2``. Tables are paths, or frames of pandas, Polars or
    Arrow, of which ``raw/<name>`` beside ``output`` gets a Parquet file. ``quick``: starter files of a small model and
    500 iterations. Raises ConfigError or DataError, which call the argument x --x.
    """
    target, given = Path(output), {name: value for name, value in options.items() if value is not None}
    given["interactions"] = interactions
    for name in {"interactions", "requests", "context", "items", "titles"} & given.keys():
        tables = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]
        files = tuple(_as_file(table, target.parent / "raw" / target.name, name) for table in tables)
        given[name] = files if name in ("interactions", "requests") else files[0]
    for name in {"context_columns", "item_columns", "event_columns", "numbers", "vectors", "header"} & given.keys():
        given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
    columns = {field.name: given.pop(field.name) for field in fields(InteractionColumns) if field.name in given}
    store = SequenceStore.open(import_interactions(target.name, InteractionColumns.of(columns), output=target, **given))
    list(write_starters(store, target, quick))
    return store


def _as_file(table: Any, folder: Path, role: str) -> Path:
    """The path of a table. A frame is written to a file in ``folder``, whose name has the digest of its content."""
    if isinstance(table, (str, Path)):
        return Path(table)
    names = [str(name) for name in getattr(table, "column_names", getattr(table, "columns", ()))]
    if repeated := [repr(name) for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(
            f"{role}: the frame has several columns named {', '.join(repeated)}; each needs a name of its own, and "
            "frame.loc[:, ~frame.columns.duplicated()] of pandas keeps the first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch, open_engine(Path(scratch), "4GB") as engine:
        engine.connection.execute(f"SET pandas_analyze_sample = {2**31}")  # all rows decide the type of a column
        engine.register("frame", table)
        engine.write("SELECT * FROM frame", written := Path(scratch, "frame.parquet"))
        return written.replace(folder / f"{role}-{sha256(written)[:12]}.parquet")


@dataclass
class TrainedModel(LoadedModel):
    """A model with trained weights, its data and its configuration, created by :func:`load`.

    Methods compute without dropout, and with averaged weights if the run kept them. They are collective.
    """

    def tables(self) -> dict[str, Table]:
        """Read all embedding tables from the checkpoint. Returns table name → table."""
        tensors, dynamic = StoredTensors(self.checkpoint), read_tables(self.checkpoint)
        tables = {name: merged(parts) for name, parts in dynamic.items()}
        static = (name.removeprefix(TABLES) for name in tensors.sizes if name.startswith(TABLES))
        return {name: Table(None, tensors.read_whole(TABLES + name)) for name in static} | {
            name: Table(content.ids[order], content.rows[order])
            for name, content in tables.items()
            for order in [content.ids.argsort()]
        }

    def batches(self, split: Split = "valid") -> Iterator[HSTUBatch]:
        """Iterate over the evaluation batches of a split ("valid"; "test" for retrieval), on the device."""
        return (batch.to(self.mesh.device) for batch in self.source.eval_batches(split))

    def evaluate(self, split: Split = "valid", metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Compute metrics on a split: the configured metrics, or others of the task, such as ("HR@50",)."""
        return evaluate_split(self, split, metrics).metrics()

    def user_embeddings(self, users: Sequence[Any], at: int | None = None) -> Tensor:
        """Encode users with their whole histories into unit vectors, float32 [len(users), E].

        Args:
            users: raw ids; numbers may be given as strings.
            at: time of the request in whole seconds since 1970. None: the time of each user's newest event.

        Raises:
            DataError: unknown users, users with events after ``at``, or a ranking model, which has no user vectors.
            ConfigError: ``at`` is given to a model that does not read it (``reads_request_time``).
        """
        self.require_retrieval()
        batches = self.with_data().history_batches(encode_users(self.store, users))
        return self.user_vectors(batches, at)

    def item_embeddings(self) -> Tensor:
        """Unit vectors of all items in the order of ``store.raw_ids(store.item_feature)``, float32 [items, E].

        Items without a row in the model's table have zero vectors. Raises DataError for a ranking model.
        """
        return torch.from_numpy(np.concatenate(list(item_vectors(self))))

    def recommend(self, users: Sequence[Any], top: int = 10, at: int | None = None) -> list[Recommendation]:
        """Recommend the ``top`` best items, unseen if ``leaves_out_seen``. ``at`` and errors: `user_embeddings`."""
        self.require_retrieval()
        rows, corpus = encode_users(self.store, users), self.retrieval_evaluator().corpus()
        vectors = self.user_vectors(self.with_data().history_batches(rows), at)
        return self._best(users, vectors, corpus, self.items_of(rows), top)

    def known_users(self, users: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Divide raw user ids into (known, unknown) users of the data, each in the given order."""
        named = list(users)
        is_known = self.users.rows(named) >= 0
        return list(compress(named, is_known)), list(compress(named, ~is_known))

    def recommend_for(
        self, given: Sequence[History], top: int = 10, at: int | Sequence[int] | None = None
    ) -> tuple[list[Recommendation], dict[str, list[Any]]]:
        """As :meth:`recommend`, for histories given by hand. Works without the data of the run.

        Returns the recommendations, and feature → unknown values. Unknown items and unknown or missing contextual
        features get a row of zeros. Item features that are not given come from the data, if it exists.
        ``at``: one time for all or one per history; it and errors: see :meth:`user_embeddings`. Also raises DataError
        for a history that is empty or lacks actions, times or features that the model reads.
        """
        if isinstance(at, Sequence) and len(at) != len(given):
            raise DataError(f"at has {len(at)} times for {len(given)} histories; give one for each")
        corpus, item_feature = self.retrieval_evaluator().corpus(), self.source.roles.item
        vectors = self.user_vectors(self.encoder.batches(given), at)
        lengths = np.array([len(history.items) for history in given], dtype=np.int64)
        items = [item for history in given for item in history.items]
        seen = self.vocabularies[item_feature].rows(items).numpy()
        best = self._best([history.user for history in given], vectors, corpus, (seen, lengths), top)
        (unknown,) = self.encoder.unknown([given])
        if absent := {items[place] for place in np.flatnonzero(corpus.positions(seen) < 0)}:
            unknown[item_feature] = sorted(absent, key=str)
        return best, unknown

    def histories(self, users: Sequence[Any]) -> Iterator[History]:
        """The histories of users with the features that the model reads. Raises DataError for unknown users."""
        return self.histories_of(encode_users(self.store, users))

    def _best(
        self, users: Sequence[Any], vectors: Tensor, corpus: Corpus, seen: tuple[np.ndarray, np.ndarray], top: int
    ) -> list[Recommendation]:
        rows = np.arange(len(users))
        if not self.leaves_out_seen:
            seen = rows[:0], np.zeros_like(rows)
        with self.inference():
            queries = Queries(vectors, rows, np.full_like(rows, -1), *seen)
            positions, scores = recommend(queries, corpus, top)
        found = positions >= 0
        items, titles = map(iter, self._describe_items(corpus.ids.cpu().numpy()[positions[found]]))
        return [
            Recommendation(user, list(islice(items, count)), list(islice(titles, count)), own[:count].tolist())
            for user, own, count in zip(users, scores, found.sum(axis=1), strict=True)
        ]

    def _describe_items(self, ids: np.ndarray) -> tuple[list[Any], list[str]]:
        items = self.vocabularies[self.source.roles.item].values_at(torch.from_numpy(ids))
        titles = None if isinstance(self.source, StoredSource) else self.store.titles()
        if titles is None:
            return items, [str(item) for item in items]
        codes = self.items.places(items).tolist()
        named = [str(titles[code]) if code >= 0 else "" for code in codes]  # -1: the item is not in this store
        return items, [title or str(item) for title, item in zip(named, items, strict=True)]


load = TrainedModel.load


def train(
    config: str | Path | Mapping[str, Any], bindings: Mapping[str, Any] = MappingProxyType({}), task: Task | None = None
) -> TrainedModel:
    """Train in this process alone, and load the model as :func:`load` does: the best, if the run chooses one.

    The run writes what the command writes. Interrupted, it ends after a checkpoint. Raises errors as the command does.
    ``config``: path of a gin file, gin text, or option → value. ``bindings``: option → value, which wins. ``task``
    None: ranking if an option of RankingArgs is set, else retrieval.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("api.train trains in one process; with torchrun, start pretrain_gr_retrieval.py")
    values = {**(config if isinstance(config, Mapping) else {}), **bindings}
    texts, files = [f"{name} = {literal(value)}" for name, value in values.items()], []
    if isinstance(config, str) and "=" in config and not config.endswith(".gin"):
        texts.insert(0, config)
    elif not isinstance(config, Mapping):
        files.append(str(config))
    run, problems = read_and_check(files, texts, task, 1, (*RULES, *DATA_RULES))
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    if not run.trainer.saves_checkpoints:
        raise ConfigError("api.train loads what the run saves: set TrainerArgs.ckpt_save_interval to 0 or more")
    mesh_of_this_process()  # leaves the world at exit
    mesh = start_mesh(run)
    return load(train_here(run, mesh, beside_tables_of_run), mesh=mesh)


def retrieval_scores(y_true: Sequence[Any], y_pred: Sequence[Any], metrics: Sequence[str]) -> dict[str, float]:
    """HR@K, NDCG@K, MRR@K or MRR of one item per user, in the user's ranked items or Recommendation in ``y_pred``."""
    lists = [list(ranked.items if isinstance(ranked, Recommendation) else ranked) for ranked in y_pred]
    ranks = [ranked.index(item) + 1 if item in ranked else inf for item, ranked in zip(y_true, lists, strict=True)]
    return retrieval_metrics(metrics, np.array(ranks))


def format_recommendations(recommendations: Iterable[Recommendation]) -> str:
    """Format recommendations for printing, one block per user. Control characters are escaped."""
    lines = []
    for entry in recommendations:
        lines.append(f"\nuser {printable(str(entry.user), keep='')}")
        for place, (item, title, score) in enumerate(zip(entry.items, entry.titles, entry.scores, strict=True), 1):
            raw_id = f"  [{item}]" if title != str(item) else ""
            lines.append(f"  {place:>3}.  {score:6.3f}  {printable(f'{title}{raw_id}', keep='')}")
    return "\n".join(lines)


def encode_users(store: SequenceStore, users: Sequence[Any]) -> np.ndarray:
    """Look up the store rows of raw user ids, int64 [len(users)]. Raises DataError that names unknown users."""
    if store.raw_ids(USER_FEATURE).dtype == object:
        return store.encode(USER_FEATURE, users)
    try:
        numbers = np.array([int(user) for user in users], dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{store}: user ids are whole numbers, got {list(users)!r}") from error
    return store.encode(USER_FEATURE, numbers)
