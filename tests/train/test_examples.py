"""The files of configs/examples train, on a small shop that is made as docs/tutorials/a_shop.md says."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hstu.config.gin_io import read_and_check
from hstu.parallel.mesh import Mesh
from scripts.preprocess_dataset import main as preprocess
from tests.config.gin_files import ALL_RULES
from tests.conftest import REPOSITORY
from tests.scripts.test_pages import blocks
from tests.train.tiny import run

EXAMPLES = sorted((REPOSITORY / "configs" / "examples").glob("*.gin"))
TABLES = blocks((REPOSITORY / "docs" / "tutorials" / "a_shop.md").read_text(encoding="utf-8"), "bash")[0]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 80 shoppers."""
    place = tmp_path_factory.mktemp("shop")
    script = re.search(r"<<'SCRIPT'\n(.*?)^SCRIPT$", TABLES, re.MULTILINE | re.DOTALL)
    assert script
    smaller = script[1].replace("range(1500)", "range(80)")
    subprocess.run([sys.executable, "-c", smaller], cwd=place, check=True)
    columns = "--user shopper --item sku --action what --time at --event_columns device --item_columns category,price"
    files = [f"--{name}={place / file}.csv" for name, file in
             (("interactions", "events"), ("items", "items"), ("requests", "impressions"))]  # fmt: skip
    told = [*files, *columns.split(), "--numbers", "price", "--request", "request", "--output", str(place / "store")]
    assert preprocess(["--dataset_name", "shop", *told]) == 0
    return place / "store"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_trains(file: Path, shop: Path, mesh: Mesh, tmp_path: Path) -> None:
    bindings = [
        f"DatasetArgs.dataset_path = {str(shop)!r}",
        f"TrainerArgs.output_dir = {str(tmp_path / 'run')!r}",
        f"TrainerArgs.ckpt_save_dir = {str(tmp_path / 'checkpoints')!r}",
        "TrainerArgs.num_train_epochs = None",
        "TrainerArgs.max_train_iters = 12",
        "TrainerArgs.log_interval = 1",
        "TrainerArgs.train_batch_size = 16",
        "OptimizerArgs.learning_rate = 0.01",
    ]
    task = "ranking" if "ranking" in file.stem else "retrieval"
    config, warnings = read_and_check([str(file)], bindings, task, 1, ALL_RULES)  # type: ignore[arg-type]
    assert not warnings
    finished = run(config, mesh)
    assert np.mean(finished.losses[-3:]) < np.mean(finished.losses[:3])
    assert all(0 <= value <= 1 for value in finished.metrics.values())
