"""The encoder as a whole: what a token can and cannot learn about the others."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.model.stack import SequenceEncoder
from tests.model.examples import (
    Sample,
    Tables,
    gradients,
    make_batch,
    make_features,
    make_network,
    random_samples,
)


def encode(samples: list[Sample], contextuals: int, padding: int = 0, **changes: Any) -> list[Tensor]:
    """Encoded tokens of each user, from a model and tables that depend on the seed alone."""
    torch.manual_seed(0)
    features = make_features(contextuals)
    encoder, tables = SequenceEncoder(make_network(**changes), features), Tables(features, 8, 8)
    batch = make_batch(samples, features, padding)
    tokens, layout = encoder(tables(batch), batch)
    return list(tokens.detach().split(layout.seqlens.tolist()))


@pytest.mark.parametrize(
    ("spans", "full", "reach"),
    [
        (3, 0, 2 * 3),
        ((2, 5), 0, 2 + 5),
        ((2, None), 0, 99),
        (3, 1, 99),
    ],
)
def test_a_token_reaches_back_by_the_spans_of_all_layers(
    spans: int | tuple[int | None, ...], full: int, reach: int
) -> None:
    features = make_features(contextuals=1)
    network = make_network(
        max_attention_span=spans, min_full_attention_tokens=full, disable_contextual_mask=True, interleave_actions=False
    )
    encoder, tables = SequenceEncoder(network, features), Tables(features, 8, 8)
    batch = make_batch(random_samples([16], contextuals=1), features)
    embeddings = tables(batch)
    tokens, _ = encoder(embeddings, batch)
    (gradient,) = torch.autograd.grad(tokens[-1].square().sum(), embeddings["item"])
    assert torch.nonzero(gradient.any(1)).flatten().tolist() == list(range(max(0, 15 - reach), 16))


def test_later_layers_compute_on_the_newest_items_alone() -> None:
    # tokens: c i a i a i a i a | i a i a (2 candidates: 9-10 11-12), and c i a, which is short
    samples, features = random_samples([6, 1], contextuals=1, candidates=2), make_features(contextuals=1)
    samples[1] = random_samples([1], contextuals=1)[0]
    network = make_network(num_layers=3, truncate_after_layer=1, truncate_to_items=2, hidden_dropout=0.0)
    encoder, tables = SequenceEncoder(network, features).double(), Tables(features, 8, 8)
    batch = make_batch(samples, features)
    tokens, layout = encoder(tables(batch), batch)
    left = [0, *range(5, 13), 13, 14, 15]
    older = [place for place in range(16) if place not in left]

    x, _ = encoder.inputs(tables(batch), batch)
    first, update = encoder.layers[0](x, layout)
    first = first + update
    torch.testing.assert_close(tokens[older], first[older].float())
    shorter = make_batch([dataclasses.replace(samples[0], items=(0,) * 4, actions=(0,) * 4), samples[1]], features)
    _, short_layout = encoder.inputs(tables(shorter), shorter)
    second, update = encoder.layers[1](first[left], short_layout)
    third, update = encoder.layers[2](second, short_layout, update)
    torch.testing.assert_close(tokens[left], (third + update).float())


@pytest.mark.parametrize("encoding", ["absolute", "relative_bias", "none"])
@pytest.mark.parametrize("interleave", [True, False])
def test_users_do_not_depend_on_their_neighbours_or_on_padding(encoding: str, interleave: bool) -> None:
    samples = random_samples([4, 0, 9, 1], contextuals=2, candidates=2)
    config: dict[str, Any] = {"position_encoding": encoding, "interleave_actions": interleave}
    together = encode(samples, 2, padding=2, **config)
    assert [len(tokens) for tokens in together[4:]] == [0, 0]
    for sample, tokens in zip(samples, together, strict=False):
        (alone,) = encode([sample], 2, **config)
        torch.testing.assert_close(tokens, alone, rtol=0, atol=1e-6)
        assert tokens.isfinite().all()


@pytest.mark.parametrize("recompute", [(), ("input_layernorm", "input_silu"), ("layer",)])
@pytest.mark.parametrize("encoding", ["absolute", "relative_bias"])
def test_a_rank_without_tokens_gives_every_parameter_a_gradient_of_zeros(
    encoding: str, recompute: tuple[str, ...]
) -> None:
    features = make_features(contextuals=2)
    network = make_network(
        position_encoding=encoding,
        item_embedding_dim=3,
        contextual_embedding_dim=5,
        hidden_dropout=0.2,
        **{f"recompute_{part}": True for part in recompute},
    )
    encoder, tables = SequenceEncoder(network, features), Tables(features, 3, 5)
    batch = make_batch([], features, padding=3)
    tokens, _ = encoder(tables(batch), batch)
    assert tokens.shape == (0, 8)
    tokens.sum().backward()
    for gradient in [*gradients(encoder).values(), *(w.grad for w in tables.weights.values())]:
        assert gradient is not None and not gradient.any()
