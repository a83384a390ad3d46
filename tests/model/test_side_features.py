"""Tokens that show features of items and events beside their ids, token by token."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.data.batches.batch import HSTUBatch, ItemColumns, keyed_jagged
from hstu.data.features.values import statistics_of_numbers
from hstu.model.inputs import NumberInputs, SequenceFeatures, SequenceInputs, rank_among
from tests import helpers
from tests.model.examples import make_network

WIDTH, ROWS = 8, 7
NUMBERS = {"seconds": 1, "vector": 3, "price": 1}
"""Number or vector → its width."""
SIDE = ("seconds", "genres", "vector", "year", "watched", "price", "tags")
TRANSFORMS = {"seconds": "quantile", "price": "log1p"}
RNG = np.random.default_rng(0)
COLUMN = {name: RNG.lognormal(0, 2, (40, width)).astype(np.float32) for name, width in NUMBERS.items()}
STATISTICS = {name: statistics_of_numbers(column) for name, column in COLUMN.items()}


def features_with(action: str | None) -> SequenceFeatures:
    return SequenceFeatures(
        "item", action, (), SIDE, lists=("genres", "tags"), known_after=("watched", "seconds", "tags"),
        numbers=tuple(NUMBERS), number_widths=tuple(NUMBERS.values()), transforms=TRANSFORMS, max_items=9,
    )  # fmt: skip


FEATURES = {"with actions": features_with("action"), "without actions": features_with(None)}
Events = list[list[dict[str, list[Any]]]]
"""User → event → feature → its values."""


def random_events(lengths: list[int], features: SequenceFeatures) -> Events:
    rng = np.random.default_rng(len(lengths))

    def value(name: str) -> list[int]:
        return [int(code) for code in rng.integers(0, ROWS, rng.integers(1, 4) if name in features.lists else 1)]

    def event() -> dict[str, list[Any]]:
        numbers = {name: column[rng.integers(len(column))].tolist() for name, column in COLUMN.items()}
        missing = {name: [math.nan] * width for name, width in NUMBERS.items() if rng.random() < 0.3}
        return {name: value(name) for name in features.names} | numbers | missing

    return [[event() for _ in range(length)] for length in lengths]


def make_batch(users: Events, features: SequenceFeatures, candidates: int) -> HSTUBatch:
    """The users, and an empty sequence."""
    events = [event for user in users for event in user]
    of_users = [[event["item"][0] for event in user] for user in users]
    own = [min(len(user), candidates) for user in users]
    batch = helpers.make_batch([*of_users, []], num_candidates=[*own, 0], num_labels=[0] * (len(users) + 1), labels=[])
    return dataclasses.replace(
        batch,
        features=keyed_jagged(
            {name: np.array([v for event in events for v in event[name]], dtype=np.int64) for name in features.names},
            {
                name: np.array([sum(len(event[name]) for event in user) for user in [*users, []]])
                for name in features.names
            },
        ),
        items=ItemColumns(
            list_lengths=torch.tensor(
                [[len(event[name]) for event in events] for name in features.lists], dtype=torch.int64
            ),
            numbers=torch.tensor([[x for name in NUMBERS for x in event[name]] for event in events]).reshape(-1, 5),
        ),
    )


def transformed(name: str, values: list[float]) -> list[float]:
    """One number or vector, and whether it is missing, in float64."""
    column = COLUMN[name].astype(np.float64)
    if math.isnan(values[0]):
        return [0.0] * len(values) + [1.0]
    if name == "seconds":
        quantiles = np.sort(column[:, 0])[np.rint(np.linspace(0, len(column) - 1, 65)).astype(int)]
        below, equal = (quantiles < values[0]).sum(), (quantiles == values[0]).sum()
        place = below + (equal - 1) / 2 if equal else np.interp(values[0], quantiles, np.arange(65))
        return [place / 32 - 1, 0.0]
    if name == "price":
        return [float((math.log1p(values[0]) - np.log1p(column).mean()) / np.log1p(column).std()), 0.0]
    return [*((np.array(values) - column.mean(axis=0)) / column.std(axis=0)).tolist(), 0.0]


def token_by_token(inputs: SequenceInputs, tables: dict[str, Tensor], users: Events, candidates: int) -> Tensor:
    def joined(role: str, names: tuple[str, ...], event: dict[str, list[Any]]) -> Tensor:
        rows = torch.cat([tables[name][event[name]].mean(0) for name in names])
        numbers = [
            [
                transformed(name, event[name])[place]
                for name in NUMBERS
                if (name == "seconds") == (role == "known_after")
            ]
            for place in (slice(-1), slice(-1, None))
        ]
        flat = torch.tensor([x for part in numbers for each in part for x in each], dtype=torch.float64)
        out: Tensor = inputs.projections[role](torch.cat([rows * scale, flat]))
        return out

    scale, tokens = math.sqrt(WIDTH), []
    for user in users:
        for place, event in enumerate(user):
            item = tables["item"][event["item"][0]] * scale + joined("side", ("genres", "year"), event)
            after = joined("known_after", ("watched", "tags"), event)
            if inputs.features.action is None:
                tokens.append(item + after)
                continue
            action = tables["action"][event["action"][0]] * scale
            action = action + after
            if inputs.tokens_per_item == 2:
                tokens += [item, action]
            else:
                tokens.append(item if place >= len(user) - candidates else item + action)
    return torch.stack(tokens) if tokens else torch.zeros(0, WIDTH, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=4),
    kind=st.sampled_from(sorted(FEATURES)),
    interleave=st.booleans(),
    candidates=st.integers(0, 2),
)
def test_tokens_and_their_gradients_are_those_written_down_one_by_one(
    lengths: list[int], kind: str, interleave: bool, candidates: int
) -> None:
    features = FEATURES[kind]
    network = make_network(interleave_actions=interleave, position_encoding="none")
    inputs = SequenceInputs(network, features)
    inputs.load_statistics(STATISTICS)
    inputs.double()
    users = random_events(lengths, features)
    batch = make_batch(users, features, candidates)
    weights = {
        name: torch.randn(ROWS, features.width(name, network), dtype=torch.float64, requires_grad=True)
        for name in features.names
    }
    ids = batch.features.to_dict()
    looked_up = {name: weight[ids[name].values()] for name, weight in weights.items()}

    tokens, _ = inputs(looked_up, batch)
    expected = token_by_token(inputs, weights, users, candidates)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)  # statistics and numbers are float32
    parameters = [*weights.values(), *inputs.parameters()]
    factor = torch.randn_like(tokens)
    if len(tokens):
        got = torch.autograd.grad((tokens * factor).sum(), parameters, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad((expected * factor).sum(), parameters, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_ranks_among_quantiles_that_are_equal_and_beyond_them() -> None:
    quantiles = torch.tensor([[0.0, 0.0, 0.0, 1.0, 3.0], [-3e38, -1.0, 0.0, 1.0, 3e38]])
    values = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 2.0, 9.0], [-3e38, -1.0, 0.5, 1.0, 1.5e38, 3.4e38]])
    places = torch.tensor([[0.0, 1.0, 2.5, 3.0, 3.5, 4.0], [0.0, 1.0, 2.5, 3.0, 3.5, 4.0]])
    torch.testing.assert_close(rank_among(values, quantiles), places / 2 - 1)


def test_numbers_that_are_all_equal_become_zero() -> None:
    numbers = NumberInputs({"price": range(1, 2)}, {})
    numbers.load_statistics({"price": statistics_of_numbers(np.full((5, 1), 7, dtype=np.float32))})
    assert numbers(torch.tensor([[3.0, 7.0], [3.0, math.nan]])).tolist() == [[0, 0], [0, 1]]
