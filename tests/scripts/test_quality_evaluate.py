"""AUC by the number of earlier events, as the tables of quality report it for ranking."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from hstu import api
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.evaluation import evaluate_split
from scripts.quality import evaluate, ratings
from tests.train.conftest import mesh, store, undisturbed  # noqa: F401
from tests.train.tiny import run, tiny_config


def test_each_label_counts_in_the_part_of_its_place_in_the_sample(
    mesh: Mesh,  # noqa: F811
    store: SequenceStore,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ratings, "PARTS", {"1-3": (0, 3), "4+": (3, 99)})
    trainer = {"ckpt_save_interval": 1000}
    config = tiny_config("ranking", store, tmp_path, trainer=trainer, task_args={"eval_metrics": ("AUC>=2", "ACC")})
    trained = api.load(run(config, mesh).path, mesh=mesh)
    rows = []
    for batch in trained.batches("test"):
        logits = trained.forward(batch).logits
        assert logits is not None
        scores, at = logits.softmax(1)[:, 2:].sum(1).tolist(), 0
        for length in batch.item_lengths.tolist():
            rows += [(place, scores[at + place], int(batch.labels[at + place])) for place in range(length)]
            at += length
    expected = {}
    for part, here in (("1-3", [row for row in rows if row[0] < 3]), ("4+", [row for row in rows if row[0] >= 3])):
        liked, others = ([score for _, score, label in here if (label >= 2) == is_liked] for is_liked in (True, False))
        expected[f"AUC>=2, {part}"] = mannwhitneyu(liked, others).statistic / (len(liked) * len(others))
    assert evaluate.by_place(evaluate_split(trained, "test")) == pytest.approx(expected, abs=1e-6)
    assert len({*expected.values()}) == 2 and not np.isnan([*expected.values()]).any()


def test_retrieval_has_no_such_metric(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:  # noqa: F811
    config = tiny_config("retrieval", store, tmp_path, trainer={"ckpt_save_interval": 1000})
    assert evaluate.by_place(evaluate_split(api.load(run(config, mesh).path, mesh=mesh), "test")) == {}
