"""Pages of the documentation, followed as a reader would: their commands, exactly as written or in small."""

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

SHOP, DATASETS, TASKS = (
    (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    for name in ("tutorials/a_shop.md", "datasets.md", "tasks.md")
)


def blocks(text: str, kind: str) -> list[str]:
    """The code blocks of one kind: "bash", "python" or "text"."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def written(page: str, name: str) -> str:
    """The text that a page writes to a file, as a here-document that ends with ``name``."""
    found = re.search(rf"<<'{name}'\n(.*?)^{name}$", page, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def follow(place: Path, commands: list[str]) -> str:
    """Run commands in ``place``, which then looks like a checkout. Returns what they print; each must succeed."""
    for name in ("hstu", "scripts", "pretrain_gr_ranking.py", "pretrain_gr_retrieval.py"):
        (place / name).symlink_to(REPOSITORY / name)
    told = ""
    for command in commands:
        script = f'set -e; PATH="{Path(sys.executable).parent}:$PATH"\n{command}'
        done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        told += done.stdout + done.stderr
    return told


def last(metric: str, told: str) -> float:
    return float(re.findall(rf"{re.escape(metric)} ([\d.]+)", told)[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shop_becomes_recommendations_and_a_server(tmp_path: Path) -> None:
    """docs/tutorials/a_shop.md"""
    commands = blocks(SHOP, "bash")
    told = follow(tmp_path, [command for command in commands if not re.match(r"python scripts/serve|curl", command)])
    for line in blocks(SHOP, "text")[1].splitlines()[:8]:
        assert line.replace("…/tmp_data/shop", "") in told.replace(f"{tmp_path}/tmp_data/shop", "")
    assert last("AUC/click", told) > 0.72 and last("HR@10", told) > 0.08
    assert re.search(r"0\.\d{3}  sku-\d{3}", told)
    assert "added to tmp_data/shop: 1550 events" in told
    assert (tmp_path / "exports" / "2026-02-24" / "serving" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_table_becomes_recommendations(tmp_path: Path) -> None:
    """docs/datasets.md, "Your own data, end to end"."""
    section = DATASETS[DATASETS.index("## Your own data, end to end") :]
    section = re.sub(r"## Object stores\n.*?(?=\n## )", "", section, flags=re.DOTALL)  # test_remote.py has some
    told = follow(tmp_path, blocks(section, "bash"))
    for line in (
        "users 400, items 200",
        "item sku, action stars, time bought_at, context user_id (400), town (3)",
        "every checksum and every value is right",
        "s-000",
    ):
        assert line in told
    assert re.search(r"A-\d{3}", told), "recommendations are in the shop's own ids"
    report = blocks(section, "text")[0].splitlines()[1]
    assert report.strip() in told, "the page shows what the command says"
    assert float(re.findall(r"HR@10[ =:]+([\d.]+)", told)[-1]) > 0.2, "popularity has about 0.05"
    assert float(re.findall(r"AUC ([\d.]+)  GAUC", told)[-1]) > 0.7, "what the feed has shown can be ranked"
    subprocess.run([sys.executable, "-c", blocks(section, "python")[0]], cwd=tmp_path, check=True)


def test_the_tasks_of_the_page_obey_all_rules(tmp_path: Path) -> None:
    file = write(tmp_path, changed(OWN_DATA, "-RankingArgs", written(TASKS, "GIN")))
    config, _ = read_and_check([file], (), "ranking", 1, ALL_RULES)
    assert isinstance(config.task_args, RankingArgs) and config.task_args.tasks is not None
    assert [task.kind for task in config.task_args.tasks] == ["binary", "regression", "regression"]


def command_of(script: str, place: Path) -> list[str]:
    """The command of docs/tasks.md that runs a script, as if ``place`` were the working directory."""
    command = re.search(rf"^python {re.escape(script)} (.*?)(?<!\\)$", TASKS, re.MULTILINE | re.DOTALL)
    assert command
    words = shlex.split(command[1].replace("\\\n", " "))
    return [
        str(REPOSITORY / script),
        *(re.sub(r"\b(views\.csv|tmp_data|runs)\b", rf"{place}/\1", word) for word in words),
    ]


@pytest.mark.slow
def test_clicks_stars_and_watch_times_are_learnt_as_the_page_says(tmp_path: Path) -> None:
    table = written(TASKS, "SCRIPT").replace("range(400)", "range(100)")
    subprocess.run([sys.executable, "-c", table], cwd=tmp_path, check=True)
    preprocess = command_of("scripts/preprocess_dataset.py", tmp_path)
    codes, told = run_script(*preprocess, "--output", tmp_path / "tmp_data" / "videos")
    assert codes == [0], told
    starter = (tmp_path / "tmp_data" / "videos_ranking.gin").read_text(encoding="utf-8")
    kept = [line for line in starter.splitlines() if not re.search("^RankingArgs|best_metric|early_stop", line)]
    gin = tmp_path / "tmp_data" / "videos_tasks.gin"
    gin.write_text("\n".join([*kept, written(TASKS, "GIN").replace("TrainerArgs.best_metric", "#")]), encoding="utf-8")

    quick = ["TrainerArgs.num_train_epochs = 12", "OptimizerArgs.learning_rate = 0.01"]
    train = [*command_of("pretrain_gr_ranking.py", tmp_path)[:-1], *quick, "TrainerArgs.ckpt_save_interval = -1"]
    codes, told = run_script(*train, "--validate-only")
    assert (codes, "OK: " in told) == ([0], True), told
    codes, told = run_script(*train)
    assert codes == [0], told
    metrics = read_metrics(tmp_path / "runs" / "videos" / "metrics.jsonl")[-1]["metrics"]
    assert set(metrics) == {*("AUC/click", "GAUC/click", "LOGLOSS/click", "MAE/stars", "AUC>=4/stars", "MAE/watch")}
    assert metrics["AUC/click"] > 0.7 and metrics["AUC>=4/stars"] > 0.9, metrics
