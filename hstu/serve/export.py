"""Export a trained model to a folder that a service loads with plain PyTorch."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.directory import Files, describe_files
from hstu.config.args import ContextParallelArgs, DataParallelArgs, TensorModelParallelArgs
from hstu.config.run_config import RunConfig
from hstu.data.features import running
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import SampleItems
from hstu.model.program import ServingProgram, trace
from hstu.serve import runtime
from hstu.serve.contents import check_can_be_served, collect
from hstu.serve.loaded import LoadedModel, with_store
from hstu.serve.runtime.delta import Contents
from hstu.serve.runtime.files import COMPILED, FACTS, MANIFEST, PROGRAM, TABLES, VOCABULARY, WEIGHTS, checksum_of
from hstu.serve.runtime.model import machine
from hstu.train.inference import InferenceSource, StoredSource

TABLE_DTYPES = ("float32", "bfloat16", "int8")
TOLERANCE = 1e-4
"""Largest allowed difference of a logit or a vector component, relative to 1 + its absolute value."""
PACKAGE = "hstu_serving"
_CHECKED_USERS = 10


def for_export(config: RunConfig, data: Path | None = None) -> RunConfig:
    """The configuration to load a model for export: one process, float32, PyTorch operators; on other ``data``."""
    network = replace(
        config.network, dtype_str="float32", compile=False, kernel_backend="pytorch", sequence_parallel=False
    )
    return replace(
        config if data is None else with_store(config, data),
        network=network,
        data_parallel=DataParallelArgs(),
        tensor_parallel=TensorModelParallelArgs(),
        context_parallel=ContextParallelArgs(),
    )


def write_serving(
    trained: LoadedModel,
    folder: Path,
    *,
    table_dtype: str = "float32",
    base: Contents | None = None,
    compiles: bool = False,
) -> float | None:
    """Write an export into a new folder. Returns its ``difference`` from the model.

    Args:
        trained: loaded with the configuration of ``for_export``, on one rank.
        folder: the folder to create, with its parents. The manifest is written last, so a folder with one is complete.
        table_dtype: one of TABLE_DTYPES.
        base: an earlier export, whose program is used if a new one would be equal.
        compiles: also write a compiled program. Takes a C++ compiler and about half a minute.

    Raises:
        ConfigError: the model reads inputs that requests cannot contain, or its program cannot be compiled here.
        DataError: the data with the item features is missing, or the export differs from the model.
    """
    check_can_be_served(trained)
    folder.mkdir(parents=True)
    with trained.inference():
        program = ServingProgram(trained.task)
        facts, tables, vocabulary = collect(trained, program)
        if base is not None and base.facts.get("program") == facts["program"]:
            for path in filter(Path.is_file, map(base.path_of, (PROGRAM, COMPILED))):
                shutil.copyfile(path, folder / path.name)
        else:
            torch.export.save(trace(program), folder / PROGRAM)
        if compiles and not (folder / COMPILED).is_file():
            compile_program(folder)
        for name, tensors in ((WEIGHTS, program.state_dict()), (TABLES, tables), (VOCABULARY, vocabulary)):
            write_tensors(folder / name, tensors)
        (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        package = Path(runtime.__file__).parent
        shutil.copytree(package, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(str(running.__file__), folder / PACKAGE)  # in the place of the module that imports it
    model = runtime.Model(Contents.read(folder))
    found = difference(trained, model)  # which enters ``inference`` itself: nested, it would undo the averages
    if found is not None and found > TOLERANCE:
        raise DataError(
            f"cannot export a program: it differs from the model by {found:.2g}, and {TOLERANCE:g} is allowed. "
            "This is a defect of the export for models of this configuration; please report it"
        )
    write_tensors(folder / TABLES, _reduced(tables, table_dtype))
    write_manifest(folder)
    return found


def compile_program(folder: Path) -> None:
    """Compile the program in a folder with AOTInductor, for any x86-64 processor with AVX2.

    Raises ConfigError if that is not possible on this machine.
    """
    if shutil.which("g++") is None or not machine().startswith("x86_64 with AVX2"):
        raise ConfigError(f"--compile needs g++ and an x86_64 processor with AVX2; this is {machine()}. Leave it out")
    options = {
        "aot_inductor.metadata": {"for": machine()},
        "assert_indirect_indexing": False,  # the runtime makes the indices
        "cpp.march": "x86-64-v3",
        "cpp.simdlen": 256,
    }
    program = torch.export.load(folder / PROGRAM)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / COMPILED), inductor_configs=options)


def write_manifest(folder: Path) -> Files:
    """Write the manifest of an export with all files of its folder, and return them, with sizes and checksums."""
    files = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    manifest = {"sha256": checksum_of(files), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return files


def difference(trained: LoadedModel, model: runtime.Model) -> float | None:
    """Largest difference between outputs of model and export for users of the data, relative to 1 + absolute value.

    The model reads the batches of an evaluation, the export reads requests: in ranking, for each sample with more
    candidates than fit into a sequence. Half of the users have the longest histories. None: the data is missing.
    """
    source = trained.source
    if isinstance(source, StoredSource):
        return None
    lengths, half = np.diff(source.store.offsets()), _CHECKED_USERS // 2
    if trained.config.task == "ranking":
        return _difference_of_samples(trained, source, model)
    users = np.union1d(np.arange(len(lengths))[:half], np.argsort(-lengths)[:half])
    expected = trained.user_vectors(source.history_batches(users)).cpu()
    return _largest(model.embed_batch([*trained.histories_of(users)]), expected)


def _difference_of_samples(trained: LoadedModel, source: InferenceSource, model: runtime.Model) -> float | None:
    """As ``difference``, of ranking. Without candidates in training, the newest event of a sample is the candidate."""
    store, rule = source.store, model.facts["candidates"]
    samples = build_samples(store, trained.dataset, "ranking", "all", seed=0)
    counts = samples.num_candidates if rule["trained"] else np.ones_like(samples.start)
    ends = samples.start + samples.lengths - counts
    usable = np.flatnonzero(ends > samples.history_begin)
    longest = usable[np.argsort((samples.history_begin - ends)[usable])]
    rows = np.union1d(usable[: _CHECKED_USERS // 2], longest[: _CHECKED_USERS // 2])
    if not len(rows):
        return None
    batch = source.sample_batch(samples, rows)
    logits = trained.forward(batch).logits
    assert logits is not None, "a ranking model has logits"
    of_sample = logits.cpu().split(batch.num_labels.tolist())
    shown = SampleItems.of(store, samples.take(rows), ends[rows], counts[rows])
    times = shown.times() if model.reads_request_time else None
    histories, worst = [*trained.histories_of(samples.user[rows])], 0.0
    known = [name for name in model.encoder.known_before if name in histories[0].features]
    raw = {name: shown.values(name) for name in (store.item_feature, *known)}
    raw |= {name: store.raw_ids(name)[codes] for name, codes in raw.items() if store.feature(name).has_vocab}
    first = np.cumsum(counts[rows]) - counts[rows]
    for place, (row, whole) in enumerate(zip(rows, histories, strict=True)):
        history = whole.cut(slice(int(ends[row] - samples.history_begin[row])))
        own = np.arange(first[place], first[place] + counts[row])
        others = np.resize(np.arange(len(raw[store.item_feature])), rule["most"])  # beside them, nothing may change
        values = {name: each[np.concatenate([own, others])].tolist() for name, each in raw.items()}
        candidates = runtime.Candidates(values.pop(store.item_feature), values)
        expected = of_sample[place][-len(own) :]
        for checked in {0, len(own) - 1}:
            at = None if times is None else int(times[own[checked]])
            found = model.predict_batch([history], [candidates], at)[0]
            worst = max(worst, _largest(found[checked], expected[checked]))
    return worst


def _largest(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / (1 + expected.abs())).nan_to_num(torch.inf).max())


def _reduced(tables: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Convert tables to another dtype. int8 tables have one scale per row, which maps its largest value to 127."""
    if dtype != "int8":
        return {name: rows.to(getattr(torch, dtype)) for name, rows in tables.items()}
    found = {}
    for name, rows in tables.items():
        scale = rows.abs().amax(dim=1) / 127
        found[name] = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
        found[f"{name}.scale"] = scale
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Equal tensors give equal bytes."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
