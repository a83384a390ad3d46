"""What runs in a process of its own for test_checkpoint_scripts.py: all that starts a process group."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

from hstu.observe.peak import PeakTflops
from hstu.parallel import mesh as meshes
from hstu.train import builder
from tests.conftest import write_small_store
from tests.train.tiny import run, tiny_config, walks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import recommend


def train(directory: str) -> None:
    """A run of four iterations with checkpoints after two and after four."""
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]
    mesh = meshes.start(timeout_s=60)
    store = write_small_store(Path(directory) / "store", **walks())
    run(tiny_config("retrieval", store, directory, trainer={"ckpt_save_interval": 2}), mesh)
    meshes.finish()


def recommend_from(cases: dict[str, list[str]]) -> dict[str, Any]:
    """Arguments of scripts/recommend.py → its exit code and what it prints."""
    results = {}
    for name, arguments in cases.items():
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = recommend.main(arguments)
        results[name] = [code, output.getvalue(), errors.getvalue()]
    return results
