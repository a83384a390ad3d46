"""Compiled programs, and the code in docs/export.md for other hosts than our server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.serve import runtime
from hstu.serve.export import compile_program, write_manifest
from hstu.serve.runtime.files import COMPILED
from hstu.serve.runtime.inputs import inputs_of
from tests.serve.served import Served, random_requests

ROOT = Path(__file__).parents[2]


def code_of(language: str, start: str) -> str:
    """The block in docs/export.md that contains ``start``."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if start in block]
    return found


@dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] | None = None
    error: str | None = None


def asked(content: object) -> dict[str, Tensor]:
    """A request, as Triton's stand-in gives it to a model."""
    text = content if isinstance(content, str) else json.dumps(content)
    return {"request": Tensor("request", np.array([[text.encode()]], dtype=object))}


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_the_handler_for_triton_answers_as_the_runtime(
    task: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: Served = request.getfixturevalue(task)
    backend: Any = ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.InferenceResponse, backend.TritonError = Tensor, InferenceResponse, str
    backend.get_input_tensor_by_name = lambda each, name: each[name]
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("hstu_serving")]:
        monkeypatch.delitem(sys.modules, name)
    shutil.copytree(served.folder, tmp_path / "1" / "serving")
    names: dict[str, Any] = {}
    exec(code_of("python", "class TritonPythonModel"), names)
    handler = names["TritonPythonModel"]()
    handler.initialize({"model_repository": str(tmp_path), "model_version": "1"})
    given = random_requests(served.model)[-1]
    fields = [json.loads(json.dumps(vars(each))) | {"at": given.at} for each in given.histories]
    if task == "retrieval":
        best = served.model.recommend_batch(given.histories, 4, given.at)
        expected = [vars(each) | {"scores": pytest.approx(each.scores, abs=1e-5)} for each in best]
        requests = [each | {"k": 4} for each in fields]
    else:
        scores = served.model.score_batch(given.histories, given.candidates, given.at)
        expected = [{"scores": {name: pytest.approx(each, abs=1e-5) for name, each in own.items()}} for own in scores]
        shown = [{"candidates": each.items, "candidate_features": each.features} for each in given.candidates]
        requests = [each | own for each, own in zip(fields, shown, strict=True)]
    found = handler.execute([asked("{"), *map(asked, requests), asked(requests[0] | {"features": {"none": [1]}})])
    assert "line 1" in found[0].error and "'none'" in found[-1].error
    answers = [json.loads(each.output_tensors[0].as_numpy().item()) for each in found[1:-1]]
    for answer, whole in zip(answers, expected, strict=True):
        assert answer == {name: whole[name] for name in answer} and "scores" in answer
    for name in [name for name in sys.modules if name.startswith("hstu_serving")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++, which compiles programs, is not installed")
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_a_compiled_program_computes_what_the_traced_one_does_in_python_and_cpp(
    task: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: Served = request.getfixturevalue(task)
    folder = tmp_path / "serving"
    shutil.copytree(served.folder, folder, ignore=shutil.ignore_patterns("manifest.json"))
    compile_program(folder)
    write_manifest(folder)
    model, traced = runtime.load(folder), served.model
    assert model.traced_because is None
    for given in random_requests(model):
        if task == "retrieval":
            found, expected = (each.embed_batch(given.histories, given.at) for each in (model, traced))
        else:
            found, expected = (
                torch.cat(each.predict_batch(given.histories, given.candidates, given.at)) for each in (model, traced)
            )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, equal_nan=True)

    history, shown = given.histories[-1], given.candidates[-1] if task == "ranking" else None
    inputs, _ = inputs_of(model.facts, model.tables, model.encode(history, shown, given.at))
    torch.save([*inputs.values(), *model.weights.values()], tmp_path / "inputs.pt")
    build = code_of("bash", "predict.cpp").split("\n")[1].replace("-o predict", f"-o {tmp_path}/predict")
    subprocess.run(build.replace("$TORCH", torch.__path__[0]), shell=True, cwd=ROOT, check=True)
    command = [f"{tmp_path}/predict", str(folder / COMPILED), f"{tmp_path}/inputs.pt"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    printed = torch.tensor([[float(each) for each in line.split()] for line in text.splitlines()])
    torch.testing.assert_close(printed, traced.run([traced.encode(history, shown, given.at)])[0], atol=1e-5, rtol=1e-5)

    monkeypatch.setattr("hstu.serve.runtime.model.machine", lambda: "another machine")
    other = runtime.load(folder)
    assert other.traced_because is not None and "and this is another machine" in other.traced_because
    encoded = [traced.encode(history, shown, given.at)]
    assert torch.equal(other.run(encoded)[0], traced.run(encoded)[0])


def test_a_machine_that_cannot_compile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.serve.export.shutil", SimpleNamespace(which=lambda _: None))
    with pytest.raises(ConfigError, match=r"needs g\+\+"):
        compile_program(tmp_path)
