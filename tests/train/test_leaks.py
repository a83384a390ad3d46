"""Masks that show a model what it is to predict: the default is safe, others are refused, and both is true of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.config.rules import validate
from hstu.config.rules.task import label_leak
from hstu.config.run_config import RunConfig
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train import builder
from tests.config.gin_files import ALL_RULES
from tests.train.tiny import ACTIONS, build, enlarge, tiny_config


@pytest.fixture(params=["ranking", "retrieval"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_of(task: str, store: SequenceStore, tmp_path: Path, candidates: int = 0, **network: Any) -> RunConfig:
    network = {"disable_contextual_mask": None, **network}
    return tiny_config(task, store, tmp_path, network=network, dataset={"max_num_candidates": candidates})


def leaks(config: RunConfig, has_context: bool = True) -> list[str]:
    return [str(problem) for problem in label_leak(config, has_context)]


@pytest.mark.parametrize(("candidates", "is_disabled"), [(0, True), (1, False)])
def test_the_default_mask_hides_labels(
    task: str, candidates: int, is_disabled: bool, store: SequenceStore, tmp_path: Path
) -> None:
    config = config_of(task, store, tmp_path, candidates)
    assert config.network.disable_contextual_mask is is_disabled
    assert leaks(config) == []
    assert f"NetworkArgs.disable_contextual_mask = {is_disabled}" in config.operative_gin()


def test_causal_attention_without_context_shows_nothing(task: str, store: SequenceStore, tmp_path: Path) -> None:
    assert leaks(config_of(task, store, tmp_path, disable_contextual_mask=False), has_context=False) == []


def test_context_passes_later_items_on_from_the_second_layer_on(
    task: str, store: SequenceStore, tmp_path: Path
) -> None:
    (said,) = leaks(config_of(task, store, tmp_path, disable_contextual_mask=False))
    assert said.startswith("NetworkArgs.disable_contextual_mask = False: ") and "from the second layer on" in said
    assert leaks(config_of(task, store, tmp_path, disable_contextual_mask=False, num_layers=1)) == []


@pytest.mark.parametrize("options", [{"is_causal": False}, {"disable_contextual_mask": False}])
def test_candidates_are_safe(options: dict[str, Any], store: SequenceStore, tmp_path: Path) -> None:
    assert leaks(config_of("ranking", store, tmp_path, candidates=1, **options)) == []


def test_a_leaking_mask_is_refused_at_start_where_the_store_names_the_context(
    mesh: Mesh, store: SequenceStore, task: str, tmp_path: Path
) -> None:
    config = config_of(task, store, tmp_path, disable_contextual_mask=False)
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
