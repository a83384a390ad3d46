"""Ranks that were started with different configurations, code or data end at once and say in what they differ."""

import dataclasses
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.base import errors
from hstu.base.errors import ConfigError
from hstu.parallel.collectives import require_equal
from hstu.parallel.mesh import Mesh
from hstu.train import main
from hstu.train.main import run_facts, source_digest
from tests.conftest import write_small_store
from tests.distributed.launch import EndedRank, Launch, run_cases, run_to_their_ends
from tests.helpers import error_of
from tests.train.tiny import skip_measuring_the_peak, tiny_config, walks


def compare(mesh: Mesh, facts: list[dict[str, str]]) -> str:
    return error_of(lambda: require_equal(facts[mesh.rank], mesh.world_group, ConfigError), ConfigError)


def test_facts_are_compared_whatever_their_order_and_differences_name_both_sides() -> None:
    same = {"seed": "1", "rate": "0.1"}
    cases = {
        "equal": [same, {"rate": "0.1", "seed": "1"}, same],
        "two differ": [same, {"seed": "2", "rate": "0.1"}, {"seed": "1"}],
    }
    for rank in run_cases(3, {name: partial(compare, facts=facts) for name, facts in cases.items()}):
        assert rank["equal"] == "no error"
        lines = rank["two differ"].splitlines()
        assert lines[0] == "rank 0 and rank 1 would not train the same run; they differ in:"
        assert re.fullmatch(r"  seed = 1 on rank 0 \(\S+\), 2 on rank 1 \(\S+\)", lines[1])
        assert len(lines) == 3 and "the same code and the same data" in lines[2]


def start_unlike(stores: list[str], output: str, options: list[dict[str, Any]], tp: list[int]) -> None:
    """A run, as the entry scripts start it, that is another one on each rank."""
    torch.set_num_threads(1)
    skip_measuring_the_peak()
    errors._TIME_TO_REPORT_S = 0.0  # no launcher kills the ranks that report later
    rank = int(os.environ["RANK"])
    config = tiny_config("retrieval", stores[rank], output, **options[rank])
    parallel = dataclasses.replace(config.tensor_parallel, tensor_model_parallel_size=tp[rank])
    sys.exit(main.run(dataclasses.replace(config, tensor_parallel=parallel)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store, a copy of it at another place, and one with as many items that have other raw ids."""
    folder = tmp_path_factory.mktemp("stores")
    vocabularies = {"first": np.arange(11), "copy": np.arange(11), "other": np.arange(11) + 1}
    for name, ids in vocabularies.items():
        write_small_store(folder / name, **walks(), item_ids=ids.tolist())
    return {name: str(folder / name) for name in vocabularies}


def run(paths: list[str], output: Path, options: list[dict[str, Any]], tp: tuple[int, int] = (1, 1)) -> list[EndedRank]:
    return run_to_their_ends(Launch(2, 90), start_unlike, paths, str(output), options, list(tp))


def test_another_configuration_on_one_rank_ends_all(stores: dict[str, str], tmp_path: Path) -> None:
    others = {"trainer": {"seed": 7, "train_batch_size": 2}, "optimizer": {"learning_rate": 0.02}}
    ranks = run([stores["first"]] * 2, tmp_path, [{}, others], tp=(1, 2))
    assert [rank.exit_code for rank in ranks] == [2, 2]
    for name, first, second in (
        ("TrainerArgs.seed", "1234", "7"),
        ("TrainerArgs.train_batch_size", "8", "2"),
        ("OptimizerArgs.learning_rate", "0.01", "0.02"),
        ("TensorModelParallelArgs.tensor_model_parallel_size", "1", "2"),
    ):
        assert re.search(rf"  {re.escape(name)} = {first} on rank 0 \(\S+\), {second} on rank 1 ", ranks[0].output)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_of_equal_size_on_one_rank_ends_all(stores: dict[str, str], tmp_path: Path) -> None:
    ranks = run([stores["first"], stores["other"]], tmp_path, [{}, {}])
    assert [rank.exit_code for rank in ranks] == [3, 3]
    assert re.search(r"vocabulary\.item_id\S* of the data = \w{64} on rank 0 .*, \w{64} on rank 1", ranks[0].output)
    assert "sequence.item_id" not in ranks[0].output, "the codes are equal"


def test_the_code_is_among_what_is_compared(stores: dict[str, str], tmp_path: Path) -> None:
    facts, of_copy = (run_facts(tiny_config("ranking", stores[name], tmp_path)) for name in ("first", "copy"))
    assert facts == of_copy, "each host may have a copy of the data"
    assert facts["SHA-256 of the code in hstu"] == source_digest() and "version of torch" in facts
    for folder, text in (("a", "x = 1\n"), ("b", "x = 2\n"), ("c", "x = 1\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(text)
        (tmp_path / folder / "notes.txt").write_text(folder)
    assert source_digest(tmp_path / "a") == source_digest(tmp_path / "c") != source_digest(tmp_path / "b")
