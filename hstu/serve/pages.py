"""A cache of the keys and values of histories: pages of bounded memory, of which the least recently used are reused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.config.args import NetworkArgs
from hstu.model.precision import DTYPES


@dataclass
class Prefix:
    """The cached tokens of one sequence: its context and its history."""

    pages: list[int]
    """Pages of the cache, in order."""
    num_tokens: int = 0
    """Tokens whose keys and values are in the pages."""
    times: Tensor | None = None
    """int64 [num_tokens], seconds; None without a relative bias."""

    def cut(self, num_tokens: int) -> None:
        """Forget all but the first ``num_tokens`` tokens."""
        self.num_tokens = num_tokens
        self.times = None if self.times is None else self.times[:num_tokens]


@dataclass
class CacheStatistics:
    """What a cache holds and what it has done."""

    capacity_bytes: int
    """Bytes of all pages; nothing else of the size of a history is kept on the device."""
    used_bytes: int = 0
    """Bytes of the pages in use."""
    users: int = 0
    """Sequences in the cache."""
    evictions: int = 0
    """Sequences that gave their pages to others."""
    hits: int = 0
    """Questions to a session that found the history in the cache."""
    misses: int = 0
    """Questions to a session for which it was encoded first."""
    encoded_tokens: int = 0
    """Tokens computed with whole histories."""
    appended_tokens: int = 0
    """Tokens computed against a cached prefix and kept."""
    scored_tokens: int = 0
    """Tokens computed against a cached prefix and not kept: candidates, and the newest token at another time."""


class PrefixCache:
    """Pages of keys and values of all layers, [L, 2, H, page_tokens, d] each, for sequences under keys of your choice.

    The memory is allocated at once. When no page is free, the least recently used sequence loses all of its pages.
    Not thread-safe.

    Args:
        network: layers, heads and compute dtype.
        capacity_bytes: the pages take as many bytes at most.
        max_tokens: context and history of the longest sequence.
        page_tokens: tokens of a page. Half a page per sequence is unused on average; small pages cost more calls.

    Raises:
        ConfigError: a sequence of ``max_tokens`` does not fit.
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
        """What the cache holds and has done; counts go on for as long as it lives."""
        self._counts.users = len(self._prefixes)
        self._counts.used_bytes = (len(self._pool) - len(self._free)) * self.page_bytes
        return self._counts

    def find(self, key: Hashable) -> Prefix | None:
        """The prefix under ``key``, which becomes the most recently used; None: it is not here (any more)."""
        prefix = self._prefixes.get(key)
        if prefix is not None:
            self._prefixes.move_to_end(key)
        return prefix

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of so many tokens fit together."""
        return sum(map(self._pages_for, lengths)) <= len(self._pool)

    def reserve(self, lengths: dict[Hashable, int]) -> list[Prefix]:
        """Pages for so many tokens of each key; what a prefix has stays in its place.

        Other sequences are evicted where none are free, these not. Raises ValueError if they do not fit together.
        """
        if not self.fits([*lengths.values()]):
            raise ValueError(
                f"{len(lengths)} sequences of {sum(lengths.values())} tokens do not fit the cache together"
            )
        for key in lengths:
            self._prefixes.setdefault(key, Prefix([]))
            self._prefixes.move_to_end(key)
        for key, tokens in lengths.items():
            self._resize(self._prefixes[key], self._pages_for(tokens), lengths)
        return [self._prefixes[key] for key in lengths]

    def drop(self, key: Hashable) -> None:
        """Forget a sequence, if it is here."""
        prefix = self._prefixes.pop(key, None)
        if prefix is not None:
            self._free += prefix.pages

    def write(self, prefix: Prefix, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, H, d] of the tokens from ``first`` on in reserved pages; any strides and dtype."""
        done, count = 0, len(keys)
        while done < count:
            page, place = divmod(first + done, self.page_tokens)
            stop = min(done + self.page_tokens - place, count)
            for target, source in zip(self._pool[prefix.pages[page], layer], (keys, values), strict=True):
                target[:, place : place + stop - done] = source[done:stop].transpose(0, 1)
            done = stop

    def pages(self, prefix: Prefix, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the tokens of ``prefix`` in one layer, [H, b, d] each, page by page."""
        whole, rest = divmod(prefix.num_tokens, self.page_tokens)
        found = [self._pool[page, layer].unbind() for page in prefix.pages[: whole + bool(rest)]]
        return [
            (keys, values) if number < whole else (keys[:, :rest], values[:, :rest])
            for number, (keys, values) in enumerate(found)
        ]

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _resize(self, prefix: Prefix, count: int, kept: dict[Hashable, int]) -> None:
        self._free += prefix.pages[count:]
        del prefix.pages[count:]
        while len(self._free) < count - len(prefix.pages):
            oldest = next(key for key in self._prefixes if key not in kept)
            self.drop(oldest)
            self._counts.evictions += 1
        for _ in range(count - len(prefix.pages)):
            prefix.pages.append(self._free.pop())
