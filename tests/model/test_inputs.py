"""The token sequence, token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hstu.base.errors import ConfigError, DataError
from hstu.model.inputs import SequenceInputs
from tests.model.examples import Sample, Tables, make_batch, make_features, make_network, random_samples


def token_by_token(inputs: SequenceInputs, tables: Tables, samples: list[Sample]) -> Tensor:
    """What the inputs must give, for a network without projections."""
    scale, rows = math.sqrt(8), []

    for sample in samples:
        own: list[Tensor] = [tables.weights[f"c{i}"][value] for i, value in enumerate(sample.context)]
        history = len(sample.items) - sample.candidates
        positions = list(range(len(own)))
        for index, (item, action) in enumerate(zip(sample.items, sample.actions, strict=True)):
            token = tables.weights["item"][item]
            shown = tables.weights["action"][action] if inputs.features.action else token
            if inputs.features.action is None:
                own.append(token)
            elif inputs.tokens_per_item == 2:
                own += [token, shown]
            else:
                own.append(token + shown if index < history else token)
            first_candidate = len(sample.context) + history * inputs.tokens_per_item
            positions = [min(place, first_candidate) for place in range(len(own))]
        for row, position in zip(own, positions, strict=True):
            token = row * scale
            if inputs.position_table is not None:
                token = token + inputs.position_table[min(position, len(inputs.position_table) - 1)]
            rows.append(token)
    return torch.stack(rows) if rows else torch.zeros(0, 8, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=4),
    padding=st.integers(1, 2),
    contextuals=st.integers(0, 2),
    candidates=st.integers(0, 3),
    action=st.booleans(),
    interleave=st.booleans(),
    encoding=st.sampled_from(["absolute", "none"]),
    buckets=st.sampled_from([1, 5, 64]),
)
def test_tokens_and_their_gradients_are_those_written_down_one_by_one(
    lengths: list[int],
    padding: int,
    contextuals: int,
    candidates: int,
    action: bool,
    interleave: bool,
    encoding: str,
    buckets: int,
) -> None:
    features = make_features(contextuals, action)
    network = make_network(
        interleave_actions=interleave,
        position_encoding=encoding,
        num_position_buckets=buckets,
    )
    samples = random_samples(lengths, contextuals=contextuals, candidates=candidates)
    batch, inputs, tables = (
        make_batch(samples, features, padding),
        SequenceInputs(network, features),
        Tables(features, 8, 8),
    )
    inputs.double()
    tables.weights = {name: nn.Parameter(weight.double()) for name, weight in tables.weights.items()}
    parameters = [*tables.weights.values(), *inputs.parameters()]
    tokens, layout = inputs(tables(batch), batch)
    expected = token_by_token(inputs, tables, samples)
    assert tokens.shape == (layout.num_tokens, 8)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-12)

    weight = torch.randn_like(tokens)
    got = torch.autograd.grad((tokens * weight).sum(), parameters)
    if layout.num_tokens:
        wanted = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    else:
        assert not any(gradient.any() for gradient in got)


def test_tables_of_other_widths_are_projected() -> None:
    features = make_features(contextuals=2)
    network = make_network(item_embedding_dim=3, contextual_embedding_dim=5, position_encoding="none")
    samples = random_samples([2], contextuals=2)
    batch, inputs, tables = make_batch(samples, features), SequenceInputs(network, features), Tables(features, 3, 5)
    tokens, _ = inputs(tables(batch), batch)
    sample, scale = samples[0], math.sqrt(8)
    item, action, context = (inputs.projections[role] for role in ("item", "action", "contextual"))
    expected = [
        context(tables.weights["c0"][sample.context[0]] * scale),
        context(tables.weights["c1"][sample.context[1]] * scale),
        item(tables.weights["item"][sample.items[0]] * scale),
        action(tables.weights["action"][sample.actions[0]] * scale),
        item(tables.weights["item"][sample.items[1]] * scale),
        action(tables.weights["action"][sample.actions[1]] * scale),
    ]
    torch.testing.assert_close(tokens, torch.stack(expected))


def test_equal_widths_need_no_projection() -> None:
    inputs = SequenceInputs(make_network(item_embedding_dim=8), make_features(contextuals=1))
    assert [name for name, _ in inputs.named_parameters()] == ["position_table"]


def test_longest_sequence_counts_context_and_actions() -> None:
    features = make_features(contextuals=3, max_items=20)
    assert features.max_tokens(make_network()) == 3 + 2 * 20
    assert features.max_tokens(make_network(interleave_actions=False)) == 3 + 20
    assert make_features(contextuals=3, action=False, max_items=20).max_tokens(make_network()) == 3 + 20


def test_input_dropout_is_hidden_dropout_unless_given_and_off_in_evaluation() -> None:
    features = make_features(contextuals=0)
    batch, tables = make_batch(random_samples([20] * 20, contextuals=0), features), Tables(features, 8, 8)
    for given_dropout, expected in ((None, 0.5), (0.25, 0.25), (0.0, 0.0)):
        network = make_network(hidden_dropout=0.5, input_dropout=given_dropout, position_encoding="none")
        inputs = SequenceInputs(network, features)
        tokens, _ = inputs(tables(batch), batch)
        assert abs(float((tokens == 0).float().mean()) - expected) < 0.03
        tokens, _ = inputs.eval()(tables(batch), batch)
        assert (tokens != 0).all()


def test_relative_bias_without_times_is_an_error_that_says_what_to_do() -> None:
    features = make_features(contextuals=0)
    inputs = SequenceInputs(make_network(position_encoding="relative_bias"), features)
    batch, tables = make_batch(random_samples([2], contextuals=0), features), Tables(features, 8, 8)
    batch.items.timestamps = None
    with pytest.raises(ConfigError, match=r"relative_bias.*needs the time"):
        inputs(tables(batch), batch)


def test_a_contextual_feature_with_two_values_is_an_error_that_names_it() -> None:
    features = make_features(contextuals=1)
    batch, tables = make_batch(random_samples([2, 3], contextuals=1), features), Tables(features, 8, 8)
    embeddings = tables(batch)
    embeddings["c0"] = embeddings["item"]
    with pytest.raises(DataError, match="'c0' has 5 values"):
        SequenceInputs(make_network(), features)(embeddings, batch)
