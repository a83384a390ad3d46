"""The operator benchmarks: what is measured side by side is the same mathematics, and the reports are complete."""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kernel_variants import Compiled
from torch import Tensor

from hstu.config.args import NetworkArgs
from hstu.model.stack import FusedHSTULayer
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from tests.conftest import REPOSITORY
from tests.ops.backends import hstu_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if run from their directory, with ceilings that take no time."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    monkeypatch.setitem(import_module("harness")._SIZES, "cpu", (128, 1 << 22))
    yield
    if dist.is_initialized():  # a script that has failed, which is no reason for the tests after it to fail
        dist.destroy_process_group()


def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, *arguments: str) -> dict[str, Any]:
    """What a script writes."""
    file = tmp_path / f"{name}.json"
    command = [name, "--rounds", "2", "--no-compile", "--output", str(file), *arguments]
    monkeypatch.setattr("sys.argv", command)
    import_module(name).main()
    written: dict[str, Any] = json.loads(file.read_text())
    assert written["ceilings"]["float32_gflops"] > 0 < written["ceilings_after"]["copy_gb_s"]
    return written


def grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss.square().sum(), leaves))


def test_operations_are_counted_as_the_published_ones() -> None:
    attention, layer = import_module("attention"), import_module("layer")
    shape = attention.Shape(np.array([6, 2]), 3, 5)
    assert shape.flops == 2 * 3 * 5 * (36 + 4)
    forward, backward = layer.Case("", shape, hidden=7).flops()
    linear = 2 * 8 * 7 * (4 * 15 + 15)
    assert forward == pytest.approx(shape.flops + linear)
    assert backward == pytest.approx(2.5 * shape.flops + 2 * linear)


def test_padded_attention_is_ours() -> None:
    padded_attention = import_module("padded_baseline").padded_attention
    shape = import_module("attention").Shape(np.array([9, 9]), 2, 4)
    leaves = [torch.randn(2, 9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    theirs = padded_attention(*leaves, torch.ones(9, 9).tril(), 0.5, 9)
    q, k, v = (x.flatten(0, 1) for x in leaves)
    ours = hstu_attention(q, k, v, shape.layout(CPU), alpha=0.5, scaling_seqlen=9)
    torch.testing.assert_close(ours.view_as(theirs), theirs)
    for a, b in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("position_encoding", [("none",), ("absolute", "relative_bias")])
def test_the_padded_layer_is_ours(position_encoding: tuple[str, ...]) -> None:
    network = NetworkArgs(
        num_layers=1,
        hidden_size=6,
        num_attention_heads=2,
        kv_channels=4,
        hidden_dropout=0.0,
        position_encoding=position_encoding,
    )
    ours, theirs = FusedHSTULayer(network, 9), import_module("padded_baseline").PaddedLayer(network, 9)
    theirs.load_state_dict({name.removeprefix("bias."): weight for name, weight in ours.state_dict().items()})
    times = torch.cat([torch.arange(9), torch.arange(9)]) ** 3 * 1000
    layout = import_module("attention").Shape(np.array([9, 9]), 2, 4).layout(CPU, times)
    x = torch.randn(2, 9, 6)
    padded = theirs(x, times.view(2, 9), torch.ones(9, 9).tril())
    out = torch.add(*ours(x.flatten(0, 1), layout))
    torch.testing.assert_close(out, padded.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_the_sampled_softmax_and_its_gradients_are_those_of_the_usual_code() -> None:
    torch.manual_seed(0)
    operators = import_module("operators")
    sizes = ["--positions", "50", "--pool", "20", "--draws", "9", "--item-dim", "8"]
    softmax = operators.sampled_softmax(operators.parse(sizes), CPU)
    leaves = [each.detach().double().requires_grad_() for each in softmax.leaves()]
    ours, usual = softmax.run(REFERENCE_KERNELS, *leaves)[0], softmax.plain(*leaves)[0]
    torch.testing.assert_close(ours, usual)
    for a, b in zip(grads(ours, leaves), grads(usual, leaves), strict=True):
        torch.testing.assert_close(a, b)


def variants(rows: list[dict[str, Any]]) -> set[str]:
    assert all(row["forward_ms"] > 0 < row["backward_ms"] for row in rows)
    return {row["variant"] for row in rows}


@pytest.mark.slow
def test_attention_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = report(monkeypatch, tmp_path, "attention", "--length", "16", "32", "64", "--tokens", "64")
    everything = {"ours, C++", "ours, PyTorch", "padded", "softmax (SDPA), padded"}
    assert variants(written["lengths"]) == variants(written["distributions"]) == everything
    assert [row["length"] for row in written["lengths"]][::4] == [16, 32, 64]
    assert "ours, C++, relative bias" in variants(written["ml_1m"])


def test_attention_with_a_span_is_timed_without_the_hidden_pairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attention = import_module("attention")
    monkeypatch.setattr(attention, "movielens", lambda *_: [])
    written = report(monkeypatch, tmp_path, "attention", "--length", "64", "--tokens", "64", "--span", "8")
    assert variants(written["lengths"]) == {"ours, C++", "ours, PyTorch"}
    assert max(max(row["errors"].values()) for row in written["lengths"]) < 1e-4
    whole, span = (attention.Shape(np.array([64]), 1, 4, attention.Window(each, 0, 0)) for each in (None, 8))
    assert span.flops < 0.3 * whole.flops


def test_the_layer_and_its_operators_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer, lengths = import_module("layer"), np.array([30, 30])
    shape = import_module("attention").Shape(lengths, 1, 8)
    monkeypatch.setattr(layer, "cases_of", lambda options: [layer.Case("30", shape, 16, relative_bias=True)])
    written = report(monkeypatch, tmp_path, "layer")
    assert variants(written["layers"]) == {"ours, C++", "ours, PyTorch", "padded"}
    assert {row["dtype"] for row in written["layers"]} == {"float32", "bfloat16"}
    assert all("everything else" in parts for parts in written["parts"].values())
    written = report(monkeypatch, tmp_path, "operators", "--tokens", "64")
    assert len(written["operators"]) == 12
    worst = [max(row["errors"]) for row in written["operators"] if "errors" in row]
    assert len(worst) == 6 and max(worst) < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="the whole step runs where the GPU is")
def test_dynamic_tables_report_beside_static_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = report(monkeypatch, tmp_path, "dynamic", "--rows", "3000", "--lookups", "1024")
    slots = {(row["variant"], row["stream"]) for row in written["slots"]}
    assert slots == {
        (f"{kind} {policy}", stream)
        for kind in ("C++", "PyTorch")
        for policy in ("lru", "lfu")
        for stream in ("fits, lookup only", "fits", "evicts")
    }
    train = {(row["variant"], row["stream"]): row for row in written["train"]}
    assert len(train) == 7 * 2 and all(row["times_baseline"] > 0 < row["mega_ids_s"] for row in train.values())
    assert train["static TBE", "fits"]["times_baseline"] == 1
    assert train["dynamic lru", "fits"]["hit_rate"] == 1 and not train["dynamic lru", "fits"]["evictions_a_batch"]
    assert train["dynamic lru", "evicts"]["hit_rate"] < 1 and train["dynamic lru", "evicts"]["evictions_a_batch"]


def test_the_table_of_compiled_kernels_counts_the_default_configuration_and_names_the_most_spills() -> None:
    compile_kernels = import_module("compile_kernels")
    default = Compiled("attention_forward", 90, "128 × 64, 8 warps, 3 stages", 128, 65536, 0, 0, 1000, 16, 0, 0, 4)
    rows = [compile_kernels.row_of(default, head_dim=64, op="hstu_attention", variant="causal", is_default=True)]
    rows.append({**rows[0], "registers": 200, "spill_instructions": 3, "is_default": False})
    assert compile_kernels.as_markdown(rows)[-1] == "| attention_forward | ≤ 128 | 128 | 64 | 0 (3) |"
    assert "sm_90: KiB" in compile_kernels.as_markdown(rows)[0]


def test_kernels_that_are_left_out_keep_their_rows_in_the_table(tmp_path: Path) -> None:
    pytest.importorskip("hstu.ops.cutlass.attention", reason="NEEDS THE CUTLASS DSL")
    documented = REPOSITORY / "docs" / "benchmarks" / "kernels"
    for name in ("triton.json", "cutlass.json"):
        (tmp_path / name).write_text((documented / name).read_text())
    import_module("compile_kernels").main(["--operator", "none", "--output", str(tmp_path)])
    for name in ("triton.json", "cutlass.json", "kernels.md"):
        assert (tmp_path / name).read_text() == (documented / name).read_text()


def test_the_fastest_configuration_of_each_kernel_is_named(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
    calls, file = iter(range(100)), tmp_path / "tiles.json"

    def clock(run: Callable[[], object]) -> float:
        if (call := next(calls)) == 1:
            raise RuntimeError("out of shared memory")
        return 100.0 - call

    shapes = ["--lengths", "70", "9", "--heads", "1", "--head-dim", "64", "--hidden-size", "64"]
    import_module("configurations").main([*shapes, "--bias", "--output", str(file)], "cpu", clock)
    kernels = json.loads(file.read_text())["kernels"]
    assert {row["operator"] for row in kernels} == {"attention", "project_uvqk"}
    for row in kernels:
        assert len(row["ms"]) > 1 and row["fastest"] == list(row["ms"])[-1]
    assert list(kernels[0]["ms"].values()) == [100.0, "RuntimeError: out of shared memory", 98.0]
