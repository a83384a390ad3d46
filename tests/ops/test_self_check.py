"""The command that checks the kernels of a backend goes on after a failure and lists the failures last."""

from collections.abc import Callable, Iterator

import pytest
import torch

from hstu.ops import self_check
from hstu.ops.kernels import KernelShapes
from hstu.ops.self_check import Check, Errors, main


def checks(backend: str, device: torch.device, shapes: KernelShapes | None) -> Iterator[Check]:
    def measured(name: str, error: float) -> Callable[[], Errors]:
        return lambda: {name: (error, 1e-2)}

    def raises() -> Errors:
        raise RuntimeError("ptxas failed\nwith a long log")

    if shapes is None:
        yield Check("slots", "slots", measured("slots", 0.0))
        return
    if shapes.has_bias:
        return
    yield Check("attention", f"attention {shapes.head_dim}", measured(f"dK {shapes.head_dim}", 0.5))
    yield Check("add_positions", f"add_positions {shapes.head_dim}", raises)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        """Its exit code and what it prints."""
        chosen = ["--device", "cpu", "--head-dim", "256", "64", "--dtype", "bfloat16"]
        monkeypatch.setattr("sys.argv", ["self_check", "triton", *chosen, *arguments])
        monkeypatch.setattr(self_check, "checks", checks)
        code = main()
        torch.use_deterministic_algorithms(False)
        return code, capsys.readouterr().out

    return run


def test_it_goes_on_after_failures_and_lists_them_last(command: Callable[..., tuple[int, str]]) -> None:
    code, printed = command()
    while_it_ran, failures = printed.split("4 failures\n")
    assert code == 1
    assert while_it_ran.splitlines()[-1] == "ok    0.0e+00 of 1e-02  slots", "the last case is run"
    assert failures.splitlines() == [
        "5.0e-01 of 1e-02  dK 256",
        "add_positions 256: RuntimeError: ptxas failed",
        "5.0e-01 of 1e-02  dK 64",
        "add_positions 64: RuntimeError: ptxas failed",
    ]


def test_it_ends_where_an_error_has_made_the_gpu_unusable(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "is_usable", lambda device: False)
    code, printed = command()
    assert code == 1 and "dK 64" not in printed and "later cases were not run" in printed.splitlines()[-1]


def test_shapes_can_be_chosen(command: Callable[..., tuple[int, str]]) -> None:
    assert "256" not in command("--head-dim", "64")[1]
