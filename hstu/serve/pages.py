"""A least-recently-used cache of the keys and values of histories, in pages of a fixed amount of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.base.errors import ConfigError
from hstu.config.args import NetworkArgs
from hstu.model.stack import DTYPES


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
