"""Encode a history once, append events to it, and score candidates against it, with the results of a full forward.

An HSTU layer reads earlier tokens only through their keys and values. A least-recently-used cache keeps these in pages
of a fixed amount of memory, so that only new tokens are computed. Source: M-FALCON, arXiv 2402.17152, sec. 3.4.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import run_offsets
from hstu.model.stack import DTYPES, SequenceEncoder, mixed_precision
from hstu.ops.kernels import AttentionInputs
from hstu.ops.layout import JaggedLayout, token_order, with_tokens
from hstu.ops.pytorch.prefix_attention import CachedPrefix, prefix_attention

APPENDED_AT_ONCE = 256
"""History tokens per pass. Each needs one attention score per prefix token, so this bounds the memory."""


@dataclass
class Prefix:
    """The cached context and history tokens of one sequence."""

    pages: list[int]
    """Page numbers in token order."""
    num_tokens: int = 0
    """Tokens whose keys and values are in the pages."""
    times: Tensor | None = None
    """int64 [num_tokens], in seconds. None: the network has no relative bias."""

    def cut(self, num_tokens: int) -> None:
        """Keep only the first ``num_tokens`` tokens."""
        self.num_tokens = num_tokens
        self.times = None if self.times is None else self.times[:num_tokens]


@dataclass
class CacheStatistics:
    """Memory use and counters of a cache."""

    capacity_bytes: int
    """Bytes of all pages. Apart from the pages, only token times grow with the histories."""
    used_bytes: int = 0
    users: int = 0
    """Sequences in the cache."""
    evictions: int = 0
    """Sequences removed to free their pages."""
    hits: int = 0
    """Session requests whose history was in the cache."""
    misses: int = 0
    """Session requests whose history had to be encoded first."""
    encoded_tokens: int = 0
    """Tokens computed by encoding whole histories."""


class PrefixCache:
    """Maps hashable keys to sequences in pages [L, 2, H, page_tokens, d] of keys and values of all layers.

    All memory is allocated at once. When no page is free, the least recently used sequence loses all of its pages.
    Not thread-safe. Raises ConfigError if a sequence of ``max_tokens`` does not fit.

    Args:
        max_tokens: context and history tokens of the longest sequence.
        page_tokens: tokens per page. Large pages waste half a page per sequence; small pages need more calls.
    """

    def __init__(
        self,
        network: NetworkArgs,
        *,
        capacity_bytes: int,
        max_tokens: int,
        device: torch.device,
        page_tokens: int = 128,
    ) -> None:
        self.page_tokens = page_tokens
        shape = (network.num_layers, 2, network.num_attention_heads, page_tokens, network.kv_channels)
        dtype = DTYPES[network.dtype_str]
        self.page_bytes = torch.Size(shape).numel() * dtype.itemsize
        num_pages, needed = capacity_bytes // self.page_bytes, self._pages_for(max_tokens)
        if num_pages < needed:
            raise ConfigError(
                f"cache_bytes = {capacity_bytes:,} holds {num_pages} pages of {self.page_bytes:,} bytes, and a history "
                f"of {max_tokens:,} tokens needs {needed}; give at least {needed * self.page_bytes:,} bytes"
            )
        self._pool = torch.empty(num_pages, *shape, dtype=dtype, device=device)
        self._free = list(range(num_pages))
        self._prefixes: OrderedDict[Hashable, Prefix] = OrderedDict()
        self._counts = CacheStatistics(num_pages * self.page_bytes)

    @property
    def statistics(self) -> CacheStatistics:
        """Current memory use, and counts since the cache was created."""
        self._counts.users = len(self._prefixes)
        self._counts.used_bytes = (len(self._pool) - len(self._free)) * self.page_bytes
        return self._counts

    def find(self, key: Hashable) -> Prefix | None:
        """Fetch a prefix and mark it as most recently used. None: the key is not in the cache."""
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
        return self._prefixes.get(key)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of these numbers of tokens fit the cache together."""
        return sum(map(self._pages_for, lengths)) <= len(self._pool)

    def reserve(self, lengths: dict[Hashable, int]) -> list[Prefix]:
        """Reserve pages for key → number of tokens, evicting other keys. Raises ValueError if the keys do not fit."""
        if not self.fits([*lengths.values()]):
            raise ValueError(
                f"{len(lengths)} sequences of {sum(lengths.values())} tokens do not fit the cache together"
            )
        for key in lengths:
            self._prefixes.setdefault(key, Prefix([]))
            self._prefixes.move_to_end(key)
        for key, tokens in lengths.items():
            pages, count = self._prefixes[key].pages, self._pages_for(tokens)
            self._free += pages[count:]
            del pages[count:]
            while len(self._free) < count - len(pages):
                self.drop(next(oldest for oldest in self._prefixes if oldest not in lengths))
                self._counts.evictions += 1
            pages += [self._free.pop() for _ in range(count - len(pages))]
        return [self._prefixes[key] for key in lengths]

    def drop(self, key: Hashable) -> None:
        """Remove a sequence if it is in the cache."""
        if key in self._prefixes:
            self._free += self._prefixes.pop(key).pages

    @contextmanager
    def dropped_on_error(self, keys: Iterable[Hashable]) -> Iterator[None]:
        """Remove the sequences if the block raises, because only some of their layers or events may be updated."""
        try:
            yield
        except BaseException:
            for key in keys:
                self.drop(key)
            raise

    def write(self, prefix: Prefix, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [n, H, d], of any strides and dtype, to reserved pages from token ``first`` on."""
        done, count = 0, len(keys)
        while done < count:
            page, place = divmod(first + done, self.page_tokens)
            stop = min(done + self.page_tokens - place, count)
            for target, source in zip(self._pool[prefix.pages[page], layer], (keys, values), strict=True):
                target[:, place : place + stop - done] = source[done:stop].transpose(0, 1)
            done = stop

    def pages(self, prefix: Prefix, layer: int) -> list[tuple[Tensor, Tensor]]:
        """The (keys, values) of a prefix in one layer, [H, b, d] each, per page."""
        whole, rest = divmod(prefix.num_tokens, self.page_tokens)
        found = [self._pool[page, layer].unbind() for page in prefix.pages[: whole + bool(rest)]]
        return [
            (keys, values) if number < whole else (keys[:, :rest], values[:, :rest])
            for number, (keys, values) in enumerate(found)
        ]

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)


class IncrementalEncoder:
    """A sequence encoder that caches histories under hashable keys. Call it in evaluation mode without gradients.

    Results equal ``encoder`` on the whole sequence, except for the order of floating-point sums. Batches may begin with
    context and earlier items before the new ones. Raises ConfigError if the network truncates histories.

    Args:
        encoder: an encoder without tensor or context parallelism. ``cache`` is for its network.
        embeddings_of: batch → table rows of its features, as the encoder reads them.
        candidates_at_once: items per micro-batch, rounded up to whole groups.
    """

    def __init__(
        self,
        encoder: SequenceEncoder,
        cache: PrefixCache,
        embeddings_of: Callable[[HSTUBatch], dict[str, Tensor]],
        candidates_at_once: int = 256,
    ) -> None:
        if encoder.network.truncate_after_layer is not None:
            raise ConfigError(
                "NetworkArgs.truncate_after_layer is not supported by incremental inference: in the later layers each "
                "event moves the place where histories are cut; use TrainedModel.forward, or train without truncation"
            )
        self.encoder, self.cache = encoder, cache
        self._embeddings_of = embeddings_of
        self._per_item = encoder.features.tokens_per_item(encoder.network)
        group = encoder.network.target_group_size
        self._items_at_once = -(-candidates_at_once // group) * group
        self.reencodes_because: str | None = None
        """Why a new event changes the cached values of earlier events. None: it does not."""
        if not encoder.network.is_causal:
            self.reencodes_because = "NetworkArgs.is_causal = False: events see later ones"
        elif encoder.features.contextual and not encoder.network.disable_contextual_mask:
            self.reencodes_because = (
                "NetworkArgs.disable_contextual_mask = False: context sees the whole history, which sees the context"
            )

    def encode(self, keys: Sequence[Hashable], batch: HSTUBatch) -> None:
        """Encode and cache histories without candidates under ``keys``. Raises ValueError if they do not fit."""
        layout = self.encoder.inputs.layout(batch)
        if len({*keys}) != batch.real_batch_size or layout.num_candidate_tokens is not None:
            raise ValueError(f"{len({*keys})} keys for {batch.real_batch_size} sequences, or there are candidates")
        offsets = run_offsets(layout.seqlens)[: len(keys) + 1].tolist()
        runs = [slice(*pair) for pair in pairwise(offsets)]

        def attend_and_keep(layer: int, inputs: AttentionInputs) -> Tensor:
            for prefix, run in zip(prefixes, runs, strict=True):
                self.cache.write(prefix, layer, 0, inputs.k[run], inputs.v[run])
            return self.encoder.inputs.kernels.attention.forward(inputs)

        with self.cache.dropped_on_error(keys):
            for key in keys:
                self.cache.drop(key)
            prefixes = self.cache.reserve({key: run.stop - run.start for key, run in zip(keys, runs, strict=True)})
            self._run_layers(self._content(batch, layout), layout, attend_and_keep)
            for prefix, run in zip(prefixes, runs, strict=True):
                prefix.num_tokens = run.stop - run.start
                prefix.times = None if layout.token_times is None else layout.token_times[run].clone()
        self.cache.statistics.encoded_tokens += layout.num_tokens

    def kept_items(self, prefix: Prefix, new_items: int) -> int | None:
        """The number of cached items that stay valid when ``new_items`` follow. None: encode the whole history.

        Later cached items must be recomputed with the new ones: the newest item if the relative bias reads the time of
        the next event, and with min_full_attention_tokens the items whose attention becomes limited to a window.
        """
        if self.reencodes_because is not None:
            return None
        features, network = self.encoder.features, self.encoder.network
        context, per_item = len(features.contextual), self._per_item
        stable = prefix.num_tokens
        if network.needs_times and features.asks_for_next:
            stable -= 1
        spans = [span for span in network.attention_spans if span is not None]
        if spans and network.min_full_attention_tokens:
            first_limited = max(prefix.num_tokens - network.min_full_attention_tokens, context + min(spans) + 1)
            if first_limited < prefix.num_tokens + new_items * per_item - network.min_full_attention_tokens:
                stable = min(stable, first_limited)
        return (stable - context) // per_item

    def append(self, prefix: Prefix, key: Hashable, batch: HSTUBatch, count: int, kept: int) -> Tensor:
        """Append the newest ``count`` items of ``batch`` to ``kept`` cached items. Returns the newest token, [D]."""
        tokens = None
        with self.cache.dropped_on_error([key]):
            prefix.cut(tokens_of(self.encoder, kept))
            self.cache.reserve({key: prefix.num_tokens + count * self._per_item})
            x, layout = self._newest(batch, count)
            end = prefix.num_tokens + len(x)
            for rows in _runs_of(len(x), APPENDED_AT_ONCE):
                part = _part(layout, rows, prefix.num_tokens, end)
                tokens = self._extend(prefix, x[rows], part, end, keep=True)
        assert tokens is not None, "count is at least 1"
        return tokens[-1]

    def newest(self, prefix: Prefix, batch: HSTUBatch) -> Tensor:
        """Compute the newest token, float32 [D], of a history at ``batch.request_times``. ``batch`` ends with it."""
        before = prefix.num_tokens - self._per_item
        x, layout = self._newest(batch, 1)
        part = _part(layout, slice(0, len(x), 1), before, prefix.num_tokens)
        earlier = replace(prefix)
        earlier.cut(before)
        return self._extend(earlier, x, part, prefix.num_tokens, keep=False)[-1]

    def score(self, prefix: Prefix, batch: HSTUBatch) -> Tensor:
        """Encode the candidates of a one-sequence batch after the history ``prefix``: float32 [m, D].

        Micro-batches bound the memory. Only later candidates of the same group read the action on a candidate.
        """
        group, per_item = self.encoder.network.target_group_size, self._per_item
        x, layout = self._newest(batch, int(batch.num_candidates_host[0]))
        step = per_item if group == 1 else 1  # without actions: no candidate reads those of others
        end, found = prefix.num_tokens, []
        for rows in _runs_of(len(x), self._items_at_once * per_item, step):
            part = _part(layout, rows, end, end)
            found.append(self._extend(prefix, x[rows], part, end, keep=False)[:: per_item // step])
        return torch.cat([x.new_empty(0, x.shape[1], dtype=torch.float32), *found])

    def _newest(self, batch: HSTUBatch, count: int) -> tuple[Tensor, JaggedLayout]:
        """The tokens of the newest ``count`` items of a one-sequence batch, without positions, and their layout."""
        if batch.real_batch_size != 1 or batch.item_lengths[0] < count:
            raise ValueError(f"a batch of one sequence with at least {count} items, not of {batch.item_lengths}")
        layout = self.encoder.inputs.layout(batch)
        content, num_tokens = self._content(batch, layout), count * self._per_item
        newest = slice(len(content) - num_tokens, None)
        candidates = layout.num_candidate_tokens_host[:1]
        return content[newest], with_tokens(layout, np.array([num_tokens]), candidates, lambda each: each[newest])

    def _extend(self, prefix: Prefix, x: Tensor, layout: JaggedLayout, history_end: int, keep: bool) -> Tensor:
        """Encode ``x`` [n, D] after a prefix: float32 [n, D]. ``keep``: append the tokens to the prefix."""

        def attend_to_prefix(layer: int, inputs: AttentionInputs) -> Tensor:
            cached = CachedPrefix(
                pages=self.cache.pages(prefix, layer),
                num_tokens=prefix.num_tokens,
                num_contextuals=len(self.encoder.features.contextual),
                times=prefix.times,
                history_end=history_end,
            )
            if keep:
                self.cache.write(prefix, layer, prefix.num_tokens, inputs.k, inputs.v)
            return prefix_attention(inputs, cached)

        tokens = self._run_layers(x, layout, attend_to_prefix)
        if keep:
            prefix.num_tokens += len(x)
            if prefix.times is not None and layout.token_times is not None:
                prefix.times = torch.cat([prefix.times, layout.token_times])
        return tokens

    def _content(self, batch: HSTUBatch, layout: JaggedLayout) -> Tensor:
        """Tokens of a batch, [T, D], without positions."""
        with mixed_precision(self.encoder.network.dtype_str, layout.positions.device.type):
            parts = self.encoder.inputs.parts(self._embeddings_of(batch), batch, layout)
            return self.encoder.inputs.kernels.jagged_concat(parts, token_order(layout))

    def _run_layers(
        self, content: Tensor, layout: JaggedLayout, attend: Callable[[int, AttentionInputs], Tensor]
    ) -> Tensor:
        """Run all layers: float32 [n, D]. ``attend``: layer index and inputs → attention."""
        network, inputs, x = self.encoder.network, self.encoder.inputs, content
        with mixed_precision(network.dtype_str, content.device.type):
            if inputs.position_table is not None:
                x = inputs.kernels.add_positions(x, inputs.position_table, layout.positions)
            update: Tensor | None = None
            for index, layer in enumerate(self.encoder.layers):
                x, update = layer(x, layout, update, partial(attend, index))
            assert update is not None  # there is a layer
            return (x + update).float()


def tokens_of(encoder: SequenceEncoder, items: int) -> int:
    """The number of tokens of the context and ``items`` items."""
    features = encoder.features
    return len(features.contextual) + items * features.tokens_per_item(encoder.network)


def _runs_of(count: int, length: int, step: int = 1) -> Iterator[slice]:
    for start in range(0, count, length):
        yield slice(start, min(start + length, count), step)


def _part(layout: JaggedLayout, rows: slice, start: int, history_end: int) -> JaggedLayout:
    """The layout of ``rows`` as one sequence whose first token is at position ``start`` of context and history."""
    count = len(range(rows.start, rows.stop, rows.step))
    candidates = np.array([0 if layout.num_candidate_tokens is None else count])
    part = with_tokens(layout, np.array([count]), candidates, lambda of_tokens: of_tokens[rows])
    positions = torch.arange(start, start + count, device=layout.positions.device).clamp_(max=history_end)
    group, per_item = layout.candidate_group_tokens // rows.step, layout.tokens_per_item // rows.step
    changes = {"num_contextuals": 0, "candidate_group_tokens": group, "tokens_per_item": per_item}
    return replace(part, positions=positions, **changes)
