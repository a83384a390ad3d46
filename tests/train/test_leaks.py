"""When a mask shows a model what it is to predict: what ``label_leak`` says, and that it is true of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config.args import NetworkArgs
from hstu.data.collate import FeatureRoles
from hstu.data.sampler import SamplerPosition
from hstu.data.store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.train.builder import label_leak
from tests.train.tiny import ACTIONS, NETWORK, build, tiny_config

WITH_CONTEXT, ITEMS_ALONE = FeatureRoles("item", "action", ("town",)), FeatureRoles("item", "action", ())


def network(**options: Any) -> NetworkArgs:
    return NetworkArgs(**{**NETWORK, **options})


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_causal_attention_without_context_shows_nothing(task: Any) -> None:
    assert label_leak(task, network(disable_contextual_mask=False), ITEMS_ALONE, 0) is None


@pytest.mark.parametrize(
    ("task", "what", "remedy"),
    [
        ("ranking", "its own action", "set is_causal = True or DatasetArgs.max_num_candidates > 0"),
        ("retrieval", "the next item", "set is_causal = True"),
    ],
)
def test_attention_to_later_items_shows_labels(task: Any, what: str, remedy: str) -> None:
    said = label_leak(task, network(is_causal=False), ITEMS_ALONE, 0)
    assert said is not None and what in said and said.endswith(remedy)


def test_context_passes_later_items_on_from_the_second_layer_on() -> None:
    said = label_leak("retrieval", network(disable_contextual_mask=False), WITH_CONTEXT, 0)
    assert said is not None and "through the context; set NetworkArgs.disable_contextual_mask = True" in said
    assert label_leak("retrieval", network(disable_contextual_mask=False, num_layers=1), WITH_CONTEXT, 0) is None
    assert label_leak("retrieval", network(disable_contextual_mask=True), WITH_CONTEXT, 0) is None


@pytest.mark.parametrize("options", [{"is_causal": False}, {"disable_contextual_mask": False}])
def test_candidates_are_safe(options: dict[str, Any]) -> None:
    assert label_leak("ranking", network(**options), WITH_CONTEXT, max_num_candidates=1) is None


@pytest.mark.parametrize(
    ("options", "sees_labels"),
    [
        ({"disable_contextual_mask": True}, False),
        ({"disable_contextual_mask": False}, True),
        ({"disable_contextual_mask": False, "num_layers": 1}, False),
        ({"disable_contextual_mask": True, "is_causal": False}, True),
    ],
)
def test_what_is_said_is_true_of_the_model(
    mesh: Mesh,
    store: SequenceStore,
    tmp_path: Path,
    warnings_of_hstu: pytest.LogCaptureFixture,
    options: dict[str, Any],
    sees_labels: bool,
) -> None:
    trainer = build(tiny_config("ranking", store, tmp_path, network=options), mesh)
    assert ("losses and metrics will look better than they are" in warnings_of_hstu.text) == sees_labels
    model, batch = trainer.state.model.eval(), next(trainer.source.train_batches(SamplerPosition()))
    with torch.no_grad():
        for parameter in model.dense.parameters():
            parameter.mul_(4)  # so that what one token does to another is not lost in rounding
        before = model(batch).logits
        actions = batch.features["action"].values()
        actions[2] = (actions[2] + 1) % ACTIONS  # the label of the first user's third item
        changed = (model(batch).logits != before).any(dim=1)
    assert changed.any(), "items after it do see the action"
    assert not changed[:2].any() or sees_labels
    assert changed[2] == sees_labels
