import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.observe.plots import draw_curves, metric_curves, watched_curves


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pixels(image: Path) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return np.asarray(imread(image))


def losses(count: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "iter": 10 * (i + 1), "loss": 8 / (i + 1)} for i in range(count)]


def evaluations() -> list[dict[str, Any]]:
    return [
        {"kind": "eval", "iter": 100, "split": "valid", "metrics": {"HR@10": 0.1, "MRR": None}},
        {"kind": "eval", "iter": 200, "split": "valid", "metrics": {"HR@10": 0.2, "MRR": 0.1}},
        {"kind": "eval", "iter": 200, "split": "test", "metrics": {"HR@10": 0.15}},
    ]


def test_each_metric_has_a_panel_with_its_tasks_by_name_and_without_undefined_values() -> None:
    names = ("AUC", "AUC/task0", "AUC/task1", "NE")
    metrics = {**dict.fromkeys(names, 0.5), "MRR": None}
    records = [{"kind": "eval", "iter": 1, "split": "valid", "metrics": metrics}]
    points = [(1, 0.5)]
    assert metric_curves(records, ["click", "like"]) == {
        "AUC": {("valid", ""): points, ("valid", "click"): points, ("valid", "like"): points},
        "NE": {("valid", ""): points},
    }
    assert ("valid", "task1") in metric_curves(records)["AUC"]


def test_both_panels_show_something(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", losses(50) + evaluations())
    image = draw_curves(metrics, tmp_path / "curves.png")
    assert image == tmp_path / "curves.png"
    picture = pixels(image)[..., :3]
    assert picture.shape[0] >= 600
    assert picture.shape[1] >= 1500
    blue = (np.abs(picture - np.array([0, 0x72, 0xB2]) / 255) < 0.02).all(axis=-1)
    left, right = np.array_split(blue, 2, axis=1)
    assert left.sum() > 500
    assert right.sum() > 500
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []


@pytest.mark.parametrize("count", [3, 50])
def test_the_best_iteration_is_marked_and_the_legend_names_what_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    marked, legends = list[Any](), list[list[str]]()
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **_: marked.append(x))
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: legends.extend(a.get_legend_handles_labels()[1] for a in self.axes)
    )
    metrics = {"AUC/click": 0.7, "AUC/like": 0.6}
    records = [{"kind": "eval", "iter": 200, "split": "valid", "metrics": metrics}]
    several = [{**record, "loss/click": record["loss"] / 4, "loss/task1": None} for record in losses(count)]
    several[-1]["loss/task1"] = 0.25
    metrics_file = write(tmp_path / "metrics.jsonl", several + records)
    with contextlib.suppress(FileNotFoundError):  # nothing is saved
        draw_curves(metrics_file, tmp_path / "curves.png", ["click", "like"], best=200)
    assert marked == [200, 200]
    expected = [["click", "like", "sum"], ["click", "like"]]
    assert [[label.split()[0] for label in labels] for labels in legends] == expected


def test_gradient_norms_and_learning_rates_have_panels_if_there_is_something_to_see(tmp_path: Path) -> None:
    rates = [{"lr": 1.0, "lr/head": 2.0, "grad_norm": 3.0, "grad_norm_tables": 4.0}, {"lr": 0.5, "lr/head": 0.0}]
    records = [record | watched for record, watched in zip(losses(2), rates, strict=True)]
    assert watched_curves(records) == {
        "Learning rate": {"dense": [(10, 1.0), (20, 0.5)], "head": [(10, 2.0)]},
        "Gradient norm": {"dense": [(10, 3.0)], "tables": [(10, 4.0)]},
    }
    assert watched_curves([record | {"lr": 1.0} for record in losses(2)]) == {}
    image = draw_curves(write(tmp_path / "metrics.jsonl", records), tmp_path / "curves.png")
    assert image is not None and pixels(image).shape[0] > 1000, "two rows of panels"


@pytest.mark.parametrize("records", [losses(1), evaluations()])
def test_a_short_run_can_be_drawn_too(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    metrics = write(tmp_path / "metrics.jsonl", records)
    assert draw_curves(metrics, tmp_path / "curves.png") is not None


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    assert draw_curves(tmp_path / "absent.jsonl", tmp_path / "curves.png") is None
    undefined = write(tmp_path / "metrics.jsonl", [{"kind": "train", "iter": 1, "loss": None}])
    assert draw_curves(undefined, tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()
