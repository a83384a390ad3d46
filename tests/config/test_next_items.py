"""RankingArgs.next_item_weight, and the RetrievalArgs that a ranking run reads with it."""

from pathlib import Path

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.config.gin_io import load, read_and_check
from tests.config.gin_files import ALL_RULES, BASES, write

WEIGHT = "RankingArgs.next_item_weight = 0.5"


def test_a_ranking_run_reads_how_next_items_are_learnt(tmp_path: Path) -> None:
    file = write(tmp_path, BASES["ranking"])
    config = load([file], [WEIGHT, "RetrievalArgs.temperature = 0.1"], "ranking")
    assert isinstance(config.task_args, RankingArgs)
    assert config.retrieval is config.next_item and config.next_item == RetrievalArgs(temperature=0.1)
    assert load([write(tmp_path, config.operative_gin(), "again.gin")], [], "ranking") == config
    assert load([file], [WEIGHT], "ranking").next_item == RetrievalArgs()
    assert read_and_check([file], [], "ranking", 1, ALL_RULES)[0].retrieval is None
    with pytest.raises(ConfigError, match=r"or set RankingArgs\.next_item_weight above 0"):
        load([file], ["RetrievalArgs.temperature = 0.1"], "ranking")


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            ["DatasetArgs.max_num_candidates = 2", "NetworkArgs.disable_contextual_mask = True"],
            "next_item_weight = 0.5: needs the items before an item, and DatasetArgs.max_num_candidates = 2",
        ),
        (['DatasetArgs.candidates = "requests"'], "and DatasetArgs.candidates = 'requests'"),
        (['RetrievalArgs.negatives = "uniform"'], r"num_negatives = -1 \(default\): must be above 0"),
        (["RetrievalArgs.shared_negatives = True"], "shared_negatives = True: has no effect with"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, bindings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_and_check([write(tmp_path, BASES["ranking"])], [WEIGHT, *bindings], "ranking", 1, ALL_RULES)


def test_options_of_an_evaluation_that_does_not_take_place_are_warnings(tmp_path: Path) -> None:
    bindings = [WEIGHT, "RetrievalArgs.filter_seen = False", "RetrievalArgs.eval_metrics = ('HR@3',)"]
    _, warnings = read_and_check([write(tmp_path, BASES["ranking"])], bindings, "ranking", 1, ALL_RULES)
    assert len([text for text in warnings if "a ranking run does not evaluate how it finds next items" in text]) == 2
