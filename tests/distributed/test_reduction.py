from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from hstu.config.args import DataParallelArgs
from hstu.data.sampling.sampler import SamplerPosition
from hstu.parallel import data_parallel
from hstu.parallel.data_parallel import ReplicatedDense, fully_sharded, own_gradients_finite
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import assemble, make_config, write_store

LARGE = {"num_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "kv_channels": 32}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = ((1 + 2**-9, 3.0, 60000.0), (1.0, 3 + 2**-20, 62000.0))
"""Of three weights, on each rank. One has 9 bits behind the point, of which bfloat16 holds 7; the last are large."""
TOO_LARGE = 2**17


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    store = write_store(tmp_path_factory.mktemp("reduction") / "store")
    return run_cases(
        Launch(2, timeout_s=120),
        {
            **{f"sent as {dtype}": partial(sent_as, dtype=dtype) for dtype in DTYPES},
            **{f"exact {exact}": partial(train_with, store=store, exact=exact) for exact in (True, False)},
            "sharded": partial(train_with, store=store, exact=False, sharding="weights"),
            "gathered whole": partial(train_gathering_whole_weights, store=store),
            "buckets": partial(buckets_sent, store=store),
        },
    )


def sent_as(mesh: Mesh, dtype: torch.dtype) -> dict[str, Any]:
    """What DDP makes of GRADIENTS, and whether a rank notices a gradient that this type has no number for."""
    dense = ReplicatedDense(torch.nn.Linear(3, 1, bias=False), mesh.dp_group, dtype)
    weight = dense.module.weight
    (dense(torch.tensor([GRADIENTS[mesh.rank]])).sum()).backward()
    averaged = [weight.grad.dtype == torch.float32, weight.grad.flatten().tolist()]
    finite = [bool(own_gradients_finite(dense))]
    weight.grad = None
    (dense(torch.full((1, 3), float(TOO_LARGE if mesh.rank else 1))).sum()).backward()
    return {"averaged": averaged, "finite": [*finite, bool(own_gradients_finite(dense))]}


def train_with(mesh: Mesh, store: str, exact: bool, sharding: str = "none") -> tuple[torch.dtype, list[float]]:
    """In bfloat16: what a run sends its gradients as, and its losses. ``exact``: PrecisionArgs.fp32_master_grads."""
    precision = {"fp32_master_grads": exact}
    config = make_config(store, "none", network={"dtype_str": "bfloat16"}, precision=precision)
    config = replace(config, data_parallel=DataParallelArgs(sharding=sharding))
    pipeline, source, _, _ = assemble(config, mesh)
    batches = source.train_batches(SamplerPosition())
    losses = [float(pipeline.progress(batches).loss) for _ in range(3)]
    dense = pipeline.step.model.dense
    sent_as: torch.dtype = vars(fully_sharded(dense) or dense)["sent_as"]
    return sent_as, losses


def train_gathering_whole_weights(mesh: Mesh, store: str) -> tuple[torch.dtype, list[float]]:
    """The run "sharded", with weights that are gathered in float32."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data_parallel, "ROUNDED_WEIGHTS", ())
        return train_with(mesh, store, exact=False, sharding="weights")


def buckets_sent(mesh: Mesh, store: str) -> list[int]:
    """Of the third step's backward: how many all-reduces had begun when each parameter's gradient was ready."""
    pipeline, source, _, _ = assemble(make_config(store, "none", network=LARGE), mesh)
    dense = pipeline.step.model.dense
    assert isinstance(dense, ReplicatedDense)
    begun: list[int] = []
    for parameter in dense.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: begun.append(len(dense.own_finite)))
    batches = source.train_batches(SamplerPosition())
    for _ in range(3):  # DDP cuts the buckets after the first step, by the order of that
        begun.clear()
        pipeline.progress(batches)
    return begun


def test_gradients_are_reduced_while_backward_goes_on(told: Any) -> None:
    for rank in told:
        begun = rank["buckets"]
        assert max(begun) > 1
        assert sum(count > 0 for count in begun) > len(begun) / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_sent_in_the_type_asked_for(told: Any, dtype: torch.dtype) -> None:
    exact = torch.tensor(GRADIENTS)
    expected = (exact.to(dtype) / 2).sum(0).float()
    for number, rank in enumerate(told):
        sent = rank[f"sent as {dtype}"]
        assert sent["averaged"] == [True, expected.tolist()]
        assert sent["finite"] == [True, number == 0 or dtype != torch.float16]
    assert bool((expected == exact.mean(0)).all()) == (dtype == torch.float32)


def test_a_run_sends_its_gradients_as_it_is_told(told: Any) -> None:
    for rank in told:
        (exact, exact_losses), (rounded, losses) = rank["exact True"], rank["exact False"]
        assert (exact, rounded) == (torch.float32, torch.bfloat16)
        assert losses == pytest.approx(exact_losses, rel=1e-3) and losses != exact_losses
        sent, of_shards = rank["sharded"]
        assert sent == torch.bfloat16 and of_shards == pytest.approx(losses, rel=1e-6)
        assert rank["gathered whole"] == rank["sharded"], "weights are rounded before they are sent as they are after"
