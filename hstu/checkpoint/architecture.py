"""What of two configurations makes two models: the lines of their operative.gin that differ."""

from __future__ import annotations

from dataclasses import dataclass

from hstu.config.gin_scan import scan

_COMPUTED_OTHERWISE = {
    "hidden_dropout",
    "input_dropout",
    "dtype_str",
    "kernel_backend",
    "strict_kernel_backend",
    "compile",
    "recompute_input_layernorm",
    "recompute_input_silu",
    "recompute_layer",
    "sequence_parallel",
}
"""Parameters of NetworkArgs with which the weights mean the same."""
_HEAD = {"prediction_head_arch", "prediction_head_act_type", "prediction_head_bias", "num_tasks"}
_TABLES = {"EmbeddingArgs", "DynamicEmbeddingArgs"}
_DATA = {"dataset_name", "dataset_path"}
_OPTIMIZERS = {"OptimizerArgs", "PartOptimizerArgs"}
_OPTIMIZER = {"optimizer_str", "sparse_optimizer_str", "momentum", "part_optimizers", "regex"}


@dataclass(frozen=True)
class Difference:
    """A parameter that two configurations give different values; None: it is not there."""

    name: str
    """As in gin, with its scope."""
    stored: str | None
    own: str | None

    def __str__(self) -> str:
        stored, own = ("nothing" if value is None else value for value in (self.stored, self.own))
        return f"{self.name} = {stored} in the checkpoint, {own} in this run"

    @property
    def is_of_network(self) -> bool:
        """With another value the same weights compute something else, whatever their sizes."""
        owner, parameter = self._owner_and_parameter
        return (owner == "NetworkArgs" and parameter not in _COMPUTED_OTHERWISE) or (
            owner == "RankingArgs" and parameter in _HEAD
        )

    @property
    def shapes_tensors(self) -> bool:
        """Another value may mean other tensors: a reason to show it where tensors do not fit."""
        owner, parameter = self._owner_and_parameter
        return (
            self.is_of_network
            or owner in _TABLES
            or (owner == "DatasetArgs" and parameter in _DATA)
            or (owner in _OPTIMIZERS and parameter in _OPTIMIZER)
        )

    @property
    def _owner_and_parameter(self) -> tuple[str, str]:
        owner, _, parameter = self.name.rpartition(".")
        return owner.rpartition("/")[2], parameter


def differences(stored: str, own: str) -> list[Difference]:
    """The parameters that differ between two texts of operative.gin, in the order of the first."""
    theirs, ours = _values(stored), _values(own)
    names = dict.fromkeys([*theirs, *ours])
    return [Difference(name, theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)]


def _values(text: str) -> dict[str, str]:
    return {binding.name: repr(binding.value) for binding in scan([], [text]).bindings}
