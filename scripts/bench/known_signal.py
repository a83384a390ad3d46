"""Measure how much a ranking model finds of a signal that is known: generated data whose probabilities are given.

    python scripts/bench/known_signal.py --output DIR [--users 3000 --events 60 --epochs 10 --seed 1]

Users watch videos, and click, like and watch long. The probabilities depend on the user's taste for the category of the
video, on its author and duration, on the device and on the hour. No column has the taste: the age of a user hints at
it, and the history shows it. The last third of each user's events is the test split.

The tables are preprocessed and trained on by the scripts that users start. The AUC of the model on the test events is
compared with that of the probabilities from which they were drawn. The same arguments give the same tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from harness import ROOT, command_line

from hstu.data.preprocess import InteractionColumns
from hstu.train.metrics import auc

ACTIONS = ("click", "like", "long_view")
"""Bit t of the action is the label of task t."""
TASTES, CATEGORIES, AUTHORS, VIDEOS = 3, 6, 20, 200
DEVICES = {"phone": 0.6, "tablet": 0.0, "tv": -0.6}
"""Device → what it adds to the logits."""
DURATIONS_S = (7, 15, 30, 60, 120)
FEATURES = ["category", "author", "duration", "device", "hour_of_day"]
"""What the model is shown of a video and an event beside the video's id."""
_FIRST_DAY_S = 1_650_556_800
_TRAINED_ON = 2 / 3
_KNOWN_AGE = 0.5
"""Share of the users whose age is that of their taste; the others have any."""


def columns(folder: Path) -> InteractionColumns:
    """What the columns of the written tables mean."""
    return InteractionColumns(
        interactions=folder / "events.csv", user="user", item="video", action="action", time="at", split="split",
        context=folder / "users.csv", context_columns=("age",),
        items=folder / "videos.csv", item_columns=("category", "author", "duration"), event_columns=("device",),
    )  # fmt: skip


def write_tables(folder: Path, users: int, events: int, seed: int = 1) -> pd.DataFrame:
    """Write events.csv, users.csv and videos.csv with ``events`` events of each user.

    Returns the test events: one column of labels and one of probabilities, "p_click", for each action.
    """
    rng = np.random.default_rng(seed)
    videos = pd.DataFrame(
        {
            "video": [f"v-{number}" for number in range(VIDEOS)],
            "category": rng.integers(0, CATEGORIES, VIDEOS),
            "author": rng.integers(0, AUTHORS, VIDEOS),
            "duration": rng.choice(DURATIONS_S, VIDEOS),
        }
    )
    taste = rng.integers(0, TASTES, users)
    age = np.where(rng.random(users) < _KNOWN_AGE, taste, rng.integers(0, TASTES, users))
    user = np.repeat(np.arange(users), events)
    video = np.minimum((VIDEOS * rng.random(len(user)) ** 2).astype(int), VIDEOS - 1)  # some are popular
    at = _FIRST_DAY_S + rng.integers(60, 8 * 3600, (users, events)).cumsum(axis=1).reshape(-1)
    device = rng.choice(list(DEVICES), len(user))

    liking = rng.normal(0, 1.5, (TASTES, CATEGORIES))[taste[user], videos.category[video]]
    shown = liking + np.array([DEVICES[name] for name in device]) + np.sin(at // 3600 % 24 / 12 * np.pi)
    of_author = rng.normal(0, 1, AUTHORS)[videos.author[video]]
    logits = {
        "click": shown,
        "like": shown + of_author - 2,
        "long_view": shown - np.log(videos.duration[video].to_numpy() / 30),
    }
    table = pd.DataFrame({"user": user, "video": videos.video[video].to_numpy(), "at": at, "device": device})
    table["split"] = np.tile(np.where(np.arange(events) < round(_TRAINED_ON * events), "train", "test"), users)
    for name in ACTIONS:
        table[f"p_{name}"] = 1 / (1 + np.exp(-logits[name]))
        table[name] = (rng.random(len(user)) < table[f"p_{name}"]).astype(int)
    table["action"] = sum(table[name] * 2**bit for bit, name in enumerate(ACTIONS))

    folder.mkdir(parents=True, exist_ok=True)
    table[["user", "video", "action", "at", "device", "split"]].to_csv(folder / "events.csv", index=False)
    pd.DataFrame({"user": np.arange(users), "age": 20 + 10 * age}).to_csv(folder / "users.csv", index=False)
    videos.to_csv(folder / "videos.csv", index=False)
    return table[table.split == "test"]


def best_aucs(test: pd.DataFrame) -> dict[str, float]:
    """Action → AUC of its true probability on the test events."""
    return {name: auc(test[f"p_{name}"].to_numpy(), test[name].to_numpy() > 0) for name in ACTIONS}


def preprocess(folder: Path) -> None:
    """Make <folder>/store and its starter files, as a user does."""
    read = columns(folder)
    run("scripts/preprocess_dataset.py", "--dataset_name", "known", "--output", folder / "store",
        "--interactions", read.interactions, "--user", read.user, "--item", read.item, "--action", read.action,
        "--time", read.time, "--split", read.split, "--context", read.context,
        "--context_columns", ",".join(read.context_columns), "--items", read.items,
        "--item_columns", ",".join(read.item_columns), "--event_columns", ",".join(read.event_columns))  # fmt: skip


def train(folder: Path, epochs: int, bindings: Sequence[str] = ()) -> dict[str, float]:
    """Preprocess and train, as a user does, in ``folder``. Returns the AUC of each action on the test events."""
    preprocess(folder)
    options = [
        f"DatasetArgs.side_feature_names = {FEATURES}",
        "DatasetArgs.known_after = []",
        f"RankingArgs.prediction_head_arch = [64, {len(ACTIONS)}]",
        f"RankingArgs.num_tasks = {len(ACTIONS)}",
        'RankingArgs.eval_metrics = ("AUC",)',
        'TrainerArgs.best_metric = "AUC"',
        'TrainerArgs.best_metric_mode = "max"',
        f"TrainerArgs.num_train_epochs = {epochs}",
        f'TrainerArgs.ckpt_save_dir = "{folder / "checkpoints"}"',
        'LRScheduleArgs.schedule = "cosine"',
        "OptimizerArgs.learning_rate = 2e-3",
        f'TrainerArgs.output_dir = "{folder / "run"}"',
        *bindings,
    ]
    run("pretrain_gr_ranking.py", "--gin-config-file", folder / "store_ranking.gin",
        *(part for option in options for part in ("--gin-bindings", option)))  # fmt: skip
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record["metrics"] for record in records if record["kind"] == "eval"][-1]
    return {name: last[f"AUC/task{task}"] for task, name in enumerate(ACTIONS)}


def run(script: str, *arguments: object) -> None:
    """Run a script of the repository with this Python; its exit code must be 0."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True, cwd=ROOT)


def main() -> None:
    """Write, train, print."""
    add = (parser := command_line(__doc__)).add_argument
    add("--output", type=Path, required=True, help="new directory for the tables, the store and the run")
    add("--users", type=int, default=3000)
    add("--events", type=int, default=60, help="of each user")
    add("--epochs", type=int, default=10)
    add("--seed", type=int, default=1)
    add("--gin-bindings", nargs="*", default=[], help="further options of the run")
    options = parser.parse_args()
    folder = options.output.absolute()
    test = write_tables(folder, options.users, options.events, options.seed)
    found, best = train(folder, options.epochs, options.gin_bindings), best_aucs(test)
    print(f"\n{len(test):,} test events\n| action | AUC of the model | AUC of the true probability | difference |")
    print("|---|---|---|---|")
    for name in ACTIONS:
        print(f"| {name} | {found[name]:.4f} | {best[name]:.4f} | {best[name] - found[name]:.4f} |")


if __name__ == "__main__":
    main()
