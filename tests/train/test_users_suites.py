"""A suite of users' gin files, whose runs share a directory of checkpoints: each file trains, and trains again.

HSTU_PEER_GIN_FILES names a directory of such files, as NVIDIA's examples publish them; tests/config/users has
imitations.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.config.args import DatasetArgs
from hstu.config.gin_io import load
from hstu.config.rules import validate
from hstu.data.datasets import DATASETS, resolve_name
from hstu.data.datasets.spec import Schema
from hstu.parallel.mesh import Mesh
from tests.config.gin_files import ALL_RULES, write
from tests.config.test_users_files import FILES, task_of
from tests.conftest import write_small_store
from tests.train.tiny import run

PEERS = sorted(Path(os.environ.get("HSTU_PEER_GIN_FILES", "/nowhere")).glob("*.gin"))
SMALL = (
    "NetworkArgs.num_layers = 1", "NetworkArgs.hidden_size = 16", "NetworkArgs.num_attention_heads = 2",
    "NetworkArgs.kv_channels = 8", "NetworkArgs.dtype_str = 'float32'", "TrainerArgs.train_batch_size = 2",
    "TrainerArgs.eval_batch_size = 20", "TrainerArgs.max_train_iters = 2", "TrainerArgs.max_eval_iters = 1",
)  # fmt: skip


def write_data(dataset_name: str) -> None:
    """A few users with the features of the data set, where a run without dataset_path looks for it."""
    name = resolve_name(dataset_name) or dataset_name
    own = Schema(item="ad", action="clicked", context=("site",), action_cardinality=2)
    schema = DATASETS[name].schema if name in DATASETS else own
    items = [[(user + place) % 11 for place in range(30)] for user in range(20)]
    actions = [[37 * item % (schema.action_cardinality or 2) for item in row] for row in items]  # all bits of 256
    write_small_store(
        Path("tmp_data") / name, items, name=name, actions=actions, num_actions=schema.action_cardinality,
        item_feature=schema.item, action_feature=schema.action or "", context=dict.fromkeys(schema.context, range(20)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [pytest.param(FILES, id="imitations"), pytest.param(PEERS, id="peers", marks=pytest.mark.skipif(
        not PEERS, reason="HSTU_PEER_GIN_FILES names no directory with gin files of another trainer"))],
)  # fmt: skip
def test_each_file_of_a_suite_runs_twice(
    files: list[Path], mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        text = re.sub(r"(?<![.\d])(?!9{9}\b)\d{4,}\b", "1000", file.read_text())  # sizes that a test can hold
        for number in range(2):
            config = load([write(tmp_path, text)], SMALL, task_of(file))
            validate(config, world_size=1, rules=ALL_RULES)
            if isinstance(dataset := config.dataset, DatasetArgs):
                config = replace(config, dataset=replace(dataset, dataset_path=None))
                if not number:
                    write_data(dataset.dataset_name)
            if config.trainer.saves_checkpoints:
                own = replace(config.trainer, ckpt_save_dir=f"{file.stem}_{number}")
                config = replace(config, trainer=own)
            finished = run(config, mesh)
            assert finished.losses and np.isfinite(finished.losses).all(), file
            assert finished.summary["status"] == "done" and None not in finished.metrics.values(), file
    assert not Path("checkpoints").exists()
