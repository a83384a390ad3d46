"""A factor model of actions inside the network: what a user's earlier actions tell of the next one."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from hstu.data.batches.jagged import ranges
from hstu.ops.layout import to_device

_CHUNK = 256
"""Events that are summed with one product. Longer sequences take one after another, so memory grows with the length."""
_NOISE, _FORGOTTEN = 0.6, 0.003
"""Initial variance of the noise, and initial share of what is known that each event takes away."""


class Told(NamedTuple):
    """The actions of T items, sequence after sequence, and where they are.

    Args:
        actions: their classes, int64 [T]. Numbers of no class tell nothing.
        is_history: bool [T], False for candidates, whose actions tell nothing.
        places: of the items in sequences that are padded to one length and laid end to end, int64 [T].
        shape: number and length of the padded sequences.
        chunk: events to sum with one product. None: all, as in a program, which has no loops.
        has_candidates: False if there are none.
    """

    actions: Tensor
    is_history: Tensor
    places: Tensor
    shape: Sequence[int]
    chunk: int | None = None
    has_candidates: bool = True

    @classmethod
    def in_batch(cls, actions: Tensor, is_history: Tensor, lengths: np.ndarray, num_candidates: np.ndarray) -> Self:
        """``lengths`` and ``num_candidates``: of each sequence, int64 [B] on the host."""
        shape = len(lengths), int(lengths.max())
        places = to_device(ranges(np.arange(shape[0]) * shape[1], lengths), actions.device)
        return cls(actions, is_history, places, shape, _CHUNK, bool(num_candidates.any()))


class OnlineFactors(nn.Module):
    """Bayesian regression of a sequence's actions on the vectors of their items, event by event, in closed form.

    A class v of the action has a learned value, at first in equal steps. For item i it is modelled as c_i + w_i · z +
    noise, where (c_i, w_i) is a linear function of the item's token, z from N(0, I) is the user's, and σ² the variance
    of the noise:

        precision of z before event t:   P_t = I + Σ γ^(t − s) w_s w_sᵀ / σ²,   s < t
        expectation of z:                m_t = P_t⁻¹ Σ γ^(t − s) w_s (v_s − c_s) / σ²

    γ forgets old events. All of it is learned with the network by its loss. It is the least squares in context of a
    mesa-layer (von Oswald et al., arXiv 2309.05858), with the uncertainty of a probabilistic factor model.

    Args:
        width: of the tokens.
        num_factors: width k of z.
        classes: the numbers of the action, in the order of what they mean, such as stars.
    """

    def __init__(self, width: int, num_factors: int, classes: range) -> None:
        super().__init__()
        self.num_factors, self.classes = num_factors, classes
        self.of_items = nn.Linear(width, 1 + num_factors)
        self.values = nn.Parameter(torch.linspace(-2, 2, len(classes)))
        self.before, self.after = nn.Linear(2, width), nn.Linear(1, width)
        nn.init.normal_(self.of_items.weight, std=0.1)
        with torch.no_grad():
            self.of_items.bias.copy_(torch.eye(1 + num_factors)[1] * 0.4)  # one factor: how high the user's values are
        # Logarithms of what both constants are multiplied by. Of one dimension, since FSDP refuses scalars.
        self.log_noise, self.log_forgotten = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, items: Tensor, told: Told) -> list[Tensor]:
        """What is added to the tokens of T items, [T, width], and to those of their actions: float32 [T, width] each.

        To an item: the expected value of its action and the standard deviation, from the history before it; candidates
        follow it at once. To an action: by how many deviations its value differs from that, 0 if it is not told.
        """
        with torch.autocast(items.device.type, enabled=False):
            codes = told.actions - self.classes.start
            known = codes.clamp(0, len(self.classes) - 1)
            is_told = told.is_history & (codes == known)
            value, flags = self.values[known, None], torch.stack([is_told, ~told.is_history], dim=1).float()
            events = torch.cat([self.of_items(items.float()), value, flags], dim=1)
            sequences, longest = told.shape
            padded = events.new_zeros(sequences * longest, events.shape[1]).index_copy(0, told.places, events)
            expected, deviation = self._expected(padded.view(sequences, longest, events.shape[1]), told)
            found = torch.stack([expected, deviation], dim=2).flatten(0, 1).index_select(0, told.places)
            surprise = (value - found[:, :1]) / found[:, 1:]
            return [self.before(found), self.after(surprise * is_told[:, None])]

    def _expected(self, events: Tensor, kind: Told) -> tuple[Tensor, Tensor]:
        """Expected values and deviations, [B, L] each. events: (c, w, value, is told, is shown), [B, L, k + 4]."""
        constant, weights, value, is_told, is_shown = events.split([1, self.num_factors, 1, 1, 1], dim=2)
        noise, forgotten = _NOISE * self.log_noise.exp(), _FORGOTTEN * self.log_forgotten.exp()
        told = weights[..., None] * torch.cat([weights, value - constant], dim=2)[..., None, :]
        sums = _sums_before((told * (is_told / noise)[..., None]).flatten(2), forgotten, kind.chunk)
        if kind.has_candidates:
            places = torch.arange(events.shape[1], device=events.device)[None, :, None]
            first = places - (is_shown.cumsum(dim=1) - is_shown).long()
            sums = sums.gather(1, first.expand_as(sums))
        sums = sums.unflatten(2, told.shape[2:])
        precision = sums[..., :-1] + torch.eye(self.num_factors, device=events.device)
        factor = torch.linalg.cholesky_ex(precision).L  # the other function waits for the device to check the result
        solved = torch.cholesky_solve(torch.cat([sums[..., -1:], weights[..., None]], dim=3), factor)
        mean, spread = (weights[..., None, :] @ solved).squeeze(2).unbind(2)
        return constant.squeeze(2) + mean, (spread + noise).sqrt()


def _sums_before(values: Tensor, forgotten: Tensor, chunk: int | None) -> Tensor:
    """Σ exp(−forgotten (t − s)) values_s over s < t, [B, L, n]."""
    found, total = [], torch.zeros_like(values[:, :1])
    for part in [values] if chunk is None else values.split(chunk, dim=1):
        age = torch.arange(1 + part.shape[1], device=values.device)
        ages = age[1:, None] - age[1:]
        decay = torch.where(ages > 0, torch.exp(-forgotten * ages.clamp(min=0)), 0.0)
        left = torch.exp(-forgotten * age)
        found.append(decay @ part + left[1:, None] * total)
        total = left[-1] * total + left[None, :-1].flip(1) @ part
    return torch.cat(found, dim=1)
