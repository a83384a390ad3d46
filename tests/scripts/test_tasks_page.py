"""docs/tasks.md: its table, its tasks and its commands, in small."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hstu.config.args import RankingArgs
from hstu.config.gin_io import read_and_check
from hstu.observe.records import read_metrics
from tests.config.gin_files import ALL_RULES, OWN_DATA, changed, write
from tests.conftest import REPOSITORY
from tests.distributed.launch import run_script

PAGE = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")


def written(name: str) -> str:
    """The text that the page writes to a file."""
    found = re.search(rf"<<'{name}'\n(.*?)^{name}$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def command_of(script: str, place: Path) -> list[str]:
    """The command of the page that runs a script, as if ``place`` were the working directory."""
    command = re.search(rf"^python {re.escape(script)} (.*?)(?<!\\)$", PAGE, re.MULTILINE | re.DOTALL)
    assert command
    words = shlex.split(command[1].replace("\\\n", " "))
    return [
        str(REPOSITORY / script),
        *(re.sub(r"\b(views\.csv|tmp_data|runs)\b", rf"{place}/\1", word) for word in words),
    ]


def test_the_tasks_of_the_page_obey_all_rules(tmp_path: Path) -> None:
    file = write(tmp_path, changed(OWN_DATA, "-RankingArgs", written("GIN")))
    config, _ = read_and_check([file], (), "ranking", 1, ALL_RULES)
    assert isinstance(config.task_args, RankingArgs) and config.task_args.tasks is not None
    assert [task.kind for task in config.task_args.tasks] == ["binary", "regression", "regression"]


@pytest.mark.slow
def test_clicks_stars_and_watch_times_are_learnt_as_the_page_says(tmp_path: Path) -> None:
    table = written("SCRIPT").replace("range(400)", "range(100)")
    subprocess.run([sys.executable, "-c", table], cwd=tmp_path, check=True)
    preprocess = command_of("scripts/preprocess_dataset.py", tmp_path)
    codes, told = run_script(*preprocess, "--output", tmp_path / "tmp_data" / "videos")
    assert codes == [0], told
    starter = (tmp_path / "tmp_data" / "videos_ranking.gin").read_text(encoding="utf-8")
    kept = [line for line in starter.splitlines() if not re.search("^RankingArgs|best_metric|early_stop", line)]
    gin = tmp_path / "tmp_data" / "videos_tasks.gin"
    gin.write_text("\n".join([*kept, written("GIN").replace("TrainerArgs.best_metric", "#")]), encoding="utf-8")

    quick = ["TrainerArgs.num_train_epochs = 12", "OptimizerArgs.learning_rate = 0.01"]
    train = [*command_of("pretrain_gr_ranking.py", tmp_path)[:-1], *quick, "TrainerArgs.ckpt_save_interval = -1"]
    codes, told = run_script(*train, "--validate-only")
    assert (codes, "OK: " in told) == ([0], True), told
    codes, told = run_script(*train)
    assert codes == [0], told
    metrics = read_metrics(tmp_path / "runs" / "videos" / "metrics.jsonl")[-1]["metrics"]
    assert set(metrics) == {
        *("AUC/click", "GAUC/click", "LOGLOSS/click", "MAE/stars", "AUC>=4/stars", "XAUC/watch", "MAE/watch")
    }
    assert metrics["AUC/click"] > 0.7 and metrics["AUC>=4/stars"] > 0.9, metrics
