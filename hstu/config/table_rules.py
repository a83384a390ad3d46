"""The rules of rules.py that are about tables which are given by hand."""
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from hstu.config.args import DynamicEmbeddingArgs, OptimizerArgs
from hstu.config.rule_engine import Problems, RuleBook, Run, each_once
from hstu.config.run_config import kind_of

rule = RuleBook()
"""Part of the book of rules.py."""


@rule
def tables_have_names_of_their_own(run: Run) -> Problems:
    yield from each_once(run, [(table, [getattr(table, "table_name", None)]) for table in run.tables], "table_name")


@rule
def features_have_one_table(run: Run) -> Problems:
    yield from each_once(run, [(table, getattr(table, "feature_names", [])) for table in run.tables], "feature_names")


@rule
def rows_with_one_moment_stay_whole(run: Run, optimizer: OptimizerArgs) -> Problems:
    for table in run.tables:
        part, given = _optimizer_of(table, optimizer)
        if (table.sharding_type, table.sharding, getattr(part, given)) == (
            "model_parallel",
            "column_wise",
            "rowwise_adagrad",
        ):
            text = (
                "each rank with some columns would have a moment of its own for a row, so that the result depends on "
                f"the number of ranks with {run.cite(part, given)}; use 'row_wise', 'table_wise' or 'auto', or "
                "the optimizer 'adagrad'"
            )
            yield run.problem(table, "sharding", text)


@rule
def moments_of_rows_are_for_sharded_tables(run: Run) -> Problems:
    for table in run.tables:
        if table.optimizer_str == "rowwise_adagrad" and table.sharding_type == "data_parallel":
            kind = run.cite(table, "sharding_type")
            yield run.problem(table, "optimizer_str", f"is for model_parallel tables, here {kind}; use 'adagrad'")


@rule
def kernels_are_for_sharded_tables(run: Run) -> Problems:
    for table in run.tables:
        if table.compute_kernel is not None and table.sharding_type == "data_parallel":
            kind = run.cite(table, "sharding_type")
            yield run.problem(table, "compute_kernel", f"is for model_parallel tables, here {kind}; remove it")
        elif table.compute_kernel is not None and kind_of(table) is DynamicEmbeddingArgs:
            text = "a dynamic table's follows from caching and the GPU memory that it may take; remove it"
            yield run.problem(table, "compute_kernel", text)


@rule
def dense_kernels_are_for_adam(run: Run, optimizer: OptimizerArgs) -> Problems:
    for table in run.tables:
        if table.compute_kernel == "dense" and table.sharding_type == "model_parallel":
            part, given = _optimizer_of(table, optimizer)
            if getattr(part, given) not in ("adam", "adamw"):
                text = f"is for adam and adamw, here {run.cite(part, given)}; use 'fused'"
                yield run.problem(table, "compute_kernel", text)


def _optimizer_of(table: Any, optimizer: OptimizerArgs) -> tuple[Any, str]:
    """The part and its parameter that say how a model_parallel table is trained."""
    if table.optimizer_str is not None:
        return table, "optimizer_str"
    return optimizer, "sparse_optimizer_str" if optimizer.sparse_optimizer_str is not None else "optimizer_str"
