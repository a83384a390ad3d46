"""Names of tensors in a checkpoint: ``model.<parameter>``, and what the optimizer keeps of a parameter.

``model.tables.<table>`` goes with ``optimizer.tables.<table>.<state>``, any other ``model.<parameter>`` with
``optimizer.dense.<parameter>.<state>``.
"""

from __future__ import annotations

WEIGHTS = "model."
TABLES = "model.tables."
IDS = "ids."
"""Raw ids of tables' rows, which describe the weights and are none."""
DYNAMIC = "dynamic."
"""Ids and rows of dynamic tables in an export; a checkpoint has files of its own for them."""
AVERAGE = "average"
"""The optimizer's state that is a weight, too: its moving average (OptimizerArgs.ema_decay)."""
_STATES = "optimizer."
_DENSE_STATES = "optimizer.dense."


def split(name: str) -> tuple[str, str]:
    """The weight that a tensor is or belongs to, and the optimizer's state that it is ("" for a weight)."""
    if not name.startswith(_STATES):
        return name, ""
    prefix = _DENSE_STATES if name.startswith(_DENSE_STATES) else _STATES
    parameter, _, state = name.removeprefix(prefix).rpartition(".")
    return f"{WEIGHTS}{parameter}", state


def join(weight: str, state: str) -> str:
    """Undo ``split``."""
    if not state:
        return weight
    prefix = _STATES if weight.startswith(TABLES) else _DENSE_STATES
    return f"{prefix}{weight.removeprefix(WEIGHTS)}.{state}"
