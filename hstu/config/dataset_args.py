"""The options of the data: which, how it is split and how histories become samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from hstu.config.option import Args, option


@dataclass(frozen=True, kw_only=True)
class DatasetArgs(Args):
    """Which data, and how a user's history becomes samples."""

    dataset_name: str = option(not_empty=True)
    """ml-100k, ml-1m, ml-20m, kuairand-pure, kuairand-1k, kuairand-27k (tables predefined), or any other name for
    your own data in the sequence format, with EmbeddingArgs in the file."""
    max_sequence_length: int = option(minimum=1, aliases=("max_history_seqlen",))
    """Items kept of a user's history, the newest ones. Also accepted as max_history_seqlen."""
    dataset_path: Optional[str] = option(None)
    """Directory of the preprocessed data. None: tmp_data/<dataset_name>."""
    dynamic_tables: bool = option(False)
    """Built-in datasets: True: the predefined tables of items and users are dynamic (DynamicEmbeddingArgs), with room
    for every id."""
    max_num_candidates: int = option(0, minimum=0)
    """Ranking: this many of the newest items are candidates, scored without seeing one another. 0: none, every
    item is scored."""
    window_stride: Optional[int] = option(None, minimum=1)
    """Training: a history longer than max_sequence_length becomes several samples, windows of that length that end this
    many items before one another, back to its first item. A window is labelled on what no newer one is labelled on: its
    newest window_stride items, or max_num_candidates; the oldest window on all. None: the newest items alone."""
    stochastic_length_alpha: Optional[float] = option(None, above=0, maximum=2)
    """Training: of samples of n items, n > s = max_sequence_length ^ (alpha / 2), only the newest s are kept, with
    probability 1 - (s / n)^2, drawn anew each epoch (arXiv 2402.17152, "stochastic length"): less to compute, and fewer
    of the older labels. 2: nothing is left out. None: off."""
    shuffle: bool = option(False)
    """Reshuffle the users each epoch."""
    split: str = option("auto", choices=("auto", "leave_one_out", "user_holdout", "time"))
    """How training and evaluation are told apart. auto: leave_one_out for retrieval, user_holdout for ranking."""
    valid_items: int = option(1, choices=(0, 1))
    """leave_one_out: items before the last that are held out for validation. 0: the published protocol, train on
    all but the last item and evaluate on the last."""
    train_fraction: float = option(0.7, above=0, below=1)
    """user_holdout: share of users that are trained on; time: share of events before the cut."""
    eval_dataset_path: Optional[str] = option(None)
    """A second preprocessed directory to evaluate on, all of it (ranking)."""
    item_feature_name: Optional[str] = option(None)
    """Own data: the item feature. None: the store's."""
    action_feature_name: Optional[str] = option(None)
    """The action feature. None: the store's, if it has one. "": none, sequences of items alone (retrieval)."""
    contextual_feature_names: Optional[list[str]] = option(None)
    """The contextual features to use, in this order. None: all that the store has."""
