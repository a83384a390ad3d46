"""Exports of models with other settings, and the use of one in an environment with torch alone. Slow."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.export import TOLERANCE
from hstu.serve.loaded import LoadedModel
from hstu.serve.runtime import History, Recommendation, load
from hstu.serve.runtime.files import read_tables
from scripts.export import main as export_command
from tests.serve.random_requests import largest_difference
from tests.serve.served import BIAS, EVERY_FEATURE, feature_store, random_model, serve
from tests.train.tiny import ITEMS, OF_THE_ACTION, FinishedRun

pytestmark = pytest.mark.slow

WINDOW = {"max_attention_span": 3, "min_full_attention_tokens": 2, "truncate_after_layer": 1, "truncate_to_items": 3}
ADDED = {"interleave_actions": False, "contextual_embedding_dim": 6}
SEES_ALL = {"is_causal": False, "disable_contextual_mask": False}
CANDIDATES = {"max_num_candidates": 3}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("retrieval", {}),
    "time of the last event": ("retrieval", {"network": BIAS, "dataset": {"query_time": "last_event"}}),
    "every feature": ("retrieval", {"network": BIAS, "dataset": EVERY_FEATURE}),
    "added actions": ("retrieval", {"network": {**BIAS, **ADDED}, "dataset": EVERY_FEATURE}),
    "no actions": (
        "retrieval",
        {
            "dataset": {
                "action_feature_name": "",
                "side_feature_names": ["device", "watched"],
                "known_after": ["watched"],
            }
        },
    ),
    "window and truncation": ("retrieval", {"network": {**BIAS, **WINDOW}}),
    "dynamic": ("retrieval", {"dynamic": True}),
    "raw ids": ("retrieval", {"dynamic": True, "raw": True, "dataset": {"side_feature_names": ["colour", "price"]}}),
    "raw ids, tower": (
        "retrieval",
        {
            "dynamic": True,
            "raw": True,
            "dataset": {"side_feature_names": ["colour", "tags"]},
            "task_args": {"item_tower": True},
        },
    ),
    "every event": ("ranking", {"network": BIAS, "dataset": EVERY_FEATURE}),
    "every event, window": ("ranking", {"network": {**BIAS, "max_attention_span": 3}}),
    "every event, window and truncation": ("ranking", {"network": {**BIAS, **WINDOW}}),
    "bit tasks": ("ranking", {"task_args": {"prediction_head_arch": [8, 2], "num_tasks": 2}}),
    "candidates": ("ranking", {"network": {**BIAS, **SEES_ALL}, "dataset": CANDIDATES}),
    "candidates, added actions": (
        "ranking",
        {"network": {**BIAS, **ADDED}, "dataset": {**EVERY_FEATURE, **CANDIDATES}, "task_args": OF_THE_ACTION},
    ),
    "candidates, window and truncation": ("ranking", {"network": {**BIAS, **WINDOW}, "dataset": CANDIDATES}),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, SequenceStore]:
    """Whether raw ids are kept → the data."""
    root = tmp_path_factory.mktemp("stores")
    large = np.sort(np.random.default_rng(0).integers(-(2**60), 2**60, ITEMS)).tolist()
    return {False: feature_store(root / "a"), True: feature_store(root / "b", item_ids=large, raw=("item_id",))}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_export_computes_what_the_model_computes(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path, name: str
) -> None:
    task, options = SETTINGS[name]
    options = dict(options)
    trained = random_model(task, stores[options.pop("raw", False)], mesh, tmp_path, **options)
    served = serve(trained, tmp_path / "serving")
    assert largest_difference(trained, served.model) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_tables_of_fewer_bits_are_close(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path, dtype: str, largest: float
) -> None:
    trained = random_model("retrieval", stores[False], mesh, tmp_path)
    served = serve(trained, tmp_path / "serving", table_dtype=dtype)
    rows = trained.model.rows_of({"item_id": torch.arange(ITEMS)})["item_id"].detach()
    places = served.model.encoder.items.rows(range(1000, 1000 + ITEMS))
    found = read_tables(served.folder / "tables.safetensors")["item_id_table"].rows(places)
    assert 0 < ((found - rows).abs() / rows.abs().amax(dim=1, keepdim=True)).max() <= largest


@pytest.mark.timeout(1200)
def test_a_compiled_program_computes_the_same(mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path) -> None:
    served = serve(random_model("retrieval", stores[False], mesh, tmp_path), tmp_path / "serving", compiles=True)
    compiled = load(served.folder, compiled=True)
    for items in ([1000], [1000, 1001, 1005]):
        history = History(items=items, actions=[1] * len(items))
        torch.testing.assert_close(compiled.embed(history), served.model.embed(history), rtol=1e-5, atol=1e-5)


def test_the_command_writes_a_folder_that_recommends_as_the_run_does(
    finished: Callable[[str], FinishedRun],
    loaded: Callable[[str], LoadedModel],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scripts.export.mesh_of_this_process", lambda: loaded("retrieval").mesh)
    output = here / "export"
    checkpoints = str(finished("retrieval").path.parent / "checkpoints")
    assert export_command(["--ckpt", checkpoints, "--output", str(output), "--program"]) == 0
    model = load(output / "serving")
    rows = loaded("retrieval").model.embed_items(torch.arange(ITEMS))
    vectors = model.item_vectors(range(1000, 1000 + ITEMS))
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(rows), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        export_command(["--ckpt", checkpoints, "--output", str(here / "other"), "--aot"])


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import hstu_serving
model = hstu_serving.load(sys.argv[1])
histories = [hstu_serving.History(**each) for each in json.load(open(sys.argv[2]))]
found = model.recommend_batch(histories, k=3, at=2_000_000_000)
absent = {"numpy", "pandas", "hstu", "torchrec", "megatron", "safetensors"}
print(json.dumps([[vars(each) for each in found], sorted(absent & set(sys.modules))]))
"""


@pytest.mark.timeout(1200)
def test_an_export_is_used_in_an_environment_with_torch_alone(
    mesh: Mesh, stores: dict[bool, SequenceStore], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"network": BIAS, "dataset": {"side_feature_names": ["colour", "tags", "price"]}}
    served = serve(random_model("retrieval", stores[False], mesh, tmp_path, **options), tmp_path / "serving")
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    version = torch.__version__.partition("+")[0]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"torch=={version}"], capture_output=True, text=True, timeout=900
    )
    if installed.returncode:
        pytest.skip(f"pip cannot install torch {version} here: {installed.stderr[-300:]}")
    given = [{"items": [1000, 1003, 7], "actions": [1, 2, 0], "timestamps": [5, 6, 900], "context": {"town": 1}}]
    (tmp_path / "histories.json").write_text(json.dumps(given))
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [python, tmp_path / "script.py", served.folder, tmp_path / "histories.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found, imported = json.loads(result.stdout)
    assert imported == []
    (expected,) = served.model.recommend_batch([History(**given[0])], k=3, at=2_000_000_000)
    ours = Recommendation(**found[0])
    assert ours.items == expected.items and ours.scores == pytest.approx(expected.scores, abs=1e-5)
