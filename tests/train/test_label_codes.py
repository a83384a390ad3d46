"""Which class of a ranking head an action is."""

from types import SimpleNamespace
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import RankingArgs
from hstu.train.batch_source import label_offset


def source(actions: int, least: int = 0) -> Any:
    """Data whose actions are least, …, actions - 1."""
    roles = SimpleNamespace(action="stars")
    return SimpleNamespace(roles=roles, cardinalities={"stars": actions}, least_action=least)


def head(*widths: int, num_tasks: int = 1) -> RankingArgs:
    return RankingArgs(prediction_head_arch=list(widths), num_tasks=num_tasks)


@pytest.mark.parametrize(
    ("args", "data", "offset"),
    [
        (head(8, 5), source(6, least=1), 1),  # ratings 1 to 5, five classes
        (head(8, 6), source(6, least=1), 0),
        (head(8, 6), source(6, least=0), 0),
        (head(8, 9), source(6), 0),
        (head(8, 8, num_tasks=8), source(256), 0),  # bits
        (head(8, 1), source(2), 0),
        (head(8, 3, num_tasks=3), source(256), 0),
    ],
)
def test_class_0_is_action_0_unless_the_head_has_no_class_for_it(args: RankingArgs, data: Any, offset: int) -> None:
    assert label_offset(args, data) == offset


def test_a_head_with_too_few_classes_is_refused_with_those_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"ends in 4 classes, but 'stars' goes up to 5: end it in 5 .* or 6"):
        label_offset(head(8, 4), source(6, least=1))


def test_a_head_without_a_class_for_action_0_is_refused_where_the_data_has_it() -> None:
    with pytest.raises(ConfigError, match=r"serve the actions 1 to 5, but 'stars' also takes the value 0: end it in 6"):
        label_offset(head(8, 5), source(6, least=0))


def test_ranking_without_an_action_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranking needs an action feature"):
        label_offset(head(8, 5), SimpleNamespace(roles=SimpleNamespace(action=None)))  # type: ignore[arg-type]
