"""Time of the host for a training step on a GPU, measured on a CPU; prints one JSON object.

    python scripts/bench/step_host.py [--gin-config-file configs/benchmark_ranking.gin --task ranking --steps 20]

The trainer's own step runs at the shape of the gin file, with tensors on torch's meta device: an operator costs its
dispatch, autograd and the shapes of its results, and moves no data. Tables are TorchRec's, real and narrow, and look up
one id per sequence and feature. They and the loader's hand-over run on the CPU.

Launches do nothing. Their number is reported, with what Triton takes for the arguments of its own. Not included are the
driver (about 4 µs per launch) and the allocator of CUDA (about 1 µs per tensor).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._meta_registrations as python_shapes
from harness import Row, command_line, publish
from torch import Tensor
from torchrec import KeyedJaggedTensor
from training import prepare
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from hstu.config.gin_io import load
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import NEGATIVES, HSTUBatch
from hstu.data.batches.loader import pack, unpack
from hstu.data.sampling.sampler import SamplerPosition
from hstu.model import inputs
from hstu.model.embedding import table_specs
from hstu.model.gr_model import GRModel
from hstu.observe.logging import quiet_libraries
from hstu.observe.throughput import ThroughputMeter
from hstu.ops import layer
from hstu.ops.cutlass import attention
from hstu.ops.kernels import OPERATORS, Backend, Kernels
from hstu.ops.select import resolve_kernels
from hstu.ops.triton.launch import Launch, recorded_launches
from hstu.optim.dense import DenseOptimizer
from hstu.optim.optimizers import Optimizers
from hstu.optim.schedule import Schedule
from hstu.parallel import mesh as meshes
from hstu.parallel.table_optimizer import TableOptimizer, TableTraining
from hstu.parallel.tables import sharded_collections
from hstu.pipeline import step as pipeline_step
from hstu.pipeline.finite import FiniteCheck
from hstu.pipeline.none import SequentialPipeline
from hstu.pipeline.step import TrainStep
from hstu.train import builder
from hstu.train.batch_source import BatchSource
from hstu.train.flops import FlopCounter
from hstu.train.history import RunningLoss
from hstu.train.sources import open_source
from hstu.train.trainer import Trainer

META = torch.device("meta")
H100 = (9, 0)
WARM_UP = 3
NARROW = ["NetworkArgs.item_embedding_dim = 4", "NetworkArgs.contextual_embedding_dim = 4"]
"""Of the tables that are looked up."""
SMALL = [*NARROW, "NetworkArgs.hidden_size = 4", "NetworkArgs.kv_channels = 4", "NetworkArgs.num_layers = 1"]


class Clock:
    """Seconds by part. A part within another one counts only for itself."""

    def __init__(self) -> None:
        self.times: dict[str, float] = defaultdict(float)
        self._parts = ["other"]
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the time inside to ``name``."""
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.times[self._parts[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, charged to ``name``."""

        def charged(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*args, **options)

        return charged

    def time_methods(self, stack: ExitStack, owner: Any, **parts: str) -> None:
        """Charge methods of an object or functions of a module, by name, to parts until the stack is closed."""
        for method, name in parts.items():
            stack.enter_context(patch.object(owner, method, self.timed(name, getattr(owner, method))))


class UncopiedCheck(FiniteCheck):
    """A meta tensor has no values to copy: all steps are finite."""

    def _copy_to_host(self, good: Tensor) -> Any:
        return torch.ones(good.shape, dtype=torch.bool), SimpleNamespace(synchronize=lambda: None)


class FromTables(torch.autograd.Function):
    """Rows on the meta device in the place of those that the narrow tables have looked up."""

    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, count: int, dim: int) -> Tensor:
        """Rows [count, dim]."""
        ctx.shape = looked_up.shape
        return torch.empty(count, dim, device=META)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradients of the narrow rows."""
        return torch.zeros(ctx.shape), None, None


@contextmanager
def as_on_an_h100() -> Iterator[None]:
    """What depends on the device takes the meta device for an H100. Nothing is launched."""
    replace_python_shapes()
    autocast, is_enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    generator = torch.Generator

    def known(device: Any) -> str:
        return "cpu" if str(device) == "meta" else str(device)

    stubs: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_capability", lambda *_: H100),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132)),
        (torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0)),
        (torch.cuda, "device", lambda *_: nullcontext()),
        (torch, "Generator", lambda device="cpu": generator(known(device))),
        (torch, "autocast", lambda device, **options: autocast(known(device), **options)),
        (torch, "is_autocast_enabled", lambda device: is_enabled(known(device))),
        (torch, "get_autocast_dtype", lambda device: dtype_of(known(device))),
        (torch, "_fused_adam_", lambda *_, **__: None),
        (Tensor, "pin_memory", pinned),
        (attention, "compiled", functools.cache(without_kernel)),
        (import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_: None),
    ]
    with ExitStack() as stack:
        for owner, name, stub in stubs:
            stack.enter_context(patch.object(owner, name, stub))
        yield


CUTLASS_LAUNCHES: Counter[str] = Counter()


def without_kernel(variant: attention.Variant) -> tuple[Callable[..., None], Any]:
    """A kernel that is only counted, and its arguments."""
    return lambda *arguments: CUTLASS_LAUNCHES.update([variant.kernel]), attention.launch_arguments(variant)


def replace_python_shapes() -> None:
    """Have C++ compute the shapes of results, as for CUDA, where it can.

    torch registers Python functions over those of C++, for its compiler. They take ten times as long as CUDA operators.
    """
    python_shapes._meta_lib_dont_use_me_use_register_meta._destroy()
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    kinds = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    tables = python_shapes.global_decomposition_table
    for operator, function in (tables["pre_autograd"] | tables["post_autograd"] | tables["meta"]).items():
        name = operator.name() if isinstance(operator, torch._ops.OpOverload) else ""
        if (
            name.startswith("aten::")
            and not getattr(operator, "is_view", True)
            and not any(registered(name, kind) for kind in kinds)
        ):
            LIBRARY.impl(operator, SHAPES.get(name, function), "Meta")


def _broadcast(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(condition.shape, yes.shape, no.shape)
    return torch.empty(shape, dtype=torch.result_type(yes, no), device=META)


SHAPES: dict[str, Callable[..., Any]] = {
    "aten::where.self": _broadcast,
    "aten::relu": torch.empty_like,
    "aten::abs.out": lambda x, out: out.resize_(x.shape),
    "aten::logical_and.out": lambda x, y, out: out.resize_(torch.broadcast_shapes(x.shape, y.shape)),
    "aten::log_sigmoid_forward": lambda x: (torch.empty_like(x), x.new_empty(0)),
}
"""Operators of a step whose shapes C++ does not compute: quicker than torch's Python."""
LIBRARY = torch.library.Library("aten", "IMPL")
"""Keeps what :func:`replace_python_shapes` registers."""
PINNED: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


def pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that is used again, as CUDA's allocator of pinned memory does."""
    key = tensor.shape, tensor.dtype
    if key not in PINNED:
        PINNED[key] = torch.empty_like(tensor)
    return PINNED[key].copy_(tensor)


class HandedOver:
    """Batches that the loader's workers have built and that its thread has pinned."""

    def __init__(self, batches: Iterator[HSTUBatch]) -> None:
        self._batches = batches
        self._packed = pack(next(batches))

    def build_next(self) -> None:
        """The part of the workers."""
        self._packed = pack(next(self._batches))

    def __iter__(self) -> Iterator[HSTUBatch]:
        return self

    def __next__(self) -> HSTUBatch:
        batch: HSTUBatch = unpack(self._packed)
        return batch


def timed_kernels(kernels: Kernels, clock: Clock) -> Kernels:
    """The same kernels, each charged to its own name."""
    replaced: dict[str, Any] = {}
    for operator in OPERATORS:
        given = getattr(kernels, operator)
        if dataclasses.is_dataclass(given) and not isinstance(given, type):
            parts = {
                name: clock.timed(f"{operator} {name}", part) for name, part in vars(given).items() if callable(part)
            }
            replaced[operator] = dataclasses.replace(given, **parts)
        elif operator in ("jagged_concat", "add_positions"):
            replaced[operator] = clock.timed(operator, given)
    return dataclasses.replace(kernels, **replaced)


def build_trainer(config: RunConfig, source: BatchSource, tables: GRModel, mesh: meshes.Mesh, clock: Clock) -> Any:
    """What ``Trainer._train_step`` uses: the parts of a run, with the dense part on the meta device."""
    roles, trainer = source.roles, config.trainer
    lookup_negatives = getattr(config.task_args, "negatives", "in_batch") != "in_batch"
    specs = table_specs(source.tables, config.network, roles, lookup_negatives)
    kernels: Kernels | None = None

    def select(*given: Any) -> Kernels:
        nonlocal kernels
        kernels = timed_kernels(resolve_kernels(Backend.CUTLASS, given[-1]), clock)
        return kernels

    with patch.object(builder, "select_kernels", select):
        dense = builder.build_task(config, source, mesh)
    assert kernels is not None
    keys = (*roles.names, *([NEGATIVES] if lookup_negatives else []))
    model = GRModel(specs, dense, keys, roles, trainer.seed)
    model.dense.to(META)
    model.look_up = lambda batch: look_up(tables, specs, batch)  # type: ignore[method-assign]
    training = {spec.name: TableTraining.of(spec, config.optimizer) for spec in specs}
    table_optimizer = TableOptimizer(
        sharded_collections(tables),
        training,
        config.optimizer,
        model.replicated_tables.weights(),
        kernels.update_rows,
    )
    optimizers = Optimizers(DenseOptimizer(model.dense, config.optimizer), table_optimizer)
    on_meta = dataclasses.replace(mesh, device=META)
    step = TrainStep(model, optimizers, on_meta, trainer.max_grad_norm)
    step.check = UncopiedCheck(on_meta)
    step.check.deferred = True
    return SimpleNamespace(
        mesh=on_meta,
        source=source,
        state=SimpleNamespace(optimizers=optimizers, iteration=0, position=SamplerPosition()),
        schedule=Schedule(config.schedule),
        total_iters=trainer.max_train_iters or 1000,
        pipeline=SequentialPipeline(step),
        flop_counter=FlopCounter(config.network, roles),
        meter=ThroughputMeter(math.nan),
        _running_loss=RunningLoss(META),
    )


def look_up(tables: GRModel, specs: Any, batch: HSTUBatch) -> dict[str, Tensor]:
    """Rows on the meta device of all ids, and rows of the narrow tables for one id per sequence and feature."""
    keys, lengths = batch.features.keys(), batch.features.length_per_key()
    ids = torch.zeros(len(keys) * batch.batch_size, dtype=torch.int64)
    small = KeyedJaggedTensor(
        keys=keys, values=ids, lengths=torch.ones_like(ids), stride=batch.batch_size, length_per_key=None
    )
    rows = GRModel.look_up(tables, SimpleNamespace(features=small))  # type: ignore[arg-type]
    counts, dims = dict(zip(keys, lengths, strict=True)), {name: spec.dim for spec in specs for name in spec.features}
    return {name: FromTables.apply(row, counts[name], dims[name]) for name, row in rows.items()}


def measure(trainer: Any, batches: HandedOver, clock: Clock, steps: int) -> tuple[Row, list[Launch]]:
    """Median milliseconds of a step by part, and its Triton launches."""
    step, model = trainer.pipeline.step, trainer.pipeline.step.model
    encoder = model.dense.task.encoder
    rows: list[dict[str, float]] = []
    with ExitStack() as stack:
        timed = functools.partial(clock.time_methods, stack)
        timed(HandedOver, __next__="batch from the loader")
        timed(HSTUBatch, to="copies to the device")
        timed(model, look_up="look-up in the tables")
        timed(model.dense, forward="forward beside the layers")
        timed(encoder.inputs, layout="layout and order of tokens")
        timed(inputs, token_order="layout and order of tokens")
        timed(layer.HSTULayerFunction, apply="layers, forward")
        timed(layer._Computation, backward="layers, backward")
        timed(Tensor, backward="backward beside the layers")
        timed(pipeline_step, all_finite="finite check", own_gradients_finite="finite check")
        timed(UncopiedCheck, __call__="finite check", mask="finite check")
        timed(torch.autograd, backward="backward into the tables and their update")
        timed(step.optimizers, zero_grad="optimizers", step="optimizers", set_lr_multiplier="optimizers")
        timed(attention, _work_on="attention's blocks")
        for number in range(WARM_UP + steps):
            batches.build_next()
            gc.collect()  # the trainer does so after many steps only
            clock.times.clear()
            with recorded_launches(H100) as launches, clock.part("rest of the step"):
                Trainer._train_step(trainer, batches)
            clock.times.pop("other")
            if number >= WARM_UP:
                rows.append(dict(clock.times))
    parts = {name: round(statistics.median(row[name] for row in rows) * 1e3, 3) for name in rows[0]}
    totals = [sum(row.values()) * 1e3 for row in rows]
    longest_first = dict(sorted(parts.items(), key=lambda item: -item[1]))
    step_ms = {"median": round(statistics.median(totals), 3), "fastest": round(min(totals), 3)}
    return {"step_ms": step_ms, "parts_ms": longest_first}, launches


def binder_ms(launches: list[Launch], repeats: int = 5) -> float:
    """Milliseconds that Triton takes to bind the arguments of the launches and to find the compiled kernels."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    caches: dict[Any, Any] = {}
    spent = []
    for _ in range(repeats):
        total = 0.0
        for launch in launches:
            kernel = launch.kernel
            if kernel not in caches:
                caches[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend), {}
            bind, keys = caches[kernel]
            given = launch.arguments | launch.configs[0].all_kwargs()
            begun = time.perf_counter()
            _, specialization, options = bind(**given, debug=False)
            compute_cache_key(keys, specialization, options)
            total += time.perf_counter() - begun
        spent.append(total * 1e3)
    return round(min(spent), 3)


def main() -> None:
    """Measure and print."""
    add = (parser := command_line(__doc__, threads=1, output=True)).add_argument
    add("--gin-config-file", default="configs/benchmark_ranking.gin")
    add("--task", choices=("ranking", "retrieval"), default="ranking")
    add("--steps", type=int, default=20, help="timed steps")
    add("--bindings", nargs="*", default=[], help="gin bindings")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    mesh, clock = meshes.start(), Clock()
    bindings = [*options.bindings, "TrainerArgs.data_workers = 0"]
    tables = prepare(options.gin_config_file, [*bindings, *SMALL], options.task, mesh).model
    config = load([options.gin_config_file], bindings, options.task)
    source = open_source(config, mesh)
    with as_on_an_h100():
        gc.disable()
        trainer = build_trainer(config, source, tables, mesh, clock)
        report, launches = measure(trainer, HandedOver(source.train_batches(SamplerPosition())), clock, options.steps)
    names = Counter(launch.kernel.fn.__name__ for launch in launches)
    launched = {
        "triton_launches": dict(names),
        "triton_binder_ms": binder_ms(launches),
        "cutlass_launches": CUTLASS_LAUNCHES.total() // (WARM_UP + options.steps),
    }
    publish({"torch": torch.__version__, "bindings": options.bindings} | report | launched, options.output)
    meshes.finish()


if __name__ == "__main__":
    main()
