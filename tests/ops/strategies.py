"""Hypothesis strategies: batches of jagged sequences of every shape that can occur."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from hstu.ops.layout import JaggedLayout, build_layout
from tests.ops.oracle import Token, User, tokens_of


@dataclass(frozen=True)
class Batch:
    """A batch described one user at a time, and what the oracle and the library make of it."""

    users: tuple[User, ...]
    contextuals: int
    tokens_per_item: int
    group_size: int

    def tokens(self) -> list[list[Token]]:
        return [
            tokens_of(
                user, contextuals=self.contextuals, tokens_per_item=self.tokens_per_item, group_size=self.group_size
            )
            for user in self.users
        ]

    def layout(
        self,
        with_times: bool = True,
        device: str | torch.device = "cpu",
        request_times: torch.Tensor | None = None,
        asks_for_next: bool | torch.Tensor = True,
    ) -> JaggedLayout:
        items = np.array([user.history + user.candidates for user in self.users], dtype=np.int64)
        times = [time for user in self.users for time in (user.item_times or (0,) * (user.history + user.candidates))]
        return build_layout(
            item_lengths=items,
            num_sequences=sum(not user.is_padding for user in self.users),
            num_contextuals=self.contextuals,
            num_candidates=np.array([user.candidates for user in self.users], dtype=np.int64),
            tokens_per_item=self.tokens_per_item,
            target_group_size=self.group_size,
            device=torch.device(device),
            item_times=torch.tensor(times, dtype=torch.int64, device=device) if with_times else None,
            request_times=request_times,
            asks_for_next=asks_for_next,
        )


@st.composite
def users(draw: st.DrawFn, max_history: int, max_candidates: int) -> User:
    history = draw(st.integers(0, max_history))
    candidates = draw(st.integers(0, max_candidates))
    gaps = draw(
        st.lists(
            st.sampled_from([0, 1, 2, 59, 3600, 10**6, 10**9]),
            min_size=history + candidates,
            max_size=history + candidates,
        )
    )
    return User(history, candidates, tuple(int(t) for t in np.cumsum(gaps)))


@st.composite
def batches(draw: st.DrawFn, max_users: int = 5, max_history: int = 9, max_candidates: int = 5) -> Batch:
    """Any batch: empty sequences, context only, one token, all padding, candidates in groups, interleaved or not."""
    with_candidates = draw(st.booleans())
    real = draw(st.lists(users(max_history, max_candidates if with_candidates else 0), max_size=max_users))
    padding = [User(0, 0, is_padding=True)] * draw(st.integers(0 if real else 1, 2))
    return Batch(
        users=(*real, *padding),
        contextuals=draw(st.integers(0, 3)),
        tokens_per_item=draw(st.integers(1, 2)),
        group_size=draw(st.integers(1, 3)),
    )
