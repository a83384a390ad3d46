"""Checkpoints of other trainers, written here in their layouts from models by the formulas of arXiv 2402.17152."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.base.errors import UserError
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.loaded import LoadedModel
from hstu.train.importing import import_checkpoint
from tests.distributed.launch import run_script
from tests.serve.served import BIAS, PUBLISHED
from tests.train.test_untrusted_checkpoints import Attack
from tests.train.tiny import ACTIONS, ITEMS, tables_of, tables_with_dynamic, tiny_config

D, H, C, MOST, RAW = 16, 2, 8, 11, 1000  # RAW: raw id of the first item
RESEARCH = BIAS | PUBLISHED | {"attention_scale": 1.0, "norm_epsilon": 1e-6, "scaling_seqlen": MOST}
RESEARCH |= {"num_position_buckets": 9}
ALONE: Any = {"task": "retrieval", "dataset": {"action_feature_name": "", "contextual_feature_names": []}}
SIZES = {"uvqk": (D, H, 4, C), "o": (D, H * C), "o.b": (D,)}
LEARNED = {"uvqk.b": (H, 4, C), "in.w": (D,), "in.b": (D,), "out.w": (H * C,), "out.b": (H * C,)}


def layer(x: Tensor, w: Mapping[str, Tensor], n: int, alpha: float, eps: float, bias: Tensor | float = 0.0) -> Tensor:
    y = F.layer_norm(x, (D,), w.get("in.w"), w.get("in.b"), eps)
    u, v, q, k = F.silu(torch.einsum("td,dhsc->thsc", y, w["uvqk"]) + w.get("uvqk.b", torch.zeros(()))).unbind(2)
    scores = F.silu(alpha * torch.einsum("ihc,jhc->hij", q, k) + bias) / n * torch.ones(len(x), len(x)).tril()
    attended = torch.einsum("hij,jhc->ihc", scores, v).flatten(1)
    gated = F.layer_norm(attended, (H * C,), w.get("out.w"), w.get("out.b"), eps) * u.flatten(1)
    return x + gated @ w["o"].T + w["o.b"]


def randn(*size: Any) -> Tensor:
    return torch.randn(*size) * 0.3


def rows(batch: HSTUBatch, feature: str) -> tuple[Tensor, ...]:
    return batch.features[feature].values().split(batch.features[feature].lengths().tolist())[: batch.real_batch_size]


def research_file(path: Path) -> Callable[[HSTUBatch], Tensor]:
    """Write a checkpoint of the research code. Returns the queries that its model computes."""
    items, positions, times, distances = randn(RAW + 15, D), randn(MOST, D), randn(2, 129), randn(2, 2 * MOST - 1)
    layers = [{name: randn(size) for name, size in SIZES.items()} for _ in range(2)]
    state = {"_embedding_module._item_emb.weight": items, "_input_features_preproc._pos_emb.weight": positions}
    for index, w in enumerate(layers):
        own = {"_uvqk": w["uvqk"].transpose(1, 2).flatten(1), "_o.weight": w["o"], "_o.bias": w["o.b"]}
        own |= {"_rel_attn_bias._ts_w": times[index], "_rel_attn_bias._pos_w": distances[index]}
        state |= {f"module._hstu._attention_layers.{index}.{name}": each for name, each in own.items()}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}, path)

    def query(ids: Tensor, seconds: Tensor) -> Tensor:
        x, places = items[RAW + ids] * math.sqrt(D) + positions[: len(ids)], torch.arange(len(ids))
        passed = torch.cat([seconds[1:], seconds[-1:]])[:, None] - seconds
        buckets = (passed.abs().clamp(min=1).double().log() / 0.301).long()
        for w, by_time, by_distance in zip(layers, times, distances, strict=True):
            bias = by_time[buckets] + by_distance[places - places[:, None] + MOST - 1]
            x = layer(x, w, MOST, 1.0, 1e-6, bias)
        return F.normalize(x[-1], dim=0)

    def queries(batch: HSTUBatch) -> Tensor:
        assert batch.items.timestamps is not None
        seconds = batch.items.timestamps.split(batch.features["item_id"].lengths().tolist())
        return torch.stack([query(*each) for each in zip(rows(batch, "item_id"), seconds, strict=False)])

    return queries


def nvidia_directory(path: Path, letters: str = "uvqk") -> Callable[[HSTUBatch], Tensor]:
    """Write a checkpoint of four ranks, two per model, and of a table in two parts. Returns its model's logits."""
    order = ["uvqk".index(letter) for letter in letters]
    tables = {"item_id": randn(ITEMS, D), "town": randn(3, D), "action": randn(ACTIONS, D)}
    layers = [{name: randn(size) for name, size in (SIZES | LEARNED).items()} for _ in range(2)]
    positions, hidden, out, keyed = randn(64, D), randn(8, D), randn(ACTIONS, 8), path / "dynamicemb_module" / "model"
    (path / "torch_module").mkdir(parents=True)
    keyed.mkdir(parents=True)
    for rank in range(4):
        state = {
            "_mlp._mlp.0.weight": hidden,
            "_mlp._mlp.2.weight": out,
            "_hstu._position_embeddings_weight": positions,
        }
        state |= {f"_collection.embeddings.{name}.weight": tables[name] for name in ("town", "action")}
        head, own = rank % 2, slice(rank % 2 * C, rank % 2 * C + C)
        for index, w in enumerate(layers):
            uvqk, bias = w["uvqk"][:, head, order].flatten(1), w["uvqk.b"][head, order].flatten()
            of = {"linear_uvqk_weight": uvqk if letters == "uvqk" else uvqk.T, "linear_uvqk_bias": bias}
            of |= {"linear_proj_weight": w["o"][:, own], "linear_proj_bias": w["o.b"]}
            of |= {"input_layernorm_weight": w["in.w"], "input_layernorm_bias": w["in.b"]}
            of |= {"output_layernorm_weight": w["out.w"][own], "output_layernorm_bias": w["out.b"][own]}
            state |= {f"_hstu._attention_layers.{index}._{name}": each for name, each in of.items()}
        torch.save(state, path / "torch_module" / f"model.{rank}.pth")
        codes = np.arange(ITEMS)[head::2][::-1]
        (RAW + codes).tofile(keyed / f"item_id_emb_keys.rank_{head}.world_size_2")
        tables["item_id"].numpy()[codes].tofile(keyed / f"item_id_emb_values.rank_{head}.world_size_2")

    def logits(batch: HSTUBatch) -> Tensor:
        found = []
        for town, items, actions in zip(*(rows(batch, name) for name in ("town", "item_id", "action")), strict=True):
            pairs = torch.stack([tables["item_id"][items], tables["action"][actions]], 1).flatten(0, 1)
            x = torch.cat([tables["town"][town], pairs]) * math.sqrt(D) + positions[: 1 + 2 * len(items)]
            for w in layers:
                x = layer(x, w, 1 + 2 * 8, C**-0.5, 1e-5)
            found.append(F.relu(x[1::2] @ hidden.T) @ out.T)
        return torch.cat(found)

    return logits


@pytest.mark.parametrize("source", ["meta-research", "nvidia", "nvidia, dynamic table"])
def test_an_imported_model_computes_the_same(store: SequenceStore, mesh: Mesh, tmp_path: Path, source: str) -> None:
    torch.manual_seed(0)
    path, options, layouts = tmp_path / "source", {**ALONE, "network": RESEARCH}, {}
    if source == "meta-research":
        expected = research_file(path)
    else:
        layouts = {"uvqk": "head vukq channel hidden"} if "dynamic" in source else {}
        expected = nvidia_directory(path, "vukq" if layouts else "uvqk")
        tables = tables_with_dynamic(store, 16) if "dynamic" in source else tables_of(store)
        own = [table for table in tables if {*table.feature_names} <= {"item_id", "action", "town"}]
        options = {
            "task": "ranking",
            "tables": tuple(own),
            "task_args": {"prediction_head_bias": False},
            "network": {"output_bias": True},
        }
    config = tiny_config(store=store, output=tmp_path, **options)
    lines = import_checkpoint(source.partition(",")[0], path, config, tmp_path / "imported", layouts, {}, False)
    loaded = LoadedModel.load(tmp_path / "imported", mesh=mesh)
    data, samples = loaded.with_data(), build_samples(store, loaded.dataset, config.task, "all", seed=0)
    is_ranking = config.task == "ranking"
    batch = data.sample_batch(samples, np.arange(20)) if is_ranking else next(iter(data.history_batches(np.arange(8))))
    output = loaded.forward(batch)
    found = output.logits if is_ranking else output.queries
    torch.testing.assert_close(found, expected(batch), atol=1e-5, rtol=1e-5)
    assert not loaded.report and len(lines) == (22 if is_ranking else 14)


def test_the_command_opens_no_socket_and_starts_no_program(store: SequenceStore, tmp_path: Path) -> None:
    research_file(tmp_path / "a.pt")
    config = tiny_config(store=store, output=tmp_path, **ALONE, network=RESEARCH)
    (tmp_path / "a.gin").write_text(config.operative_gin())
    code = """if True:
        import os, socket, subprocess, sys
        from scripts import import_checkpoint as command
        def probe(*arguments, read=command.import_checkpoint):
            for each in (socket.socket, os.fork, lambda: subprocess.run(["true"]), lambda: os.system("true")):
                try:
                    each()
                except command.DataError as error:
                    print(error)
            return read(*arguments)
        command.import_checkpoint = probe
        sys.exit(command.main())"""
    (tmp_path / "probe.py").write_text(code)
    words = ["--from", "meta-research", f"{tmp_path}/a.pt", "--gin-config-file", f"{tmp_path}/a.gin"]
    codes, output = run_script(f"{tmp_path}/probe.py", *words, "--output", f"{tmp_path}/imported")
    assert (codes, output.count("an import opens no connection")) == ([0], 4), output


def test_what_cannot_be_imported_is_refused_by_name(store: SequenceStore, tmp_path: Path) -> None:
    research_file(tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-999])
    torch.save({"model_state_dict": Attack(tmp_path / "ran")}, tmp_path / "code.pt")
    for error, name, network in (
        ("cut.pt is truncated", "cut.pt", {}),
        ("code.pt is refused: it holds more than tensors .*runs code", "code.pt", {}),
        ("set NetworkArgs.attention_scale = 1.0", "a.pt", {"attention_scale": None}),
        ("(?s)do not fit.*uvqk.* → .*layers.1.uvqk.weight.*nothing fills", "a.pt", {"kv_channels": 4}),
        ("(?s)_o.bias .16. → .*no such weight", "a.pt", {"output_bias": False}),
    ):
        config = tiny_config(store=store, output=tmp_path, **ALONE, network=RESEARCH | network)
        with pytest.raises(UserError, match=error):
            import_checkpoint("meta-research", tmp_path / name, config, tmp_path / "imported", {}, {}, False)
    assert not (tmp_path / "imported").exists() and not (tmp_path / "ran").exists()
