"""Generated data whose probabilities are given: they are those of the labels, and a model finds them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY


@pytest.fixture
def known_signal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as if run from its directory."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    return import_module("known_signal")


def test_labels_are_drawn_from_the_given_probabilities(known_signal: Any, tmp_path: Path) -> None:
    test = known_signal.write_tables(tmp_path / "a", users=500, events=30)
    assert len(test) == 500 * 10
    for bit, name in enumerate(known_signal.ACTIONS):
        p, label = test[f"p_{name}"].to_numpy(), test[name].to_numpy()
        assert (label == test.action // 2**bit % 2).all()
        deviations = (label - p) / np.sqrt(p * (1 - p))
        for part in np.array_split(deviations[np.argsort(p)], 5):  # from unlikely to likely
            assert abs(part.mean()) * len(part) ** 0.5 < 4
    assert min(known_signal.best_aucs(test).values()) > 0.8

    known_signal.write_tables(tmp_path / "b", users=500, events=30)
    written = [sorted((tmp_path / folder).iterdir()) for folder in "ab"]
    assert [file.name for file in written[0]] == ["events.csv", "users.csv", "videos.csv"]
    assert [file.read_bytes() for file in written[0]] == [file.read_bytes() for file in written[1]]


@pytest.mark.slow
def test_a_model_ranks_as_well_as_the_probabilities_do(known_signal: Any, tmp_path: Path) -> None:
    test = known_signal.write_tables(tmp_path, users=3000, events=60)
    found, best = known_signal.train(tmp_path, epochs=10), known_signal.best_aucs(test)
    assert {name: best[name] - found[name] < 0.005 for name in best} == dict.fromkeys(best, True), (found, best)
