"""What runs on each rank in tests/pipeline/test_defects.py: what TorchRec's own pipelines do, unchanged."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from hstu.data.sampler import SamplerPosition
from hstu.parallel import mesh as mesh_module
from tests.distributed.pipeline_cases import assemble, make_config, start


def probe(store: str, kind: str, attach: dict[str, bool] | None = None, **config: Any) -> Any:
    """Losses of 4 steps of TorchRec's pipeline, with ``detach(); attach(**attach)`` after 2; or what it raises."""
    mesh = start()
    pipeline, source, _, _ = assemble(make_config(store, "none", **config), mesh)
    stages = {"native": TrainPipelineSparseDist, "prefetch": PrefetchTrainPipelineSparseDist}[kind]
    torchrec = stages(pipeline.model, pipeline, mesh.device, custom_model_fwd=pipeline.forward)  # type: ignore[arg-type]
    batches, losses = source.train_batches(SamplerPosition()), []
    try:
        for step in range(4):
            losses.append(float(torchrec.progress(batches).loss))
            if attach is not None and step == 1:
                torchrec.detach()
                torchrec.attach(**attach)
    except Exception as error:  # any: this is what the test looks at
        return f"{type(error).__name__}: {error}"
    mesh_module.finish()
    return losses
