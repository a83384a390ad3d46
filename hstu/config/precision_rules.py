"""The rules of rules.py that are about number formats."""
# ruff: noqa: D103

from __future__ import annotations

from hstu.config.args import NetworkArgs, PrecisionArgs
from hstu.config.rule_engine import Problems, RuleBook, Run

rule = RuleBook()
"""Part of the book of rules.py."""


@rule
def scale_is_for_float16(run: Run, precision: PrecisionArgs, network: NetworkArgs) -> Problems:
    if precision.loss_scale is not None and network.dtype_str != "float16":
        text = f"is for float16, whose gradients vanish without, here {run.cite(network, 'dtype_str')}; remove it"
        yield run.problem(precision, "loss_scale", text)


@rule
def growth_is_for_a_dynamic_scale(run: Run, precision: PrecisionArgs, network: NetworkArgs) -> Problems:
    if precision.growth_interval == PrecisionArgs().growth_interval:
        return
    why = None
    if network.dtype_str != "float16":
        why = run.cite(network, "dtype_str")
    elif precision.loss_scale not in (None, "dynamic"):
        why = run.cite(precision, "loss_scale")
    if why is not None:
        text = f"is for float16 with loss_scale = 'dynamic' and has no effect with {why}; remove it"
        yield run.problem(precision, "growth_interval", text)


@rule
def gradients_can_be_sent_as_less(run: Run, precision: PrecisionArgs, network: NetworkArgs) -> Problems:
    if not precision.fp32_master_grads and network.dtype_str == "float32":
        text = f"sends gradients as dtype_str, which has no effect with {run.cite(network, 'dtype_str')}; remove it"
        yield run.problem(precision, "fp32_master_grads", text)
