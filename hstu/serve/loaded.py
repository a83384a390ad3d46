"""Load a trained model with its configuration and data, and say what its outputs mean."""

import atexit
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import islice, repeat
from pathlib import Path
from threading import RLock
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import sha256
from hstu.base.remote import Absent
from hstu.base.times import as_date
from hstu.checkpoint.directory import MANIFEST, verified_file
from hstu.checkpoint.find import GIN, LAST, best_of, check_belongs, is_choice, is_run, locate
from hstu.checkpoint.load import load as load_checkpoint
from hstu.checkpoint.matching import LoadOptions
from hstu.checkpoint.mirror import local_checkpoint
from hstu.config.args import DatasetArgs, RankingArgs, RetrievalArgs
from hstu.config.gin_io import load_stored
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import ranges
from hstu.data.datasets import store_path
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.model.gr_model import GRModel
from hstu.model.ranking import MultiTaskDense, RankingDense, RankingModel
from hstu.model.retrieval import RetrievalDense
from hstu.model.stack import ModelOutput
from hstu.optim.optimizers import Optimizers
from hstu.parallel import mesh as meshes
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.serve.histories import BatchEncoder, histories, stored_vocabulary, vocabularies_of
from hstu.serve.runtime.files import Vocabulary
from hstu.serve.runtime.model import columns_of
from hstu.serve.runtime.requests import History
from hstu.train.builder import build_model, build_state, raw_ids, task_names
from hstu.train.evaluate import RetrievalEvaluator, evaluation_mode
from hstu.train.inference import InferenceSource, StoredSource, zero_spare_rows


def stored_config(path: str | Path, checkpoint: str | Path | None = None) -> tuple[RunConfig, Path, list[str]]:
    """The configuration, the path of the checkpoint or export, and why this one, if the run chose a best. Arguments and
    errors: ``LoadedModel.load``."""
    is_named = is_choice(checkpoint)
    directory = local_checkpoint(path, str(checkpoint) if is_named else LAST)

    def config_of(stored: Path) -> RunConfig:
        return load_stored(directory / GIN if is_run(directory) else verified_file(stored, GIN))

    place = local_checkpoint(checkpoint) if checkpoint and not is_named else directory
    stored = locate(place, str(checkpoint) if is_named else LAST)
    if checkpoint and is_run(directory) and not is_named:
        check_belongs(stored, directory)
    config, is_choosable = config_of(stored), not is_named and not stored.samefile(place)
    metric, best = config.trainer.best_metric, best_of(stored) if is_choosable else None
    if metric is None or best is None or best == stored:
        return config, stored, []
    return config_of(best), best, [f"{best.name} is used, the best by {metric}. --ckpt last takes {stored.name}."]


def with_store(config: RunConfig, path: str | Path) -> RunConfig:
    """The configuration on other preprocessed data."""
    assert isinstance(config.dataset, DatasetArgs)
    return replace(config, dataset=replace(config.dataset, dataset_path=str(path), eval_dataset_path=None))


@dataclass(frozen=True)
class Prediction:
    """Consecutive outputs of a model that predict one property of an item."""

    name: str
    kind: str
    """ "binary": a logit; "class": one logit per label; "number": the value itself."""
    columns: Sequence[str]
    first: int = 0
    """The label of the first output, if the kind is "class"."""
    expected: str | None = None
    """The column of the expected label, if there is one."""


@dataclass
class LoadedModel:
    """A trained model with its data and configuration. Methods are collective; they use averaged weights if kept."""

    config: RunConfig
    checkpoint: Path
    mesh: Mesh
    source: InferenceSource | StoredSource
    model: GRModel
    """Tables and dense part: ``model.embedding`` and ``model.dense``."""
    optimizers: Optimizers
    report: list[str]
    """Which checkpoint and why, if the run chose a best; what of it did not fit; how many ids of the data it lacks."""
    lock: AbstractContextManager[bool] = field(default_factory=RLock, repr=False, compare=False)
    """Held during inference, which changes the mode of the model and swaps weights for averages."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        checkpoint: str | Path | None = None,
        mesh: Mesh | None = None,
        strict: bool | None = None,
        data: str | Path | None = None,
    ) -> Self:
        """Load the model of a run, a checkpoint, a directory of checkpoints, or an export.

        New users, items and contextual values of newer data get rows of zeros, which ``report`` counts. Without the
        data, the model can recommend for histories given by hand.

        Args:
            path: a run or a directory of checkpoints means its best checkpoint by TrainerArgs.best_metric, if that is
                set, or else its newest.
            checkpoint: load this one of the run ``path`` instead, with the run's configuration: "last", "best", an
                iteration, or the path of a checkpoint or an export.
            mesh: None: this process, or all ranks if torchrun started it. Collective.
            strict: False: load what fits and report the rest. None: TrainerArgs.ckpt_load_strict.
            data: apply the model to this preprocessed data instead of the run's.

        Raises:
            DataError: the path, the checkpoint or the data is missing or damaged, or the checkpoint is of another run.
            ConfigError: the configuration does not fit the checkpoint, or the run used random data.
        """
        config, stored, why = stored_config(path, checkpoint)
        config = config if data is None else with_store(config, data)
        loaded = cls.restore(config, stored, mesh or mesh_of_this_process(), strict)
        loaded.report[:0] = why
        if data is not None:
            loaded.with_data()  # raises if this data is missing
        return loaded

    @classmethod
    def restore(cls, config: RunConfig, checkpoint: str | Path, mesh: Mesh, strict: bool | None = None) -> Self:
        """Build the model of ``config`` and load its weights. Errors: see ``load``."""
        if not isinstance(config.dataset, DatasetArgs):
            raise ConfigError("the run trained on random data (BenchmarkDatasetArgs), so there is nothing to look up")
        root = locate(checkpoint)
        source: InferenceSource | StoredSource
        try:
            source = InferenceSource(config, config.dataset, mesh)
        except DataError as error:
            if not isinstance(error, Absent) and store_path(config.dataset).exists():
                raise
            source = StoredSource(config, root, mesh, error)
        model, optimizers = build_model(config, source, mesh)
        state = build_state(config, source, model, optimizers)
        is_strict = config.trainer.ckpt_load_strict if strict is None else strict
        report = load_checkpoint(root, state, mesh, LoadOptions(is_strict, optimizer=False, zero_new_rows=True))
        zero_spare_rows(state, source)
        return cls(config, root, mesh, source, model, optimizers, report)

    @property
    def dataset(self) -> DatasetArgs:
        """The options of the data."""
        assert isinstance(self.config.dataset, DatasetArgs), "restore requires data"
        return self.config.dataset

    @property
    def store(self) -> SequenceStore:
        """The data. Raises DataError if it is missing."""
        return self.with_data().store

    def with_data(self) -> InferenceSource:
        """The source of batches. Raises DataError if the data is missing."""
        if isinstance(self.source, StoredSource):
            raise self.source.missing
        return self.source

    @property
    def task(self) -> RankingModel | RetrievalDense:
        """The dense part of the model, without its DDP wrapper."""
        task = unwrap_dense(self.model).task
        assert isinstance(task, (RankingModel, RetrievalDense))
        return task

    @cached_property
    def version(self) -> str:
        """Name of the checkpoint or export, "@", and the first 12 digits of its manifest's sha256."""
        return f"{self.checkpoint.resolve().name}@{sha256(self.checkpoint / MANIFEST)[:12]}"

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """Feature → vocabulary from raw values to model ids."""
        return vocabularies_of(self.source, raw_ids(self.source))

    @cached_property
    def users(self) -> Vocabulary:
        """Vocabulary from raw user ids to store rows."""
        return stored_vocabulary(self.store, USER_FEATURE)

    @cached_property
    def items(self) -> Vocabulary:
        """Vocabulary from raw item ids to item codes of the data."""
        return stored_vocabulary(self.store, self.store.item_feature)

    @cached_property
    def encoder(self) -> BatchEncoder:
        """Builds batches from requests."""
        return BatchEncoder(self.config, self.source, self.vocabularies)

    @property
    def predictions(self) -> list[Prediction]:
        """What the outputs of the model mean, in their order. docs/use.md lists the columns."""
        task, source = self.task, self.source
        if isinstance(task, RetrievalDense):
            return [Prediction("cosine", "number", ["score"])]
        if isinstance(task, MultiTaskDense):
            found = []
            for each in task.each_task:
                name, kind, facts = each.args.task_name, each.args.kind, source.label_facts.get(each.args.label)
                labels = _labels(each.first_class, each.args.output_width, facts.texts if facts else ())
                columns = [f"p_{name}_{label}" for label in labels] if kind == "class" else [f"score_{name}"]
                found.append(Prediction(name, "number" if kind == "regression" else kind, columns, each.first_class))
            return found
        assert isinstance(task, RankingDense) and isinstance(self.config.task_args, RankingArgs)
        if task.is_multi_task:
            bits = [f"task{bit}" for bit in range(task.num_tasks)]
            named = task_names(self.dataset.dataset_name)
            columns = [f"score_{name}" for name in (named if len(named) == len(bits) else bits)]
            if len(bits) == 1:
                columns = ["score"]
            return [Prediction(bit, "binary", [column]) for bit, column in zip(bits, columns, strict=True)]
        action, texts, first = source.roles.action, [], task.label_offset
        assert action is not None, "a ranking model has actions"
        if not isinstance(source, StoredSource) and source.store.feature(action).has_vocab:
            texts = source.store.raw_ids(action).tolist()
        columns = [f"p_{label}" for label in _labels(first, self.config.task_args.prediction_head_arch[-1], texts)]
        return [Prediction(action, "class", columns, first, expected=None if texts else "score")]

    def columns(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Convert outputs of the model, float32 [n, width], to column name → float32 [n], as an export does."""
        columns = columns_of([asdict(each) for each in self.predictions], torch.from_numpy(outputs))
        return {name: values.numpy() for name, values in columns.items()}

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Disable dropout and gradients, and use averaged weights if the run kept them."""
        with self.lock, evaluation_mode(self.model), self.optimizers.dense.averaged_weights():
            yield

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        """Compute the loss and the predictions of a batch: ``logits`` (ranking) or ``queries`` (retrieval)."""
        with self.inference():
            output: ModelOutput = self.model(batch.to(self.mesh.device))
        return output

    @property
    def reads_request_time(self) -> bool:
        """Whether recommendations or scores depend on the time of the request."""
        return bool(self.encoder.facts["reads_request_time"])

    def user_vectors(self, batches: Iterable[HSTUBatch], at: int | Sequence[int] | None = None) -> Tensor:
        """Encode batches of histories into unit user vectors, float32 [users, E]. ``at``: time of the request, or of
        each, in whole seconds since 1970; None: the time of each newest event. Raises ConfigError if the model does not
        read ``at``, and DataError for a history with later events."""
        self.check_request_time(at)
        times = iter(at) if isinstance(at, Sequence) else repeat(at)
        vectors = [torch.empty(0, self.config.network.item_width, device=self.mesh.device)]
        for batch in batches:
            if at is not None:
                batch = _asked_at(batch, [*islice(times, batch.real_batch_size)])
            queries = self.forward(batch).queries
            assert queries is not None  # it is a retrieval model
            vectors.append(queries[: batch.real_batch_size])
        return torch.cat(vectors)

    def check_request_time(self, at: int | Sequence[int] | None) -> None:
        """Raise ConfigError if ``at`` is given and the model does not read it."""
        if at is not None and not self.reads_request_time:
            raise ConfigError(
                "the model does not read the time of a request, because of NetworkArgs.position_encoding or "
                "DatasetArgs.query_time; leave the time out"
            )

    @property
    def leaves_out_seen(self) -> bool:
        """Whether evaluation leaves out the items that a user had before, and recommendations by default."""
        return isinstance(self.config.task_args, RetrievalArgs) and self.config.task_args.filter_seen

    def require_retrieval(self) -> None:
        """Raise DataError for a ranking run."""
        if not isinstance(self.config.task_args, RetrievalArgs):
            raise DataError(
                "this model belongs to a ranking run; recommendations and user or item vectors need a retrieval run"
            )

    def retrieval_evaluator(self) -> RetrievalEvaluator:
        """Create the object that embeds and scores items. Raises DataError for a ranking run."""
        self.require_retrieval()
        return RetrievalEvaluator(self.config, self.model, self.mesh, self.source)

    def histories_of(self, users: np.ndarray) -> Iterator[History]:
        """Whole histories of users (store rows), with the contextual and event features that the model reads."""
        store, roles = self.store, self.source.roles
        of_events = [name for name in roles.side if name in (*store.event_features, *store.event_number_features)]
        for history in histories(store, users, of_events):
            yield replace(history, context={name: history.context[name] for name in roles.contextual})

    def items_of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(model ids of the items that users (store rows) have had, user after user; their number per user), int64."""
        offsets = np.asarray(self.store.offsets())
        lengths = offsets[users + 1] - offsets[users]
        codes = self.store.sequence(self.store.item_feature)[ranges(offsets[users], lengths)]
        return self.model_ids(codes), lengths

    def model_ids(self, codes: np.ndarray) -> np.ndarray:
        """Convert item codes of the data to model ids, int64 [n]."""
        return self.store.model_ids(self.source.roles.item, codes)


def _asked_at(batch: HSTUBatch, times: Sequence[int | None]) -> HSTUBatch:
    """Set the times of the requests of a batch of histories. Raises DataError if one has a later event."""
    assert batch.items.timestamps is not None
    own = np.pad(np.array(times, dtype=np.int64), (0, batch.batch_size - len(times)))
    events, asked = batch.items.timestamps.numpy(), np.repeat(own, batch.item_lengths)
    if len(late := np.flatnonzero(events > asked)):
        time, newest = int(asked[late[0]]), int(events[late].max())
        raise DataError(
            f"recommendations are asked for at {as_date(time)}, and a history has an event at {as_date(newest)}, which "
            "is later; give a later time, or leave out what comes after it"
        )
    return replace(batch, request_times=torch.from_numpy(own))


def _labels(first: int, count: int, texts: Sequence[str]) -> list[Any]:
    """Names of ``count`` classes from label ``first`` on. ``texts``: names of the labels 0, 1, …; may be shorter."""
    return [texts[label] if label < len(texts) else label for label in range(first, first + count)]


@cache
def mesh_of_this_process() -> Mesh:
    """Join the process group at the first call. Cached, because a notebook may load many models."""
    atexit.register(meshes.finish, wait=False)
    return meshes.start()
