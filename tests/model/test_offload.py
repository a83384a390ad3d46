"""Activations in host memory: what is copied and when, and that no number changes by it."""

import gc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu.model import offload
from hstu.model.offload import HostCopies, Pieces
from hstu.model.stack import SequenceEncoder
from hstu.ops import layer as layer_file
from hstu.ops.layer import saved_bytes, saved_tensors
from tests.model.examples import Tables, gradients, make_batch, make_features, make_network, random_samples

LAYERS = 4
Forward = Callable[[], Tensor]


class NotedCopies(HostCopies):
    """Numbers the copies, and notes when they start and when the device waits for them."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.notes: list[str] = []
        self.started: list[tuple[str, int]] = []
        """Direction and bytes of each copy."""
        self.in_use: dict[int, Tensor] = {}
        """Memory of the host, by address."""

    def take(self, pieces: Pieces) -> list[Tensor]:
        memory = super().take(pieces)
        self.in_use |= {piece.data_ptr(): piece for piece in memory}
        return memory

    def give_back(self, memory: Iterable[Tensor]) -> None:
        super().give_back([self.in_use.pop(piece.data_ptr()) for piece in memory])

    def start(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Any:
        targets, sources = list(targets), list(sources)
        super().start(targets, sources)
        direction = "out" if targets[0].untyped_storage().data_ptr() in self.in_use else "back"
        self.notes.append(direction)
        self.started.append((direction, sum(source.nbytes for source in sources)))
        return len(self.started)

    def wait(self, event: Any) -> None:
        if event is not None:
            self.notes.append(f"wait for {self.started[event - 1][0]}")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> NotedCopies:
    copies = NotedCopies()
    monkeypatch.setattr(offload, "copies_of", lambda device: copies)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    return copies


def model_of(
    offloaded: int, device: str = "cpu", lengths: tuple[int, ...] = (9, 4, 13), **changes: Any
) -> tuple[SequenceEncoder, Forward]:
    """An encoder, and its forward on a batch. Weights and dropout depend on the seed alone."""
    torch.manual_seed(0)
    features = make_features(1, max_items=max(lengths))
    network = make_network(**{"num_layers": LAYERS, "hidden_dropout": 0.3, "offload_num_layers": offloaded, **changes})
    encoder, tables = SequenceEncoder(network, features).to(device), Tables(features, *[network.hidden_size] * 2)
    batch = make_batch(random_samples([*lengths], contextuals=1), features)
    with torch.no_grad():
        rows = {name: row.to(torch.device(device)) for name, row in tables(batch).items()}
    batch = batch.to(torch.device(device))
    return encoder, lambda: encoder(rows, batch)[0]


def trained(encoder: nn.Module, forward: Forward) -> list[Tensor]:
    """The tokens of two micro-batches, and the sum of their gradients."""
    outputs = []
    for _ in range(2):
        out = forward()
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
        outputs.append(out.detach())
    return [*outputs, *gradients(encoder).values()]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype_str": "bfloat16", "bfloat16_residual": True, "recompute_input_silu": True},
    "some layers recomputed": {"recompute_layer": True, "recompute_num_layers": 2},
    "truncated": {"truncate_after_layer": 2, "truncate_to_items": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_gradients_have_the_bits_of_a_run_without_it(variant: str, copies: NotedCopies) -> None:
    plain = trained(*model_of(0, **VARIANTS[variant]))
    assert not copies.started
    for offloaded in (1, LAYERS - 1):
        ours = trained(*model_of(offloaded, **VARIANTS[variant]))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    out, back = (sorted(size for kind, size in copies.started if kind == way) for way in ("out", "back"))
    assert out and out == back


def test_what_layers_save_is_copied_once_and_without_weights(copies: NotedCopies) -> None:
    encoder, forward = model_of(3, recompute_layer=True, recompute_num_layers=1)
    tokens = len(forward())
    kept = [saved_bytes(encoder.network.of_layer(index), tokens, 1, 4, 4) for index in range(3)]
    assert sum(size for _, size in copies.started) == sum(kept)
    assert kept[0] < kept[1] / 4


def test_a_layer_leaves_while_the_next_computes_and_comes_back_while_that_computes_backward(
    copies: NotedCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, forward = model_of(2)
    backward = layer_file._Computation.backward
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda *_: copies.notes.append("forward"))

    def noted_backward(*args: Any) -> Any:
        copies.notes.append("backward")
        return backward(*args)

    monkeypatch.setattr(layer_file._Computation, "backward", noted_backward)
    out = forward()
    assert in_short(copies.notes) == [
        "forward", "out",  # layer 0
        "forward", "out", "wait for out",  # layer 1; the memory of layer 0 is free
        "forward", "wait for out", "forward",
    ]  # fmt: skip
    copies.notes.clear()
    out.sum().backward()
    assert in_short(copies.notes) == [
        "backward",  # layer 3
        "back", "backward",  # layer 2, while that of layer 1 comes
        "back", "wait for back", "backward",  # layer 1, while that of layer 0 comes
        "wait for back", "backward",
    ]  # fmt: skip


def in_short(notes: list[str]) -> list[str]:
    """Without repetitions."""
    return [note for index, note in enumerate(notes) if index == 0 or notes[index - 1] != note]


def bytes_kept(forward: Forward) -> tuple[Tensor, int]:
    """The tokens, and the bytes that their graph keeps."""
    forward()  # plans of the attention stay in the layout
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = forward()
    return out, sum(event.self_cpu_memory_usage for event in profile.key_averages())


def test_the_memory_on_the_device_is_freed_after_the_copy(copies: NotedCopies) -> None:
    (_, plain), (tokens, moved) = (bytes_kept(model_of(count)[1]) for count in (0, 3))
    of_layer = saved_bytes(model_of(3)[0].network, len(tokens), 1, 4, 4)
    assert plain - moved == 3 * of_layer, "the memory of the host is that of the forward before"


def test_pinned_memory_is_what_layers_of_the_benchmark_save() -> None:
    network = make_network(num_layers=8, hidden_size=1024, num_attention_heads=4, kv_channels=256)
    for residual, dropout, tokens in ((4, 0.2, 131_168), (4, 0.0, 100_003), (2, 0.2, 40_001)):
        saved = saved_tensors(replace(network, hidden_dropout=dropout), tokens, 1, 2, residual)
        number, size = Pieces.of(saved.values())
        assert size.bit_count() == 1, "torch's allocator would add the rest of a power of two"
        assert sum(saved.values()) <= number * size < 1.04 * sum(saved.values())


@pytest.mark.parametrize("layers", [1, 3])
def test_batches_of_all_lengths_share_the_pinned_memory_of_the_longest(
    layers: int, copies: NotedCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "PIECE", 4096)

    def pinned_after(length: int, times: int = 1) -> int:
        _, forward = model_of(layers, lengths=(length, 3))
        outputs = [forward() for _ in range(times)]  # micro-batches in flight
        torch.stack(outputs).sum().backward()
        assert not copies.in_use
        return sum(len(piece) for pieces in copies._free.values() for piece in pieces)

    longest = pinned_after(70)
    needed = sum(size for direction, size in copies.started if direction == "out")
    assert needed <= longest < needed + layers * (4096 + 16 * 512), "a piece per layer, and alignment"
    assert {pinned_after(length) for length in (69, 33, 50, 70)} == {longest}
    assert pinned_after(30, times=2) == longest < pinned_after(70, times=2) == 2 * longest


def test_tensors_that_lie_in_several_pieces_come_back_whole(
    copies: NotedCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(*model_of(0, dtype_str="bfloat16"))
    monkeypatch.setattr(offload, "PIECE", 512)
    assert all(torch.equal(a, b) for a, b in zip(trained(*model_of(3, dtype_str="bfloat16")), plain, strict=True))
    assert {len(piece) for pieces in copies._free.values() for piece in pieces} == {512}


@pytest.mark.parametrize("end", ["dropped", "after backward", "failed in backward"])
def test_memory_of_the_host_is_given_back_and_used_again(end: str, copies: NotedCopies) -> None:
    encoder, forward = model_of(3)
    out = forward()
    used = sorted(copies.in_use)
    assert len(used) == 3, "a piece per layer"
    if end == "after backward":
        out.sum().backward()
        assert not copies.in_use, "while the output lives"
    elif end == "failed in backward":
        hook = encoder.layers[1].uvqk.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.sum().backward()
        hook.remove()
    del out
    if end == "failed in backward":
        torch.ones(1, requires_grad=True).sum().backward()  # torch keeps nodes that it did not reach until then
        gc.collect()  # the frames of the error
    assert not copies.in_use
    again = forward()
    assert again.requires_grad and sorted(copies.in_use) == used


def test_an_evaluation_copies_nothing(copies: NotedCopies) -> None:
    with torch.no_grad():
        model_of(3)[1]()
    assert not copies.started


def test_small_tensors_stay(monkeypatch: pytest.MonkeyPatch, copies: NotedCopies) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 1000)
    model_of(3, recompute_layer=True)[1]()
    assert min(size for _, size in copies.started) >= 1000
    monkeypatch.setattr(offload, "LEAST_BYTES", 10**6)
    copies.started.clear()
    model_of(3)[1]()
    assert not copies.started


class FakeStream:
    """Notes what a stream of a GPU would be given, in one list for all streams."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: "FakeStream") -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return f"the end of the copy on {self.name}"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")


def test_streams_of_a_gpu_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    main, side = FakeStream("main", notes), FakeStream("side", notes)
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    copies = HostCopies(torch.device("cuda", 0))
    targets = [torch.zeros(3), torch.zeros(2)]
    event = copies.start(targets, torch.arange(5.0).split([3, 2]))
    assert notes == ["side waits for main"] and entered == [side] and torch.cat(targets).tolist() == [0, 1, 2, 3, 4]
    copies.wait(event)
    assert notes[1:] == ["main waits for the end of the copy on side"]
    copies.wait(None)
    assert len(notes) == 2


ON_A_GPU: dict[str, Any] = {"lengths": (4000, 2500, 1500), "hidden_size": 256, "kv_channels": 128, "num_layers": 8}


def measured(offloaded: int) -> tuple[list[Tensor], int]:
    """The numbers of two micro-batches, and the peak of memory, without any wait of the host in the second run."""
    encoder, forward = model_of(offloaded, "cuda", **ON_A_GPU)
    trained(encoder, forward)  # the pinned memory and the streams are made
    encoder.zero_grad()
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers = trained(encoder, forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return numbers, torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams, pinned memory and its own memory")
def test_on_a_gpu_it_saves_memory_without_waits_and_changes_no_bit() -> None:
    (plain, most), (ours, least) = measured(0), measured(7)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    encoder, _ = model_of(0, **ON_A_GPU)
    layer = saved_bytes(encoder.network, len(plain[0]), 1, 4, 4)
    assert most - least > 4 * layer, "of 8 layers at most two and their working memory are on the device"
