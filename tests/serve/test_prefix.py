"""Cached histories, appended events and scored candidates equal the forward of whole sequences."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.model.inputs import SequenceFeatures
from hstu.model.stack import SequenceEncoder
from hstu.serve.prefix import IncrementalEncoder, Prefix, PrefixCache
from tests.model.examples import Sample, Tables, make_batch, make_features, make_network, random_samples
from tests.serve.served import PUBLISHED

BOTH = ("absolute", "relative_bias")
PAGE = 4


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """No gradients, and one thread: for sequences this short, others only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@dataclass
class Model:
    """An encoder with tables, once as a whole and once with a cache."""

    encoder: SequenceEncoder
    tables: Tables
    incremental: IncrementalEncoder

    @property
    def features(self) -> SequenceFeatures:
        return self.encoder.features

    @property
    def cache(self) -> PrefixCache:
        return self.incremental.cache

    def prefix(self, key: int = 0) -> Prefix:
        """What the cache has of a history."""
        found = self.cache.find(key)
        assert found is not None
        return found

    def whole(self, sample: Sample) -> Tensor:
        """All tokens of one sequence."""
        batch = make_batch([sample], self.features)
        tokens: Tensor = self.encoder(self.tables(batch), batch)[0]
        return tokens

    def newest_of(self, samples: list[Sample]) -> Tensor:
        """The newest token of each sequence, by one whole forward."""
        batch = make_batch(samples, self.features)
        tokens, layout = self.encoder(self.tables(batch), batch)
        newest: Tensor = tokens[layout.seqlen_offsets[1:] - 1]
        return newest

    def candidates(self, sample: Sample) -> Tensor:
        """The tokens of the candidate items, by the whole forward."""
        per_item = self.features.tokens_per_item(self.encoder.network)
        return self.whole(sample)[-sample.candidates * per_item :: per_item]

    def encode(self, *samples: Sample) -> None:
        self.incremental.encode(range(len(samples)), make_batch([*samples], self.features))

    def score(self, sample: Sample, key: int = 0) -> Tensor:
        """The same by the cache, which has the history: the batch begins with one item of it."""
        batch = make_batch([newest(sample, sample.candidates + 1)], self.features)
        return self.incremental.score(self.prefix(key), batch)

    def append(self, sample: Sample, new_items: int, key: int = 0) -> Tensor:
        """The newest token, after the history ``sample``, all but the ``new_items`` newest of which is cached."""
        prefix = self.prefix(key)
        kept = self.incremental.kept_items(prefix, new_items)
        assert kept is not None
        count = len(sample.items) - kept
        assert count < new_items + 4, "appending is to compute little"
        tail = make_batch([newest(sample, min(count + 1, len(sample.items)))], self.features)
        return self.incremental.append(prefix, key, tail, count, kept)


def make_model(
    contextuals: int, cache_tokens: int = 200, page: int = PAGE, asks_for_next: bool = True, **network: Any
) -> Model:
    torch.manual_seed(3)
    features = replace(make_features(contextuals, max_items=40), asks_for_next=asks_for_next)
    args = make_network(**network)
    encoder, tables = SequenceEncoder(args, features).eval(), Tables(features, 8, 8)
    for name, weight in encoder.named_parameters():
        if "bias" in name or "uvqk" in name:
            torch.nn.init.normal_(weight, std=0.5)
    capacity = cache_tokens * args.num_layers * 2 * args.num_attention_heads * args.kv_channels * 4
    cache = PrefixCache(args, capacity_bytes=capacity, max_tokens=50, device=torch.device("cpu"), page_tokens=page)
    return Model(encoder, tables, IncrementalEncoder(encoder, cache, tables, candidates_at_once=3))


def newest(sample: Sample, count: int) -> Sample:
    return replace(sample, items=sample.items[-count:], actions=sample.actions[-count:], times=sample.times[-count:])


def until(sample: Sample, count: int) -> Sample:
    """The first ``count`` items, as history."""
    first = (values[:count] for values in (sample.items, sample.actions, sample.times))
    return replace(sample, candidates=0, labels=0, **dict(zip(("items", "actions", "times"), first, strict=True)))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


NETWORKS = [
    {"position_encoding": BOTH},
    {"position_encoding": BOTH, "interleave_actions": False},
    {"position_encoding": BOTH, "max_attention_span": (5, None, 3), "num_layers": 3},
    {"position_encoding": BOTH, "max_attention_span": 4, "min_full_attention_tokens": 3},
    {"position_encoding": "relative_bias", "scaling_seqlen": 7, "attention_scale": 1.0, "item_embedding_dim": 8},
    {"position_encoding": "none", **PUBLISHED},
]


@pytest.mark.parametrize("network", [*NETWORKS, {"is_causal": False, "position_encoding": BOTH}], ids=str)
@pytest.mark.parametrize("contextuals", [0, 2])
@pytest.mark.parametrize("group", [1, 2])
def test_candidates_score_as_in_the_whole_forward(network: dict[str, Any], contextuals: int, group: int) -> None:
    model = make_model(contextuals, target_group_size=group, **network)
    samples = random_samples([16, 9, 18], contextuals=contextuals, candidates=7)
    model.encode(*(until(sample, len(sample.items) - 7) for sample in samples))
    for key, sample in enumerate(samples):
        assert_equal(model.score(sample, key), model.candidates(sample))


@pytest.mark.parametrize("asks_for_next", [True, False])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("contextuals", [0, 2])
def test_events_appended_one_by_one_or_together_equal_the_whole_history(
    network: dict[str, Any], contextuals: int, asks_for_next: bool
) -> None:
    model = make_model(contextuals, disable_contextual_mask=True, asks_for_next=asks_for_next, **network)
    (sample,) = random_samples([16], contextuals=contextuals, candidates=4)
    history = until(sample, 12)
    whole = model.newest_of([until(sample, count) for count in range(1, 13)])
    for start, step in ((1, 1), (2, 5)):
        model.encode(until(sample, start))
        for count in range(start + step, 13, step):
            assert_equal(model.append(until(sample, count), step), whole[count - 1])
        assert_equal(model.score(sample), model.candidates(sample))
    prefix = model.prefix()
    assert_equal(model.incremental.newest(prefix, make_batch([newest(history, 3)], model.features)), whole[-1])
    assert_equal(model.score(sample), model.candidates(sample))  # what is asked later changes nothing


def test_a_long_append_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.serve.prefix.APPENDED_AT_ONCE", 5)
    model = make_model(1, disable_contextual_mask=True, position_encoding=BOTH, max_attention_span=6)
    (sample,) = random_samples([20], contextuals=1)
    model.encode(until(sample, 3))
    assert_equal(model.append(until(sample, 20), 17), model.whole(sample)[-1])


def test_the_newest_token_reads_when_it_is_asked() -> None:
    model = make_model(0, position_encoding=BOTH)
    (sample,) = random_samples([9], contextuals=0)
    model.encode(sample)
    prefix = model.prefix()
    found = []
    for at in (sample.times[-1] + 60, sample.times[-1] + 10**6):
        batch = make_batch([sample], model.features)
        batch.request_times = torch.tensor([at])
        tail = make_batch([newest(sample, 2)], model.features)
        tail.request_times = batch.request_times
        found.append(model.incremental.newest(prefix, tail))
        assert_equal(found[-1], model.encoder(model.tables(batch), batch)[0][-1])
    assert not found[0].allclose(found[1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_causal": False}, "is_causal = False"),
        ({"disable_contextual_mask": False}, "context sees the whole history"),
    ],
)
def test_says_why_a_history_is_encoded_again(changes: dict[str, Any], reason: str) -> None:
    model = make_model(1, **changes)
    model.encode(*random_samples([5], contextuals=1))
    assert model.incremental.kept_items(model.prefix(), 1) is None
    assert reason in str(model.incremental.reencodes_because)


def test_only_items_that_get_a_window_are_computed_again() -> None:
    model = make_model(0, max_attention_span=4, min_full_attention_tokens=6, interleave_actions=False)
    kept = []
    for length in (3, 9, 20):  # all see everything; some get a window that hides nothing; some lose what they saw
        model.encode(*random_samples([length], contextuals=0))
        kept.append(model.incremental.kept_items(model.prefix(), 1))
    assert kept == [3, 9, 14]


def test_a_cache_too_small_for_one_history_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds 10 pages of 1,024 bytes.*needs 13; give at least 13,312 bytes"):
        make_model(0, cache_tokens=42, num_layers=4)


def test_histories_that_do_not_fit_together_are_refused_and_nothing_stays() -> None:
    model = make_model(0, cache_tokens=60)
    with pytest.raises(ValueError, match="3 sequences of 96 tokens do not fit the cache together"):
        model.encode(*random_samples([16, 16, 16], contextuals=0))
    assert model.cache.statistics.users == 0 and model.cache.statistics.used_bytes == 0


def test_a_truncated_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="truncate_after_layer is not supported by incremental inference"):
        make_model(0, truncate_after_layer=1, truncate_to_items=4)


def test_bfloat16_rounds_as_the_whole_forward() -> None:
    model = make_model(0, dtype_str="bfloat16", position_encoding=BOTH)
    (sample,) = random_samples([16], contextuals=0, candidates=5)
    model.encode(until(sample, 11))
    torch.testing.assert_close(model.score(sample), model.candidates(sample), rtol=0.02, atol=0.02)
