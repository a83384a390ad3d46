"""A layer whose tokens and heads are split over real ranks computes what one rank does, for batches drawn at random."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.kernels import AttentionConfig, Backend
from hstu.ops.layer import HSTULayerConfig, HSTULayerFunction, LayerWeights
from hstu.ops.layout import NUM_TIME_BUCKETS
from hstu.parallel.layer_comm import ProcessGroupComm
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, free_port, run_ranks, started_mesh
from tests.ops.backends import kernels_of
from tests.ops.strategies import Batch, batches
from tests.ops.test_layer import CUT

HIDDEN, WIDTH, LONGEST = 6, 3, 40


class Grid(NamedTuple):
    """How ranks share a layer."""

    tp: int
    cp: int
    heads: int = 4
    serves_ranges: bool = True
    sequence_parallel: bool = False


GRIDS = (
    *(Grid(1, 4, serves_ranges=False), Grid(2, 2, serves_ranges=False), Grid(1, 4), Grid(1, 4, heads=2)),
    *(Grid(1, 4, heads=1), Grid(2, 2, heads=2), Grid(2, 2, heads=2, sequence_parallel=True)),
    *(Grid(1, 3, heads=heads) for heads in (1, 3, 4)),
)


class Case(NamedTuple):
    """A batch, and what its tokens see."""

    batch: Batch
    is_causal: bool
    contextual_mask: bool
    has_bias: bool
    max_span: int | None
    full_tokens: int
    recompute_all: bool


def drawn_cases() -> list[Case]:
    cases: list[Case] = []
    span, full, flag = st.none() | st.integers(1, 6), st.integers(0, 4), st.booleans()

    @settings(max_examples=25, derandomize=True, database=None, deadline=None)
    @given(st.builds(Case, batches(), flag, flag, flag, span, full, flag))
    def draw(case: Case) -> None:
        cases.append(case)

    draw()
    return cases


def run_layer(
    case: Case, x: Tensor, slope: Tensor, weights: LayerWeights, comm: LayerComm, serves_ranges: bool = True
) -> list[Tensor]:
    """Output and gradients of a layer, which is given the whole batch."""
    attention = AttentionConfig(
        0.6, LONGEST, case.is_causal, case.contextual_mask, max_span=case.max_span, full_tokens=case.full_tokens
    )
    kernels = kernels_of(Backend.PYTORCH, WIDTH, has_bias=case.has_bias)
    kernels = replace(kernels, attention=replace(kernels.attention, serves_ranges=serves_ranges))
    config = HSTULayerConfig(WIDTH, attention, 0.1, kernels, recompute_all=case.recompute_all, comm=comm)
    leaves = [w.detach().clone().requires_grad_() for w in weights if w is not None]
    given_weights = iter(leaves)
    x = x.clone().requires_grad_()
    shares = [len(tokens) for tokens in comm.token_ranges(len(x))]
    own, layout = comm.split_tokens(comm.take_rows(x, shares), case.batch.layout())
    out, update = HSTULayerFunction.apply(
        own, None, layout, config, *(None if w is None else next(given_weights) for w in weights)
    )
    out = comm.gather_rows(comm.join_tokens(out + update, len(x)), shares)
    return [out.detach(), *torch.autograd.grad(out, [x, *leaves], slope)]


def errors(mesh: Mesh, case: Case, grid: Grid) -> list[float]:
    """How far output and gradients of this rank are from those of one rank, relative to their largest numbers."""
    torch.manual_seed(0)
    inner = grid.heads * WIDTH
    shapes: list[Any] = [(HIDDEN,)] * 2 + [(4 * inner, HIDDEN), (4 * inner,)]
    shapes += [(2 * LONGEST - 1,), (NUM_TIME_BUCKETS,)] if case.has_bias else [None, None]
    shapes += [(inner,), (inner,), (HIDDEN, inner), (HIDDEN,)]
    whole = LayerWeights(*(None if shape is None else torch.randn(shape).double() for shape in shapes))  # type: ignore
    x = torch.randn(case.batch.layout().num_tokens, HIDDEN).double()
    slope = torch.randn_like(x)
    expected = run_layer(case, x, slope, whole, LayerComm())
    parts = LayerWeights(*(_cut(w, dim, mesh) for w, dim in zip(whole, CUT, strict=True)))
    found = run_layer(case, x, slope, parts, ProcessGroupComm(mesh, grid.sequence_parallel), grid.serves_ranges)
    for gradient in found[2:]:  # as DDP does
        dist.all_reduce(gradient, group=mesh.cp_group)
        gradient /= mesh.cp_size
    dims = [None, None, *(dim for w, dim in zip(whole, CUT, strict=True) if w is not None)]
    exact = [_cut(tensor, dim, mesh) for tensor, dim in zip(expected, dims, strict=True)]
    scale = [float(tensor.abs().max()) if tensor.numel() else 1.0 for tensor in expected]
    return [
        float((ours - theirs).abs().max()) / max(size, 1e-3) if ours.numel() else 0.0
        for ours, theirs, size in zip(found, exact, scale, strict=True)
    ]


def _cut(tensor: Any, dim: Any, mesh: Mesh) -> Any:
    return tensor if tensor is None or dim is None else tensor.chunk(mesh.tp_size, dim)[mesh.tp_rank]


def compare(cases: list[Case], ports: dict[Grid, int]) -> dict[Grid, list[float]]:
    """On a rank: the largest error of each case."""
    found = {}
    for grid, port in ports.items():
        with started_mesh(grid.tp, grid.cp, port) as mesh:
            found[grid] = [max(errors(mesh, case, grid)) for case in cases]
    return found


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return drawn_cases()


@pytest.fixture(scope="module")
def by_rank(cases: list[Case]) -> list[dict[Grid, list[float]]]:
    found: list[dict[Grid, list[float]]] = []
    for ranks in (3, 4):
        ports = {grid: free_port() for grid in GRIDS if grid.tp * grid.cp == ranks}
        found += run_ranks(Launch(ranks, timeout_s=150), compare, cases, ports)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_random_batches_give_what_one_rank_gives(cases: list[Case], by_rank: Any, grid: Grid) -> None:
    for rank, found in enumerate(of_rank for of_rank in by_rank if grid in of_rank):
        wrong = [(case, error) for case, error in zip(cases, found[grid], strict=True) if not error < 1e-10]
        assert not wrong, f"rank {rank}: {wrong[0]}"
