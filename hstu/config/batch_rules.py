"""The rules of rules.py that are about how many sequences and tokens make a batch."""
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from hstu.config.args import BenchmarkDatasetArgs, DatasetArgs, NetworkArgs, TrainerArgs
from hstu.config.rule_engine import Problems, RuleBook, Run
from hstu.config.run_config import kind_of

rule = RuleBook()
advice = RuleBook()
"""Parts of the books of rules.py."""


def _items(dataset: Any) -> tuple[Any, int] | None:
    """Who says how many items the longest sequence has, and how many; None where a benchmark's item is undescribed."""
    if kind_of(dataset) is DatasetArgs:
        return dataset, dataset.max_sequence_length
    groups = (group for group in dataset.feature_args if dataset.item_feature_name in group.feature_names)
    group = next(groups, None)
    return None if group is None else (group, group.max_sequence_length)


def _tokens(run: Run, network: NetworkArgs, dataset: Any, items: int) -> int:
    """Tokens of the longest possible sequence, as far as the file alone tells; a store may add context and actions."""
    has_actions = bool(dataset.action_feature_name) or (
        dataset.action_feature_name is None and kind_of(dataset) is DatasetArgs and run.task == "ranking"
    )
    per_item = 2 if network.interleave_actions and has_actions else 1
    return items * per_item + len(dataset.contextual_feature_names or [])


@rule
def tokens_hold_the_longest_sequence(
    run: Run, trainer: TrainerArgs, network: NetworkArgs, dataset: DatasetArgs | BenchmarkDatasetArgs
) -> Problems:
    if trainer.tokens_per_rank is None or (found := _items(dataset)) is None:
        return
    owner, items = found
    tokens = _tokens(run, network, dataset, items)
    if trainer.tokens_per_rank < tokens:
        length = run.cite(owner, "max_sequence_length")
        text = f"less than the longest possible sequence, {tokens} tokens: set it to at least that, or lower {length}"
        yield run.problem(trainer, "tokens_per_rank", text)


@rule
def micro_batches_have_equal_counts(run: Run, trainer: TrainerArgs) -> Problems:
    if trainer.gradient_accumulation_steps > 1 and trainer.tokens_per_rank is not None:
        text = (
            f"micro-batches are equal counts of sequences, which cannot go with {run.cite(trainer, 'tokens_per_rank')}"
            "; drop one"
        )
        yield run.problem(trainer, "gradient_accumulation_steps", text)


@rule
def windows_meet(run: Run, dataset: DatasetArgs) -> Problems:
    if dataset.window_stride is not None and dataset.window_stride > dataset.max_sequence_length:
        length = run.cite(dataset, "max_sequence_length")
        yield run.problem(dataset, "window_stride", f"leaves items out between windows; at most {length}")


@rule
def lengths_are_known_to_the_plan(run: Run, trainer: TrainerArgs, dataset: DatasetArgs) -> Problems:
    if dataset.stochastic_length_alpha is None:
        return
    for name, is_set in (
        ("tokens_per_rank", trainer.tokens_per_rank is not None),
        ("enable_balanced_shuffler", trainer.enable_balanced_shuffler),
    ):
        if is_set:
            text = f"batches are planned by whole lengths, which cannot go with {run.cite(trainer, name)}; drop one"
            yield run.problem(dataset, "stochastic_length_alpha", text)


@advice
def tokens_have_a_say(run: Run, trainer: TrainerArgs, network: NetworkArgs, dataset: BenchmarkDatasetArgs) -> Problems:
    if trainer.tokens_per_rank is None or (found := _items(dataset)) is None:
        return
    most = trainer.train_batch_size * _tokens(run, network, dataset, found[1])
    if most <= trainer.tokens_per_rank:
        sequences = run.cite(trainer, "train_batch_size")
        text = f"never reached: {sequences}, which is the most sequences per rank, are at most {most} tokens; raise it"
        yield run.problem(trainer, "tokens_per_rank", text)


@advice
def lengths_differ_where_they_are_balanced(run: Run, trainer: TrainerArgs, dataset: BenchmarkDatasetArgs) -> Problems:
    found = _items(dataset)
    if trainer.enable_balanced_shuffler and found is not None and not found[0].is_jagged:
        text = f"nothing to balance: all sequences are equally long, {run.cite(found[0], 'is_jagged')}"
        yield run.problem(trainer, "enable_balanced_shuffler", text)
