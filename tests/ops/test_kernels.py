"""Every fast backend against float64, forward and all gradients, over the shapes, masks, types and strides there are.

The float64 results are the PyTorch backend's, which other tests hold against a pair-by-pair oracle. Triton's kernels
are driven on a GPU, and interpreted (see backends.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.kernels import Backend, GateConfig, KernelShapes, Negatives, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, time_buckets
from hstu.ops.support import unsupported_reason
from tests.ops.backends import (
    BACKENDS,
    CUTLASS,
    FULL_SIZE,
    INTERPRETED,
    MOST_HEADS,
    ON_A_GPU,
    TOLERANCE,
    TRITON,
    TYPES,
    WITHOUT_A_GPU,
    device_of,
    examples,
    hstu_attention,
    kernels_of,
    norm_mul_dropout,
    softmax_loss,
)
from tests.ops.oracle import User
from tests.ops.strategies import Batch, batches
from tests.ops.test_softmax_loss import make_seen

IN_PLACE_OR_PACKED = [
    pytest.param(Backend.CPU, False, id="cpu, rows in place"),
    pytest.param(Backend.CPU, True, id="cpu, packed rows"),
]
SAMPLED_LOSS = [
    *([] if INTERPRETED else IN_PLACE_OR_PACKED),
    pytest.param(Backend.TRITON, False, marks=TRITON.marks, id="triton"),
]
ONE_ROW: dict[str, Any] = {"pool_size": 1, "width": 1, "masks": False}
MANY_QUERIES = 20 if INTERPRETED else 130
LENGTHS = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129])
NUM_CANDIDATES = st.sampled_from([0, 0, 1, 7, 40])


def differentiate(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    grad_out = grad_out.to(out).view(out.shape)
    grads = torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)
    return [out.detach(), *grads]


def assert_near(
    got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, rounding: dict[int, float] | None = None
) -> None:
    """Errors are below ``tolerance`` of the largest number of each result, or below its entry of ``rounding``."""
    for index, (ours, exact) in enumerate(zip(got, expected, strict=True)):
        assert ours.shape == exact.shape
        if exact.numel():
            error = float((ours.cpu().double() - exact.double()).abs().max())
            allowed = tolerance * max(float(exact.abs().max()), 1e-3)
            message = f"result {index} (0: output, then gradients) is off by {error:.2g}"
            assert error <= max(allowed, (rounding or {}).get(index, 0)), message


@st.composite
def long_batches(
    draw: st.DrawFn, candidates: st.SearchStrategy[int] = NUM_CANDIDATES, contextuals: int | None = None
) -> Batch:
    """Sequences around the sizes of blocks and vectors, with candidates in groups."""
    gap = draw(st.sampled_from([0, 1, 977, 10**6]))
    users = []
    for history in draw(st.lists(LENGTHS, min_size=1, max_size=3)):
        count = draw(candidates)
        users.append(User(history, count, tuple(gap * i for i in range(history + count))))
    if contextuals is None:
        contextuals = draw(st.integers(0, 3))
    return Batch(tuple(users), contextuals, draw(st.integers(1, 2)), draw(st.integers(1, 4)))


def to(leaves: Sequence[Tensor], device: str | torch.device, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.to(device, dtype) for x in leaves]


def attention_inputs(
    tokens: int, heads: int, width: int, dtype: torch.dtype, strided: bool, backend: Backend
) -> list[Tensor]:
    torch.manual_seed(tokens)
    fused = torch.randn(tokens, heads, 4, width).to(device_of(backend), dtype)
    parts = fused.unbind(2)[1:] if strided else [part.clone() for part in fused.unbind(2)[1:]]
    return [*parts, *to([torch.randn(2 * 150 - 1), torch.randn(NUM_TIME_BUCKETS)], fused.device, dtype)]


def compare_attention(
    batch: Batch,
    backend: Backend,
    leaves: list[Tensor],
    grad_out: Tensor,
    shift: Tensor | None = None,
    **config: Any,
) -> None:
    """leaves: q, k, v and the tables of a bias, if any. With ``shift``, q, k and v are pre-activations."""
    has_bias, device, dtype = len(leaves) > 3, leaves[0].device, leaves[0].dtype

    def attend_by(backend: Backend) -> Callable[..., Tensor]:
        layout = batch.layout(device=device_of(backend))

        def attend(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
            bias = RelativeBias(*others[:2]) if has_bias else None
            added = None if shift is None else others[-1]
            return hstu_attention(q, k, v, layout, bias=bias, backend=backend, shift=added, **config)

        return attend

    given = leaves if shift is None else [*leaves, shift.to(device)]
    got = differentiate(attend_by(backend), given, grad_out.to(device))
    assert all(ours.dtype == leaf.dtype for ours, leaf in zip(got[1:], given, strict=True))
    grad_out = grad_out.to(dtype).double()
    exact, rounding = to(leaves, "cpu", torch.float64), None
    if shift is not None:  # the rounding of the sum of projection and shift is no error of a kernel
        sums = [x.cpu() + shift[:, part].to(dtype) for x, part in zip(leaves, (1, 2, 0), strict=False)]
        exact = [*to(sums, "cpu", torch.float64), *exact[3:], torch.zeros_like(shift).double()]
    else:
        # Summands of a bias gradient can cancel. Their rounding in float32 follows their size: of a pair of tokens, the
        # product of gradient and value times SiLU's slope, at most 1.1.
        products = torch.einsum("ihd,jhd->hij", grad_out, exact[2]) * 1.1 / config["scaling_seqlen"]
        rounding = dict.fromkeys((4, 5), 8 * torch.finfo(torch.float32).eps * float(products.norm()))
    assert_near(got, differentiate(attend_by(Backend.PYTORCH), exact, grad_out), TOLERANCE[backend][dtype], rounding)


@pytest.mark.parametrize("backend", WITHOUT_A_GPU)
@settings(deadline=None, max_examples=examples(60))
@given(
    batch=long_batches() | batches(),
    heads=st.integers(1, MOST_HEADS),
    width=st.sampled_from([1, 3, 16, 25, 50, 64, 72, 128, 256]),
    dtype=st.sampled_from(TYPES),
    strided=st.booleans(),
    with_bias=st.booleans(),
    is_causal=st.booleans(),
    contextual_mask=st.booleans(),
    max_span=st.none() | st.sampled_from([1, 2, 15, 16, 33, 64, 100]),
    full_tokens=st.sampled_from([0, 0, 1, 17, 65, 300]),
)
def test_attention_equals_float64(
    backend: Backend,
    batch: Batch,
    heads: int,
    width: int,
    dtype: torch.dtype,
    strided: bool,
    with_bias: bool,
    **mask: Any,
) -> None:
    tokens = batch.layout().num_tokens
    leaves = attention_inputs(tokens, heads, width, dtype, strided, backend)[: 5 if with_bias else 3]
    grad_out = torch.randn(tokens, width, heads).to(dtype).transpose(1, 2)
    compare_attention(batch, backend, leaves, grad_out, alpha=width**-0.5, scaling_seqlen=100, **mask)


@pytest.mark.parametrize("backend", FULL_SIZE)
@pytest.mark.parametrize(("width", "dtype"), [(50, torch.float32), (64, torch.bfloat16)])
def test_attention_equals_float64_on_a_long_sequence(backend: Backend, width: int, dtype: torch.dtype) -> None:
    batch = Batch((User(1023, 0, tuple(3600 * i for i in range(1023))), User(5, 0, (1,) * 5)), 0, 1, 1)
    leaves = attention_inputs(1028, 1, width, dtype, strided=True, backend=backend)
    shapes = KernelShapes(width, 1, width, width, dtype)
    if ON_A_GPU and backend is not Backend.CPU and unsupported_reason(Backend.CUTLASS, "attention", shapes):
        pytest.skip("CUTLASS has no such kernels, and Triton's for other widths are compiled already")
    compare_attention(batch, backend, leaves, torch.randn(1028, 1, width), alpha=width**-0.5, scaling_seqlen=1023)


@pytest.mark.parametrize("backend", FULL_SIZE[:2])
def test_long_sequences_with_a_window_are_right(backend: Backend) -> None:
    users = User(700, 40, tuple(range(0, 7400, 10))), User(150, 0, tuple(range(150)))
    batch = Batch(users, contextuals=2, tokens_per_item=1, group_size=4)
    tokens = batch.layout().num_tokens
    leaves = attention_inputs(tokens, 2, 64, torch.bfloat16, True, backend)
    window: dict[str, Any] = dict(max_span=130, full_tokens=90)
    compare_attention(batch, backend, leaves, torch.randn(tokens, 2, 64), alpha=0.125, scaling_seqlen=100, **window)


@pytest.mark.skipif(INTERPRETED, reason="for the kernels of a CPU")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("backend", [Backend.CPU])
def test_the_pairs_of_a_window_grow_with_the_length(backend: Backend, is_causal: bool) -> None:
    def buckets(length: int) -> int:
        """The pairs of which the C++ kernels keep the time bucket."""
        layout = Batch((User(length, 9), User(500, 0)), contextuals=3, tokens_per_item=1, group_size=1).layout()
        q, bias = torch.zeros(layout.num_tokens, 1, 1), RelativeBias(torch.zeros(3), torch.zeros(128))
        config: dict[str, Any] = dict(alpha=1.0, scaling_seqlen=1, is_causal=is_causal, max_span=100, full_tokens=70)
        hstu_attention(q, q, q, layout, bias=bias, backend=backend, **config)
        _, (_, bucket_offsets) = layout.cache.values()
        return int(bucket_offsets[-1])

    assert buckets(8_000) < 5 * buckets(2_000)  # 16 without a window


ONE_KERNEL = [
    (CUTLASS, 64, torch.bfloat16, False, True),
    (CUTLASS, 256, torch.bfloat16, False, True),
    (CUTLASS, 128, torch.float16, False, False),
    (TRITON, 25, torch.float32, True, True),
    (TRITON, 64, torch.bfloat16, False, True),
    (TRITON, 128, torch.bfloat16, True, True),
    (TRITON, 256, torch.bfloat16, False, True),
    (TRITON, 50, torch.float16, True, False),
]


@pytest.mark.parametrize(
    ("backend", "width", "dtype", "has_bias", "is_causal"),
    [
        pytest.param(*backend.values, *others, marks=backend.marks)
        for backend, *others in ONE_KERNEL
        if backend is TRITON or not INTERPRETED
    ],
)
@settings(deadline=None, max_examples=1 if INTERPRETED else 20)
@given(batch=long_batches(candidates=st.sampled_from([1, 7, 40]), contextuals=2))
def test_one_compiled_kernel_serves_any_batch(
    backend: Backend, width: int, dtype: torch.dtype, has_bias: bool, is_causal: bool, batch: Batch
) -> None:
    tokens, config = batch.layout().num_tokens, dict(alpha=width**-0.5, scaling_seqlen=100, is_causal=is_causal)
    leaves = attention_inputs(tokens, 2, width, dtype, True, backend)[: 5 if has_bias else 3]
    compare_attention(batch, backend, leaves, torch.randn(tokens, 2, width), torch.randn(2, 3, width), **config)


@pytest.mark.skipif(INTERPRETED, reason="thousands of sequences take long to interpret")
@pytest.mark.parametrize("backend", [Backend.CPU])
def test_the_weight_of_a_score_is_exact_to_some_units_in_the_last_place(backend: Backend) -> None:
    scores = torch.cat([torch.linspace(-80, 80, 3001), torch.logspace(-30, 1, 300), torch.tensor([-1e4, -200.0, 1e4])])
    layout = Batch((User(1, 0),) * len(scores), 0, 1, 1).layout()  # every token is a sequence of its own
    q, one = scores[:, None, None], torch.ones(len(scores), 1, 1)
    out = hstu_attention(q, one, one, layout, alpha=1.0, scaling_seqlen=1, backend=backend).flatten()
    torch.testing.assert_close(out.double(), F.silu(scores.double()), rtol=4e-7, atol=1e-33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_buckets_are_those_of_the_definition_at_every_edge(backend: Backend) -> None:
    edges = torch.exp(torch.arange(1, 128, dtype=torch.float64) * 0.301).long()
    deltas = torch.cat([torch.tensor([0, 1, 2, 3, 2**62]), edges - 1, edges, edges + 1, 2 ** torch.arange(62)]).unique()
    for some in deltas.split(50):
        device = device_of(backend)
        layout = Batch((User(len(some), 0, tuple(some.tolist())),), 0, 1, 1).layout(device=device)
        layout.query_times = torch.zeros(len(some), dtype=torch.int64, device=device)
        bias = RelativeBias(*to([torch.zeros(99), torch.arange(NUM_TIME_BUCKETS, dtype=torch.float32)], device))
        zeros, one_hot = to([torch.zeros(len(some), 1, 50), torch.eye(len(some), 50)[:, None]], device)
        out = hstu_attention(
            *(zeros, zeros, one_hot, layout), alpha=1.0, scaling_seqlen=1, is_causal=False, bias=bias, backend=backend
        )
        # The weight of a pair is SiLU(its bucket), which tells neighbouring buckets apart.
        torch.testing.assert_close(
            out[0, 0, : len(some)].cpu(), F.silu(time_buckets(some).float()), rtol=1e-5, atol=1e-6
        )


def results_by_threads(run: Callable[[], list[Tensor]], counts: Sequence[int] = (1, 2, 5, 2)) -> list[list[Tensor]]:
    """What ``run`` returns on so many threads."""
    results, before = [], torch.get_num_threads()
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


@pytest.mark.skipif(INTERPRETED, reason="one thread interprets")
@pytest.mark.parametrize("backend", [Backend.CPU])
def test_results_have_the_same_bits_on_any_number_of_threads(backend: Backend) -> None:
    batch = Batch(tuple(User(n, 0, tuple(range(0, 9 * n, 9))) for n in (90, 3, 70, 41)), 1, 1, 1)
    tokens = batch.layout().num_tokens
    leaves = attention_inputs(tokens, 2, 20, torch.float32, strided=True, backend=backend)
    grad_out = torch.randn(tokens, 2, 20)

    def run() -> list[Tensor]:
        layout = batch.layout()
        return differentiate(
            lambda q, k, v, p, t: hstu_attention(
                q, k, v, layout, alpha=0.2, scaling_seqlen=90, bias=RelativeBias(p, t), backend=backend
            ),
            leaves,
            grad_out,
        )

    first, *others = results_by_threads(run)
    assert all(all(map(torch.equal, first, other)) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=examples(30))
@given(
    tokens=st.sampled_from([0, 1, 5, 30 if INTERPRETED else 300]),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 5, 16, 50]),
    dtype=st.sampled_from(TYPES),
    dropout=st.sampled_from([0.0, 0.3]),
    projected=st.booleans(),
)
def test_the_gate_equals_float64(
    backend: Backend, tokens: int, heads: int, width: int, dtype: torch.dtype, dropout: float, projected: bool
) -> None:
    """``projected``: u is a pre-activation."""
    if backend is Backend.TRITON:
        dropout = 0.0  # its pattern is its own; see triton/test_operators.py
    torch.manual_seed(width)
    x, u = torch.randn(tokens, heads, width).to(dtype), torch.randn(tokens, heads, 2, width).to(dtype)[:, :, 1]
    leaves = [x, u, *torch.randn(2, heads * width), *([torch.randn(heads, width)] if projected else [])]
    grad_out = torch.randn(tokens, heads * width).to(dtype)

    def run(leaves: list[Tensor], grad_out: Tensor, backend: Backend) -> list[Tensor]:
        torch.manual_seed(7)  # both drop the same elements
        config = GateConfig(0.05, dropout)
        return differentiate(
            lambda *x: norm_mul_dropout(x[:4], config, backend, *x[4:]), to(leaves, device_of(backend)), grad_out
        )

    got = run(leaves, grad_out.to(device_of(backend)), backend)
    if projected:  # the rounding of the sum of u and shift is no error of a kernel
        assert got[5].dtype == torch.float32
        leaves[1], leaves[4] = u + leaves[4].to(dtype), torch.zeros(heads, width)
    expected = run([x.double() for x in leaves], grad_out.double(), Backend.PYTORCH)
    assert_near(got, expected, 3 * TOLERANCE[backend][dtype])


@pytest.mark.skipif(INTERPRETED, reason="one thread interprets")
@pytest.mark.parametrize("backend", [Backend.CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(1, 5), (3, 5), (1, 16), (2, 21), (1, 50)])
def test_each_row_of_the_gate_depends_on_itself_alone_and_not_on_the_threads(
    backend: Backend, heads: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(width)
    x, u = torch.randn(600, heads, width).to(dtype), torch.randn(600, heads, 2, width).to(dtype)[:, :, 1]
    affine, grad_out = torch.randn(2, heads * width).unbind(), torch.randn(600, heads * width).to(dtype)

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        return differentiate(lambda *x: norm_mul_dropout(x, GateConfig(0.05, 0.3), backend), [x, u, *affine], grad_out)

    expected, repeated = results_by_threads(run, (1, 3))
    assert all(map(torch.equal, repeated, expected))
    x[300] = torch.nan
    (got,) = results_by_threads(run, (2,))
    others = torch.arange(600) != 300
    for ours, whole in zip(got[:3], expected[:3], strict=True):  # out, grad_x, grad_u
        assert ours[300].isnan().all() and torch.equal(ours[others], whole[others])


def loss_and_gradients(vectors: Sequence[Tensor], negatives: Negatives, backend: Backend) -> list[Tensor]:
    """The loss of queries, positives and a pool on the backend's device, and three times its gradients."""
    vectors = to(vectors, device_of(backend))
    return differentiate(lambda *vectors: softmax_loss(vectors, negatives, backend), vectors, torch.tensor(3.0))


@pytest.mark.parametrize(("backend", "packed"), SAMPLED_LOSS)
@settings(deadline=None, max_examples=examples(30))
@example(**ONE_ROW, queries=MANY_QUERIES, draws=15, temperature=1.0, index_type=torch.int64, weighted=True)
@example(**ONE_ROW, queries=MANY_QUERIES, draws=40, temperature=1.0, index_type=torch.int32, weighted=False)
@example(**ONE_ROW, queries=1, draws=16, temperature=0.01, index_type=torch.int32, weighted=True)
@given(
    queries=st.sampled_from([0, 1, 7, MANY_QUERIES]),
    pool_size=st.sampled_from([1, 3, 90]),
    draws=st.sampled_from([0, 1, 15, 16, 40, 300]),
    width=st.sampled_from([1, 16, 19, 40, 50, 64, 100, 256]),
    temperature=st.sampled_from([1.0, 0.05, 0.01]),
    index_type=st.sampled_from([torch.int32, torch.int64]),
    weighted=st.booleans(),
    masks=st.booleans(),
)
def test_the_sampled_loss_equals_float64(
    backend: Backend,
    packed: bool,
    queries: int,
    pool_size: int,
    draws: int,
    width: int,
    temperature: float,
    index_type: torch.dtype,
    weighted: bool,
    masks: bool,
) -> None:
    torch.manual_seed(draws)
    leaves = [F.normalize(torch.randn(rows, width), dim=1) for rows in (queries, queries, pool_size)]
    drawn = torch.randint(pool_size, (queries, draws)).to(index_type)
    target_ids, pool_ids = torch.randint(5, (queries,)), torch.randint(9, (pool_size,))
    log_weights = 3 * torch.randn(pool_size) if weighted else torch.zeros(pool_size)
    seen = make_seen(queries, pool_size) if masks else None
    negatives = Negatives(target_ids, pool_ids, temperature, log_weights if weighted else None, seen, drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.ops.cpu.softmax_loss.DRAWS_PER_PACKED_ROW", 0 if packed else 2**40)
        got = loss_and_gradients(leaves, negatives, backend)
    expected = loss_and_gradients([x.double() for x in leaves], negatives, Backend.PYTORCH)
    # A score of size 1 / temperature is rounded before it is exponentiated.
    inexact = max(1, 0.5 / temperature)
    # Summands of a gradient can cancel. The rounding of n of them in float32 follows √n and their size, not their sum.
    # To see them, give each query a copy of the pool, from which it draws alone.
    copies = max(queries, 1)
    of_copies = Negatives(
        target_ids,
        pool_ids.repeat(copies),
        temperature,
        log_weights.repeat(copies),
        None if seen is None else seen._replace(first=seen.first.repeat(1, copies)),
        drawn + pool_size * torch.arange(queries)[:, None],
    )
    vectors = [x.double() for x in (*leaves[:2], leaves[2].repeat(copies, 1))]
    *_, of_positives, of_rows = loss_and_gradients(vectors, of_copies, Backend.PYTORCH)
    of_query = 2 * of_positives.norm(dim=1).max() if queries else 0.0  # the target's share and the negatives'
    of_row = of_rows.unflatten(0, (-1, pool_size)).abs().sum(0).max()
    unit = torch.finfo(torch.float32).eps * inexact
    # Equal summands, draws of one row by one query, are rounded alike: their error follows n.
    summands = max((queries * draws) ** 0.5, draws / max(pool_size, 1))
    rounding = {1: unit * (draws + 1) ** 0.5 * float(of_query), 3: unit * summands * float(of_row)}
    assert_near(got, expected, TOLERANCE[backend][torch.float32] * inexact, rounding)


@pytest.mark.parametrize("backend", [Backend.CPU])
@pytest.mark.parametrize("packed", [False, True], ids=["rows_in_place", "packed_rows"])
@pytest.mark.parametrize("width", [9, 50, 100])
def test_the_sampled_loss_has_the_same_bits_on_any_number_of_threads(
    backend: Backend, packed: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu.ops.cpu.softmax_loss.DRAWS_PER_PACKED_ROW", 0 if packed else 2**40)
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(rows, width), dim=1) for rows in (300, 300, 40)]
    negatives = Negatives(torch.randint(40, (300,)), torch.arange(40), 0.05, draws=torch.randint(40, (300, 33)))
    first, *others = results_by_threads(lambda: loss_and_gradients(leaves, negatives, backend))
    assert all(all(map(torch.equal, first[1:], other[1:])) for other in others)  # the loss itself is a sum of torch's


@pytest.mark.parametrize("backend", [pytest.param(Backend.CPU, id="cpu")])
@settings(deadline=None, max_examples=examples(25))
@given(
    queries=st.sampled_from([0, 1, 7, MANY_QUERIES]),
    pool_size=st.sampled_from([0, 1, 16, 90, 300]),
    temperature=st.sampled_from([1.0, 0.05, 0.01]),
    weighted=st.booleans(),
    masks=st.booleans(),
    block_elements=st.sampled_from([1 << 18, 60]),
    keeps=st.booleans(),
)
def test_the_pool_loss_equals_float64(
    backend: Backend,
    queries: int,
    pool_size: int,
    temperature: float,
    weighted: bool,
    masks: bool,
    block_elements: int,
    keeps: bool,
) -> None:
    """Also where scores rise from block to block, whether these are kept for the gradient or computed again."""
    torch.manual_seed(pool_size)
    leaves = [F.normalize(torch.randn(rows, 40), dim=1) for rows in (queries, queries, pool_size)]
    target_ids, pool_ids = (torch.randint(9, (n,)) * 2**32 for n in (queries, pool_size))  # equal in the lower bits
    log_weights = torch.randn(pool_size).masked_fill(torch.rand(pool_size) < 0.2, -torch.inf) if weighted else None
    seen = make_seen(queries, pool_size) if masks else None
    negatives = Negatives(target_ids, pool_ids, temperature, log_weights, seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.ops.cpu.softmax_loss.POOL_BLOCK_ELEMENTS", 8 * block_elements if keeps else block_elements)
        patch.setattr("hstu.ops.cpu.softmax_loss.POOL_BLOCK_ROWS", 3)
        patch.setattr("hstu.ops.cpu.softmax_loss.POOL_KEPT_ROWS", 5)
        patch.setattr("hstu.ops.cpu.softmax_loss.POOL_KEPT_ELEMENTS", 1 << 22 if keeps else 4)
        got = loss_and_gradients(leaves, negatives, backend)
    expected = loss_and_gradients([x.double() for x in leaves], negatives, Backend.PYTORCH)
    assert_near(got, expected, 4 * TOLERANCE[backend][torch.float32] * max(1, 0.5 / temperature))


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_any_score_have_a_finite_loss_and_exact_gradients(backend: Backend) -> None:
    """Scores of 100 above and below the target, whose exponentials would be infinite or zero, also in later chunks."""
    leaves = [torch.zeros(4, 20), torch.zeros(4, 20), torch.zeros(90, 20)]
    leaves[0][:, 0] = 1
    leaves[1][:, 0] = torch.tensor([-1.0, 1.0, -1.0, 0.2])
    leaves[2][:, 0] = torch.linspace(-1, 1, 90)
    draws = torch.stack([torch.arange(90), torch.arange(90), torch.full((90,), 0), torch.arange(89, -1, -1)])
    draws = torch.cat([draws, draws], dim=1)
    for drawn in (None, draws):
        negatives = Negatives(torch.full((4,), 200), torch.arange(90), 0.01, draws=drawn)
        expected = loss_and_gradients([x.double() for x in leaves], negatives, Backend.PYTORCH)
        assert_near(loss_and_gradients(leaves, negatives, backend), expected, 2e-5)


@pytest.mark.parametrize("backend", WITHOUT_A_GPU)
@settings(deadline=None, max_examples=examples(20))
@given(
    rows=st.sampled_from([0, 1, 70]), width=st.sampled_from([2, 15, 16, 17, 50, 300]), eps=st.sampled_from([1e-6, 5.0])
)
def test_unit_vectors_equal_float64(backend: Backend, rows: int, width: int, eps: float) -> None:
    torch.manual_seed(width)
    vectors, grad_out = torch.randn(rows, width), torch.randn(rows, width)
    device = device_of(backend)
    got = differentiate(lambda x: kernels_of(backend).l2_normalize(x, eps), [vectors.to(device)], grad_out.to(device))
    expected = differentiate(
        lambda x: kernels_of(Backend.PYTORCH).l2_normalize(x, eps), [vectors.double()], grad_out.double()
    )
    assert_near(got, expected, TOLERANCE[backend][torch.float32])
