"""Encode user histories once, append events to them, and answer repeated requests from a cache."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.data.batches.batch import HSTUBatch
from hstu.model.ranking import RankingModel
from hstu.model.retrieval import RetrievalDense
from hstu.serve.loaded import LoadedModel
from hstu.serve.prefix import CacheStatistics, IncrementalEncoder, Prefix, PrefixCache, tokens_of
from hstu.serve.runtime.requests import Candidates, History
from hstu.train.corpus import pair_scores

log = logging.getLogger(__name__)


@dataclass
class _Known:
    """The history of a user in host memory, to encode it again after eviction from the cache."""

    history: History
    """The items that the model reads, preceded by ``before`` items of which only the time is read."""
    before: int
    """0 or 1."""

    @property
    def num_items(self) -> int:
        return len(self.history.items) - self.before


class Session:
    """Keeps the keys and values of user histories in a cache, so that a request computes only new tokens.

    Results equal a full forward. Evicted histories are encoded again at their next request. A call that raises an error
    changes no history. Threads may share a session, and one call computes at a time.

    Args:
        cache_bytes: memory for keys and values on the model's device.
        page_tokens: tokens per page of the cache.
        candidates_at_once: candidates per micro-batch.
        trim_events: number of events removed when a history exceeds ``max_items``. Each removal shifts all positions
            and encodes the history again. With n, only every n-th event does so, and histories are up
            to n − 1 events shorter.

    Raises:
        ConfigError: a model on several ranks, with truncated histories or whose candidates read the actions on others,
            or a cache too small for one history.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache_bytes: int,
        *,
        page_tokens: int = 128,
        candidates_at_once: int = 256,
        trim_events: int = 1,
    ) -> None:
        if loaded.mesh.world_size > 1:
            raise ConfigError(
                f"the model is loaded on {loaded.mesh.world_size} ranks, and a session needs it on one: load it in a "
                "process that torchrun has not started"
            )
        loaded.check_groups()
        self._loaded = loaded
        self._task = loaded.task
        self.max_items = loaded.source.max_items
        """Maximum items of a history: the model's ``max_items``, for ranking minus room for candidates."""
        if isinstance(self._task, RankingModel):
            self.max_items -= max(loaded.dataset.max_num_candidates, 1)
        if not 1 <= trim_events <= self.max_items:
            raise ConfigError(
                f"trim_events = {trim_events}; give a number from 1 to {self.max_items}, the longest history"
            )
        self._trim_events = trim_events
        encoder = self._task.encoder
        self._tokens_of = partial(tokens_of, encoder)
        self._cache = PrefixCache(
            loaded.config.network,
            capacity_bytes=cache_bytes,
            max_tokens=self._tokens_of(self.max_items),
            device=loaded.mesh.device,
            page_tokens=page_tokens,
        )
        self._incremental = IncrementalEncoder(encoder, self._cache, self._embeddings_of, candidates_at_once)
        self.reencodes_because = self._incremental.reencodes_because
        """Why each appended event encodes the whole history again. None: only new tokens are computed."""
        if self.reencodes_because is not None:
            log.warning("session: each appended event encodes its history again: %s", self.reencodes_because)
        self._requests = loaded.encoder
        self._users: dict[Any, _Known] = {}

    @property
    def statistics(self) -> CacheStatistics:
        """Memory use and counters of the cache, as of now."""
        with self._loaded.lock:
            return replace(self._cache.statistics)

    def encode(self, histories: Iterable[History]) -> None:
        """Encode histories, replacing earlier histories of their users. Raises DataError for incomplete histories."""
        new = {given.user: _newest(self._checked(given), self.max_items) for given in histories}
        with self._loaded.lock, self._cache.dropped_on_error(new):
            waiting: dict[Any, _Known] = {}
            for user, known in new.items():
                lengths = [self._tokens_of(each.num_items) for each in (*waiting.values(), known)]
                if len(waiting) == self._loaded.config.trainer.eval_batch_size or not self._cache.fits(lengths):
                    self._encode(waiting)
                    waiting = {}
                waiting[user] = known
            self._encode(waiting)
            self._users.update(new)

    def append(self, events: Iterable[History]) -> None:
        """Append events, oldest first, to the histories of their users. Ignores ``context`` of the events.

        A history that must be encoded again (``reencodes_because``, ``trim_events``) is encoded at its next request.
        Raises DataError for unknown users, incomplete events, and events before the newest event of the history.
        """
        with self._loaded.lock:
            joined: dict[Any, History] = {}
            for new in events:
                before = joined.get(new.user) or self._known(new.user).history
                if len(new.items):
                    joined[new.user] = _joined(before, self._checked(replace(new, context={})))
            updates = {user: self._users[user] for user in joined}
            with self._cache.dropped_on_error(updates):
                for user, history in joined.items():
                    updates[user] = self._appended(updates[user], history)
                self._users.update(updates)

    def forget(self, users: Sequence[Any]) -> None:
        """Remove the histories of users. Unknown users are ignored."""
        with self._loaded.lock:
            for user in users:
                self._users.pop(user, None)
                self._cache.drop(user)

    def score(
        self,
        user: Any,
        items: Sequence[Any],
        *,
        at: int | None = None,
        features: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        """Score candidates after the history of a user.

        Args:
            user, items: raw ids.
            at: time of the request in whole seconds since 1970. None: the time of the newest event.
            features: item or event feature that is known before an event → raw value per candidate.

        Returns:
            Ranking: ``ModelOutput.logits``, float32 [m, outputs]. Retrieval: cosine similarities of user and items,
            float32 [m]. NaN for items that the model does not have. ``named`` converts it to probabilities.

        Raises DataError for an unknown user, an ``at`` before its newest event, or candidates that lack a feature, and
        ConfigError if the model does not read ``at``.
        """
        with self._loaded.lock:
            known = self._known(user)
            if isinstance(self._task, RetrievalDense):
                return self._cosines(user, items, at)
            self._loaded.check_request_time(at)
            newest = known.history.cut(slice(-1, None))
            shown = Candidates(items, features or {})
            self._check_given(shown.features)
            (events,) = self._requests.candidates(shown, newest, at)
            (batch,) = self._requests.batches_of([(self._requests.history(newest, at, 1), events)])
            prefix = self._prefix(user, known)
            with self._loaded.inference():
                logits = self._task.logits(self._incremental.score(prefix, batch.to(self._loaded.mesh.device)))
        return logits.masked_fill(self._requests.are_unknown(items).to(logits.device)[:, None], torch.nan)

    def named(self, outputs: Tensor) -> dict[str, np.ndarray]:
        """Convert what ``score`` returns to the columns of scripts/predict.py: name → float32 [m]."""
        return self._loaded.columns(outputs.reshape(len(outputs), -1).cpu().numpy())

    def user_embeddings(self, users: Sequence[Any], at: int | None = None) -> Tensor:
        """As ``TrainedModel.user_embeddings``. Computes whole histories if ``reencodes_because`` is not None."""
        self._loaded.require_retrieval()
        assert isinstance(self._task, RetrievalDense)
        vectors = [torch.empty(0, self._loaded.config.network.item_width, device=self._loaded.mesh.device)]
        with self._loaded.lock:
            for user in users:
                known = self._known(user)
                if self.reencodes_because is not None:
                    batches = self._requests.batches([known.history], [known.num_items])
                    vectors.append(self._loaded.user_vectors(batches, at))
                    continue
                (batch,) = self._loaded.asked_at([self._tail(known, 1)], at)
                prefix = self._prefix(user, known)
                with self._loaded.inference():
                    newest = self._incremental.newest(prefix, batch.to(self._loaded.mesh.device))
                    vectors.append(self._task.queries(newest[None]))
        return torch.cat(vectors)

    def _checked(self, given: History) -> History:
        """Convert arrays to lists. Raises DataError for incomplete or unordered events, also for those to cut off."""
        history = given.changed(lambda values: np.asarray(values, dtype=object).tolist())
        self._check_given(history.features)
        self._requests.encoded(history, len(history.items))
        return history

    def _check_given(self, features: Mapping[str, Any]) -> None:
        """Raise DataError unless running statistics are given: the session does not keep the events they count."""
        if missing := [name for name in self._requests.running_names if name not in features]:
            raise DataError(f"a session does not compute running statistics; give the features {', '.join(missing)}")

    def _appended(self, known: _Known, history: History) -> _Known:
        """Update the cache for a longer history of a user, whose events are checked."""
        user, count = history.user, len(history.items) - len(known.history.items)
        if known.num_items + count > self.max_items:
            self._cache.drop(user)
            return _newest(history, self.max_items - self._trim_events + 1)
        updated, prefix = _Known(history, known.before), self._cache.find(user)
        kept = None if prefix is None else self._incremental.kept_items(prefix, count)
        if prefix is None or kept is None:
            self._cache.drop(user)
            return updated
        computed = updated.num_items - kept
        batch = self._tail(updated, computed)
        with self._loaded.inference():
            self._incremental.append(prefix, user, batch.to(self._loaded.mesh.device), computed, kept)
        return updated

    def _encode(self, known: Mapping[Any, _Known]) -> None:
        histories = [each.history for each in known.values()]
        lengths = [each.num_items for each in known.values()]
        for batch in self._requests.batches(histories, lengths):
            with self._loaded.inference():
                self._incremental.encode([*known], batch.to(self._loaded.mesh.device))

    def _prefix(self, user: Any, known: _Known) -> Prefix:
        prefix = self._cache.find(user)
        if prefix is not None:
            self._cache.statistics.hits += 1
            return prefix
        self._cache.statistics.misses += 1
        self._encode({user: known})
        prefix = self._cache.find(user)
        assert prefix is not None, "it has just been encoded"
        return prefix

    def _known(self, user: Any) -> _Known:
        if user not in self._users:
            raise DataError(f"the session has no history of {user!r}; give it to encode() first, under the same id")
        return self._users[user]

    def _tail(self, known: _Known, count: int) -> HSTUBatch:
        """A batch of the newest ``count`` items after one earlier item, whose time the model reads."""
        (batch,) = self._requests.batches([known.history.cut(slice(-count - 1, None))], [count + 1])
        return batch

    def _embeddings_of(self, batch: HSTUBatch) -> dict[str, Tensor]:
        model = self._loaded.model
        return {**model.replicated_tables(batch), **model.look_up(batch)}

    def _cosines(self, user: Any, items: Sequence[Any], at: int | None) -> Tensor:
        vector = self.user_embeddings([user], at)[0]
        vocabulary = self._loaded.vocabularies[self._loaded.source.roles.item]
        ids = vocabulary.rows(items).numpy()
        known = ids != vocabulary.unknown
        corpus = self._loaded.retrieval_evaluator().corpus(np.unique(ids[known]))
        with self._loaded.inference():
            return pair_scores(vector[None], np.zeros_like(ids), corpus.positions(ids), corpus)


def _newest(history: History, count: int) -> _Known:
    return _Known(history.cut(slice(-count - 1, None)), before=int(len(history.items) > count))


def _joined(history: History, new: History) -> History:
    """Append the events of ``new`` to ``history``. Raises DataError if only one of them has a feature."""
    of_user = f"the events to append to the history of {new.user!r}"

    def join(what: str, before: Any, after: Any) -> Any:
        if (before is None) != (after is None):
            have, lack = ("have", "has not") if before is None else ("do not have", "has")
            raise DataError(f"{of_user} {have} {what}, and the history {lack}; give both the same")
        return None if before is None else [*before, *after]

    times = join("timestamps", history.timestamps, new.timestamps)
    if history.timestamps and new.timestamps and new.timestamps[0] < history.timestamps[-1]:
        oldest, newest = new.timestamps[0], history.timestamps[-1]
        raise DataError(f"{of_user} begin at {oldest}, before its newest at {newest}; give them in order")
    return replace(
        history,
        items=[*history.items, *new.items],
        actions=join("actions", history.actions, new.actions),
        timestamps=times,
        features={
            name: join(f"features {name!r}", history.features.get(name), new.features.get(name))
            for name in {**history.features, **new.features}
        },
    )
