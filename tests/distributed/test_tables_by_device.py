"""Tables train what plain ones train wherever their rows lie, however they are sharded, in every pipeline.

On a GPU and on a CPU, in one process each: NCCL cannot give one GPU to two ranks. TorchRec shards a table of one rank
by the same code, into one shard. A CPU has one kind of memory, so there kernels for host memory are replaced; the runs
on it show that the comparison itself works.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import PIPELINES, STEPS, assemble, make_config, train, write_store
from tests.train.tiny import tables_of

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="ranks use the GPU of this machine")),
    pytest.param(
        "cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="NEEDS AN NVIDIA GPU: tables on it"))
    ),
]
PLACES = {"fused": "DEVICE", "fused_uvm": "MANAGED", "fused_uvm_caching": "MANAGED_CACHING"}
"""EmbeddingArgs.compute_kernel → where FBGEMM then has the rows on a GPU."""
SHARDINGS = ("column_wise", "table_wise")
OPTIMIZERS = ("adam", "rowwise_adagrad")


def trained(
    mesh: Mesh, store: str, pipeline: str, kernel: str = "fused", sharding: str = "row_wise", optimizer: str = "adam"
) -> dict[str, Any]:
    """Losses, metrics and positions of some steps, the device, and where the rows of the sharded tables lie."""
    used = {"item_id", "action", "town"}
    tables = tuple(
        replace(table, compute_kernel=kernel) if table.sharding_type == "model_parallel" else table
        for table in tables_of(SequenceStore.open(store), ("item_id", "town"), sharding)
        if used.issuperset(table.feature_names)
    )
    options: dict[str, Any] = {"tables": tables, "optimizer": {"optimizer_str": optimizer, "learning_rate": 0.01}}
    # The same modules that the steps use, built for their places alone.
    *_, state = assemble(make_config(store, pipeline, **options), mesh)
    places = {spec[2].name for module in state.model.modules() for spec in vars(module).get("embedding_specs", ())}
    told = train(mesh, store, pipeline, **options)
    del told["weights"]  # a hash, which says nothing of numbers that are close
    return told | {"device": mesh.device.type, "places": places}


CASES: dict[str, dict[str, Any]] = {
    **{f"plain, {optimizer}": {"pipeline": "none", "optimizer": optimizer} for optimizer in OPTIMIZERS},
    **{
        f"{kernel}, {pipeline}, {optimizer}": {"pipeline": pipeline, "kernel": kernel, "optimizer": optimizer}
        for optimizer in OPTIMIZERS
        for pipeline in ("none", "prefetch")
        for kernel in ("fused_uvm", "fused_uvm_caching")
    },
    **{sharding: {"pipeline": "none", "sharding": sharding} for sharding in SHARDINGS},
    **{pipeline: {"pipeline": pipeline} for pipeline in PIPELINES[1:]},
}
"""Options of runs."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case → what its run tells."""
    store = write_store(tmp_path_factory.mktemp("devices") / "store")
    return run_cases(
        Launch(1, timeout_s=150), {name: partial(trained, store=store, **options) for name, options in CASES.items()}
    )[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("plain")])
def test_tables_train_the_same_wherever_rows_lie_however_sharded_and_in_every_pipeline(
    runs: dict[str, Any], case: str, device: str
) -> None:
    run, plain = runs[case], runs[f"plain, {CASES[case].get('optimizer', 'adam')}"]
    assert run["device"] == plain["device"] == device
    assert len(set(plain["losses"])) == STEPS, "the runs that are compared train"
    assert run["positions"] == plain["positions"]
    tolerance = 0 if device == "cpu" else 1e-4
    assert run["losses"] == pytest.approx(plain["losses"], rel=tolerance, abs=0)
    if device == "cuda" and "kernel" in CASES[case]:
        assert PLACES[CASES[case]["kernel"]] in run["places"] and run["places"] != plain["places"]
