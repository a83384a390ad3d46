"""What is refused before a rank joins the others: unused GPUs, unknown networks, a cuBLAS that is not repeatable."""

import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.parallel import machine_checks, mesh
from hstu.parallel.machine_checks import Driver, read_driver, unknown_to_gloo, unknown_to_nccl, why_gpus_are_unused


def libcuda(init: int = 0, gpus: int = 2, version: int = 12040) -> SimpleNamespace:
    def write(value: int):  # type: ignore[no-untyped-def]
        return lambda pointer: setattr(pointer._obj, "value", value)

    return SimpleNamespace(cuInit=lambda flags: init, cuDriverGetVersion=write(version), cuDeviceGetCount=write(gpus))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, and a torch without CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libcuda())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("driver")
def test_a_gpu_that_torch_cannot_use_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"has 2 NVIDIA GPUs, but torch .* is a build for CPUs\. .*install\.sh"):
        mesh.start()


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_hidden_gpus_mean_the_cpu(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    machine_checks.require_usable_gpus()


@pytest.mark.parametrize(
    ("library", "found"),
    [
        (libcuda(), Driver(2, (12, 4))),
        (libcuda(init=803, gpus=0), Driver(0, (12, 4), error=803)),
        (libcuda(init=100), None),
        (libcuda(init=34), None),
        (libcuda(gpus=0), None),
    ],
)
def test_the_driver_is_read_without_torch(
    monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace, found: Driver | None
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert read_driver() == found


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert read_driver() is None


@pytest.mark.parametrize(
    ("driver", "built_for", "said"),
    [
        (Driver(1, (12, 4)), None, "has 1 NVIDIA GPU, but torch 2.13.0 is a build for CPUs. Install the CUDA build"),
        (
            Driver(8, (12, 4)),
            "13.0",
            "has 8 NVIDIA GPUs, but torch 2.13.0 needs CUDA 13.0, and the driver supports CUDA 12.4 at most. Update",
        ),
        (Driver(1, (13, 1)), "13.0", "(CUDA 13.0; driver: CUDA 13.1) cannot use them: out of luck. Check nvidia-smi"),
        (Driver(0, (13, 0), error=803), "13.0", "has NVIDIA GPUs, but the driver does not start (cuInit: error 803)"),
    ],
)
def test_the_error_says_why_and_what_to_do(driver: Driver, built_for: str | None, said: str) -> None:
    text = why_gpus_are_unused(driver, "2.13.0", built_for, "out of luck")
    assert said in text
    assert text.endswith('hide the GPUs: CUDA_VISIBLE_DEVICES="" before the command.')


NO_IMAGE = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ...")
NO_BACKEND = NotImplementedError("Could not run 'fbgemm::...' with arguments from the 'CUDA' backend.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NO_IMAGE, "has no kernels for NVIDIA X (compute capability 12.0). Install a build of FBGEMM with them"),
        (NO_BACKEND, "is a build for CPUs. Install the CUDA build: rm -rf .venv && scripts/install.sh."),
        (
            RuntimeError("lost\nthe device"),
            "does not run on NVIDIA X (compute capability 12.0): lost. Check nvidia-smi.",
        ),
    ],
)
def test_a_gpu_without_table_kernels_is_refused(
    error: RuntimeError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(lengths: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch.ops.fbgemm, "asynchronous_complete_cumsum", fails)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    with pytest.raises(ConfigError) as refused:
        machine_checks.require_table_kernels(torch.device("cpu"))
    assert f"the installed FBGEMM, which looks up the rows of tables, {said}" in str(refused.value)


def test_a_device_with_table_kernels_passes() -> None:
    machine_checks.require_table_kernels(torch.device("cpu"))


NETWORKS = ["lo", "eth0", "eth1", "ib0"]


def test_gloo_needs_every_name_and_nccl_one_prefix() -> None:
    assert unknown_to_gloo("eth0,ib0", NETWORKS) == []
    assert unknown_to_gloo("eth0,eth", NETWORKS) == ["eth"]
    for value in ("eth", "eth0", "ib,eno", "=eth1", "^docker0", "^lo,docker"):
        assert unknown_to_nccl(value, NETWORKS) == []
    assert unknown_to_nccl("eno1,ens", NETWORKS) == ["eno1", "ens"]
    assert unknown_to_nccl("=eth", NETWORKS) == ["eth"]


def test_a_network_that_this_host_lacks_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=ib7: .* has no network interface ib7; it has .*lo"):
        mesh.start()
    both = {"GLOO_SOCKET_IFNAME": "ib7", "NCCL_SOCKET_IFNAME": "ib7"}
    for device, problems in (("cpu", 1), ("cuda", 2)):
        with pytest.raises(ConfigError) as error:
            machine_checks.require_networks(device, both)
        assert len(error.value.problems) == problems
    machine_checks.require_networks("cuda", {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "lo"})


@pytest.fixture
def started_deterministically() -> Iterator[None]:
    yield
    mesh.finish()
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("started_deterministically")
def test_a_deterministic_run_prepares_cublas_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 cuBLAS is not deterministic; unset it"):
        mesh.start(deterministic=True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    mesh.start(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
