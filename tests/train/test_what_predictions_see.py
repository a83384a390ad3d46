"""What a prediction depends on, for every kind of feature and every layout of tokens: change a value of one event, and
compare the predictions of all events bit for bit.

Of masks that show a model what it is to predict the default is safe, others are refused, and both is true of the model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.config.args import RankingTaskArgs
from hstu.config.rules import validate
from hstu.config.rules.task import label_leak
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import START, SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.model.gr_model import GRModel
from hstu.model.retrieval import RetrievalDense
from hstu.ops.layout import JaggedLayout
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.train import builder
from hstu.train.sources import open_source
from tests.config.gin_files import ALL_RULES
from tests.conftest import write_small_store
from tests.train.tiny import ACTIONS, build, enlarge, tiny_config

USERS, LENGTH, ITEMS_PER_EVENT = 4, 8, 3
ITEMS = LENGTH * ITEMS_PER_EVENT
KNOWN_BEFORE = ("item", "year", "genres", "vector", "device", "load", "time")
"""Kinds of values of an event that may be shown when its action is predicted: the id of its item, a feature of the
item, a list and a vector, a feature and a number of the event, and what follows from its time (hour_of_day, time_gap,
relative bias)."""
KNOWN_AFTER = ("action", "watched", "seconds")
NEVER_SHOWN = ("liked",)
"""A feature of the event that is only a label of a task."""
SIDE = ["year", "genres", "vector", "device", "load", "watched", "seconds", "hour_of_day", "time_gap"]


@dataclass(frozen=True)
class Layout:
    """How the tokens of a sequence lie, and which kinds of values have one."""

    task: str
    network: dict[str, Any] = field(default_factory=dict)
    candidates: int = 0
    group: int = 1
    has_actions: bool = True
    task_args: dict[str, Any] = field(default_factory=dict)
    query_time: str = "request"

    @property
    def reads_request_time(self) -> bool:
        return self.query_time == "request" and "relative_bias" in self.network.get("position_encoding", ())

    @property
    def kinds(self) -> tuple[str, ...]:
        kinds = KNOWN_BEFORE + KNOWN_AFTER + (NEVER_SHOWN if self.task_args else ())
        return tuple(kind for kind in kinds if self.has_actions or kind != "action")

    def config(self, store: SequenceStore, path: Path) -> RunConfig:
        dataset = {
            "side_feature_names": SIDE,
            "known_after": ["watched", "seconds"],
            "contextual_feature_names": ["town"],
            "max_num_candidates": self.candidates,
            "query_time": self.query_time,
        }
        if self.task == "retrieval":
            dataset["valid_items"] = 0
        if not self.has_actions:
            dataset["action_feature_name"] = ""
        network = {"disable_contextual_mask": None, "target_group_size": self.group, **self.network}
        batches = {"train_batch_size": USERS, "eval_batch_size": USERS}
        options: Any = {"network": network, "trainer": batches, "task_args": self.task_args}
        return tiny_config(self.task, store, path, dataset=dataset, **options)

    def may_see(self, predicted: int, kind: str, event: int) -> bool:
        """Whether the prediction of an event may depend on a value of another one, or of itself."""
        if kind in NEVER_SHOWN:
            return False
        is_candidate = event >= LENGTH - self.candidates
        if kind == "time" and not is_candidate and self.may_see(predicted, "time_gap", event + 1):
            return True  # the time from an event to the next one is a feature of that one
        if self.task == "retrieval":
            return event < predicted or (event == predicted and kind == "time" and self.reads_request_time)
        if event == predicted or not self.candidates or not is_candidate:
            return event < predicted or (event == predicted and kind not in KNOWN_AFTER)
        groups = [(place - LENGTH + self.candidates) // self.group for place in (event, predicted)]
        has_token = kind not in KNOWN_AFTER or self.network.get("interleave_actions", True)
        return groups[0] == groups[1] and event < predicted and has_token


RELATIVE = {"position_encoding": ("relative_bias", "absolute")}
ONE_TOKEN = {"interleave_actions": False}
TRUNCATED = {"truncate_after_layer": 1, "truncate_to_items": 2}
TASKS = {
    "prediction_head_arch": [8],
    "eval_metrics": ("AUC",),
    "tasks": [
        RankingTaskArgs(label="liked", positive_values=["value 002"]),
        RankingTaskArgs(label="seconds", kind="regression"),
        RankingTaskArgs(label="watched", kind="class", num_classes=ACTIONS),
        RankingTaskArgs(label="action", kind="class", num_classes=ACTIONS),
    ],
}
LAYOUTS = {
    "ranking, two tokens": Layout("ranking"),
    "ranking, two tokens, relative bias": Layout("ranking", {**RELATIVE, "kernel_backend": "cutlass"}),
    "ranking, candidates": Layout("ranking", {"is_causal": False}, candidates=3),
    "ranking, candidates, one token": Layout("ranking", {**RELATIVE, **ONE_TOKEN}, candidates=3),
    "ranking, groups": Layout("ranking", candidates=4, group=2),
    "ranking, groups, one token": Layout("ranking", {**ONE_TOKEN, "kernel_backend": "cutlass"}, candidates=5, group=2),
    "ranking, tasks": Layout("ranking", task_args=TASKS),
    "ranking, tasks, candidates": Layout("ranking", candidates=3, task_args=TASKS),
    "ranking, tasks, candidates, one token": Layout("ranking", ONE_TOKEN, candidates=3, task_args=TASKS),
    "ranking, truncated": Layout("ranking", RELATIVE | TRUNCATED),
    "retrieval, truncated": Layout("retrieval", RELATIVE | TRUNCATED),
    "retrieval, two tokens, relative bias": Layout("retrieval", RELATIVE),
    "retrieval, one token, relative bias": Layout("retrieval", {**RELATIVE, **ONE_TOKEN}),
    "retrieval, no actions, last event": Layout("retrieval", RELATIVE, has_actions=False, query_time="last_event"),
}


def write_store(path: Path, kind: str = "", event: int = -1) -> SequenceStore:
    """Random events; the value ``kind`` of the event at place ``event`` of each user is another one.

    Each place has items of its own, so that a feature of the items at one place is that of no other event.
    """
    rng = np.random.default_rng(0)
    items = np.arange(LENGTH) * ITEMS_PER_EVENT + rng.integers(0, ITEMS_PER_EVENT, (USERS, LENGTH))
    events = {name: rng.integers(0, ACTIONS, (USERS, LENGTH)) for name in ("action", "device", "watched", "liked")}
    years = rng.integers(0, 5, ITEMS)
    genres = [rng.integers(0, 6, rng.integers(1, 4)).tolist() for _ in range(ITEMS)]
    vectors = rng.normal(5, 9, (ITEMS, 2))
    numbers = {name: rng.normal(5, 9, (USERS, LENGTH)) for name in ("load", "seconds")}
    times = 10**6 + np.arange(LENGTH) * 40_000 + rng.integers(0, 9_000, (USERS, LENGTH))
    at_place = slice(max(event, 0) * ITEMS_PER_EVENT, (event + 1) * ITEMS_PER_EVENT)
    if kind == "item":
        items[:, event] = at_place.start + (items[:, event] + 1) % ITEMS_PER_EVENT
    elif kind == "year":
        years[at_place] = (years[at_place] + 1) % 5
    elif kind == "genres":
        genres[at_place] = [[(code + 1) % 6 for code in codes] + [0] for codes in genres[at_place]]
    elif kind == "vector":
        vectors[at_place, 1] += 1
    elif kind in numbers:
        numbers[kind][:, event] = [np.nan, *numbers[kind][1:, event] + 1]
    elif kind == "time":
        times[:, event] += 11_000
    elif kind:
        events[kind][:, event] = (events[kind][:, event] + 1) % ACTIONS
    return write_small_store(
        path,
        items.tolist(),
        actions=events["action"].tolist(),
        timestamps=times.tolist(),
        context={"town": [0, 1, 2, 1]},
        item_features={"year": years.tolist(), "genres": genres},
        event_features={name: events[name].tolist() for name in ("device", "watched", "liked")},
        item_numbers={"vector": vectors},
        event_numbers={name: values.tolist() for name, values in numbers.items()},
        num_items=ITEMS,
        num_actions=ACTIONS,
    )


StoreWith = Callable[..., SequenceStore]


@pytest.fixture(scope="module")
def store_with(tmp_path_factory: pytest.TempPathFactory) -> StoreWith:
    """Factory of the stores of write_store, each written once."""
    folder = tmp_path_factory.mktemp("stores")

    @functools.cache
    def store_with(kind: str = "", event: int = -1) -> SequenceStore:
        return write_store(folder / f"{kind}{event}", kind, event)

    return store_with


def first_batch(config: RunConfig, mesh: Mesh, split: str = "train") -> HSTUBatch:
    source = open_source(config, mesh)
    return next(source.train_batches(START) if split == "train" else source.eval_batches("test"))


def training_queries(model: GRModel, config: RunConfig, mesh: Mesh) -> Tensor:
    """What finds each event of the training histories but the first: [users, events, width]."""
    seen: list[tuple[Tensor, JaggedLayout]] = []
    task = unwrap_dense(model).task
    assert isinstance(task, RetrievalDense)
    hook = task.encoder.register_forward_hook(lambda module, arguments, output: seen.append(output))
    batch = first_batch(config, mesh)
    model(batch)
    hook.remove()
    tokens, layout = seen[0]
    before = layout.newest_item_tokens(batch.num_labels, total=batch.num_labels_total) - 1
    return task.queries(tokens[before]).unflatten(0, (USERS, -1))


def predictions(model: GRModel, config: RunConfig, mesh: Mesh) -> Tensor:
    """What is predicted for the newest events, or what finds them: [users, events, width]."""
    if config.task == "ranking":
        batch = first_batch(config, mesh)
        logits = model(batch).logits
        assert logits is not None
        return logits.unflatten(0, (batch.real_batch_size, -1))
    held_out = model(first_batch(config, mesh, "test")).queries
    assert held_out is not None
    return torch.cat([training_queries(model, config, mesh), held_out[:USERS, None]], dim=1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("events", [(4, 6), pytest.param((0, 1, 2, 3, 5, 7), marks=pytest.mark.slow)])
def test_a_prediction_sees_what_comes_before_it_and_nothing_else(
    name: str, events: tuple[int, ...], store_with: StoreWith, mesh: Mesh, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    model = enlarge(build(layout.config(store_with(), tmp_path), mesh).state.model.eval())
    with torch.no_grad():
        plain = predictions(model, layout.config(store_with(), tmp_path), mesh)
        first = LENGTH - plain.shape[1]
        for kind in layout.kinds:
            for event in events:
                other = predictions(model, layout.config(store_with(kind, event), tmp_path), mesh)
                for predicted in range(first, LENGTH):
                    same = torch.equal(other[:, predicted - first], plain[:, predicted - first])
                    allowed = layout.may_see(predicted, kind, event)
                    assert same or allowed, f"the prediction of event {predicted} sees {kind} of event {event}"
                    nearest = event in (predicted, predicted - 1)
                    assert not (same and allowed and nearest), f"{kind} of event {event} is not shown to {predicted}"


@pytest.mark.parametrize("query_time", ["request", "last_event"])
@pytest.mark.parametrize("network", [RELATIVE, RELATIVE | ONE_TOKEN])
def test_an_item_is_found_in_evaluation_by_what_finds_it_in_training(
    query_time: str, network: dict[str, Any], store_with: StoreWith, mesh: Mesh, tmp_path: Path
) -> None:
    """The item before the last is one of training, and with valid_items = 1 that of validation."""
    config = Layout("retrieval", network, query_time=query_time).config(store_with(), tmp_path)
    config, evaluated = (
        replace(config, dataset=replace(config.dataset, shuffle=False, valid_items=valid_items))  # type: ignore[arg-type]
        for valid_items in (0, 1)
    )
    model = enlarge(build(config, mesh).state.model.eval())
    with torch.no_grad():
        trained = training_queries(model, config, mesh)[:, -1]
        found = model(next(open_source(evaluated, mesh).eval_batches("valid"))).queries
    assert found is not None
    torch.testing.assert_close(found[:USERS], trained, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["ranking", "retrieval"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_of(task: str, store: SequenceStore, tmp_path: Path, candidates: int = 0, **network: Any) -> RunConfig:
    network = {"disable_contextual_mask": None, **network}
    return tiny_config(task, store, tmp_path, network=network, dataset={"max_num_candidates": candidates})


def leaks(config: RunConfig, has_context: bool = True) -> list[str]:
    return [str(problem) for problem in label_leak(config, has_context)]


def test_masks_that_hide_labels_are_accepted_and_the_default_is_one(
    task: str, store: SequenceStore, tmp_path: Path
) -> None:
    for candidates, is_disabled in ((0, True), (1, False)):
        config = config_of(task, store, tmp_path, candidates)
        assert config.network.disable_contextual_mask is is_disabled and leaks(config) == []
        assert f"NetworkArgs.disable_contextual_mask = {is_disabled}" in config.operative_gin()
    seen = {"disable_contextual_mask": False}
    assert leaks(config_of(task, store, tmp_path, **seen), has_context=False) == [], "no context, nothing to pass on"
    assert leaks(config_of(task, store, tmp_path, **seen, num_layers=1)) == [], "one layer passes nothing on"
    for options in (seen, {"is_causal": False}):
        assert leaks(config_of("ranking", store, tmp_path, candidates=1, **options)) == [], "candidates are not seen"


def test_context_that_passes_later_items_on_is_refused_at_start_where_the_store_names_it(
    mesh: Mesh, store: SequenceStore, task: str, tmp_path: Path
) -> None:
    config = config_of(task, store, tmp_path, disable_contextual_mask=False)
    (said,) = leaks(config)
    assert said.startswith("NetworkArgs.disable_contextual_mask = False: ") and "from the second layer on" in said
    assert validate(config, 1, ALL_RULES) == []  # that the data has contextual features is not known yet
    with pytest.raises(ConfigError, match="from the second layer on, an item sees"):
        build(config, mesh)


@pytest.mark.parametrize(
    ("options", "sees_labels"),
    [
        ({}, False),
        ({"disable_contextual_mask": True}, False),
        ({"disable_contextual_mask": False}, True),
        ({"disable_contextual_mask": False, "num_layers": 1}, False),
        ({"is_causal": False}, True),
    ],
)
def test_what_is_said_is_true_of_the_model(
    mesh: Mesh,
    store: SequenceStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    sees_labels: bool,
) -> None:
    monkeypatch.setattr(builder, "check_masks", lambda *_: None)
    config = config_of("ranking", store, tmp_path, **options)
    assert bool(leaks(config)) == sees_labels
    trainer = build(config, mesh)
    model, batch = enlarge(trainer.state.model.eval(), 4), next(trainer.source.train_batches(SamplerPosition()))
    with torch.no_grad():
        before = model(batch).logits
        actions = batch.features["action"].values()
        actions[2] = (actions[2] + 1) % ACTIONS  # the label of the first user's third item
        changed = (model(batch).logits != before).any(dim=1)
    assert changed.any(), "items after it do see the action"
    assert not changed[:2].any() or sees_labels
    assert changed[2] == sees_labels
