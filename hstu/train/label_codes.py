"""Maps the actions of the data to classes of a ranking head."""

from __future__ import annotations

from typing import Protocol

from hstu.base.errors import ConfigError
from hstu.config.args import RankingArgs
from hstu.config.problems import Cite, cite
from hstu.config.run_config import RunConfig
from hstu.data.features.roles import FeatureRoles
from hstu.data.features.values import LabelCodes, LabelFacts
from hstu.train.batch_source import BatchSource


def label_codes(config: RunConfig, source: BatchSource) -> tuple[LabelCodes, ...]:
    """The meaning of each ranking task's label values."""
    if not isinstance(config.task_args, RankingArgs):
        return ()
    if config.task_args.tasks is None:
        return (LabelCodes(label_offset(config.task_args, source, config.located)),)
    unknown = LabelFacts()  # without data there is no training
    return tuple(LabelCodes.of(task, source.label_facts.get(task.label, unknown)) for task in config.task_args.tasks)


class LabelledData(Protocol):
    """The part of BatchSource that label_offset reads."""

    @property
    def roles(self) -> FeatureRoles:
        """The features by role."""

    @property
    def cardinalities(self) -> dict[str, int]:
        """Ids of a feature are in [0, cardinality)."""

    @property
    def least_action(self) -> int:
        """The smallest action in the data."""


def label_offset(args: RankingArgs, data: LabelledData, cite: Cite = cite) -> int:
    """The action of class 0: 0 if the head has a class for every action from 0 on, 1 if it lacks one (ratings).

    Raises ConfigError, located by ``cite``, if an action of the data has no class in the head.
    """
    last, action = args.prediction_head_arch[-1], data.roles.action
    if action is None:
        raise ConfigError("ranking needs an action feature, and the data has none; name one or train retrieval")
    if last == args.num_tasks:
        return 0
    actions = data.cardinalities[action]
    if last < actions - 1:
        text = (
            f"ends in {last} classes, but {action!r} goes up to {actions - 1}: end it in {actions - 1} (values from 1 "
            f"on) or {actions} (from 0 on), or in num_tasks for bit tasks"
        )
        raise ConfigError(cite(args, "prediction_head_arch", text))
    if last >= actions:
        return 0
    if data.least_action == 0:
        text = (
            f"ends in {last} classes, which serve the actions 1 to {last}, but {action!r} also takes the value 0: end "
            f"it in {actions}"
        )
        raise ConfigError(cite(args, "prediction_head_arch", text))
    return 1
