"""What --validate-only finds in the data, the checkpoint and the machine that a configuration names."""

import re
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hstu.base.errors import ConfigError
from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.config.gin_io import read_and_check
from hstu.config.run_config import RunDraft
from hstu.data.store.sequence_store import SequenceStore
from hstu.estimate import validate
from hstu.estimate.estimate import beside_tables, beside_tables_of_run
from hstu.estimate.validate import Built, what_the_file_names_fits
from hstu.estimate.workload import plan_workload
from hstu.parallel import tables
from hstu.parallel.mesh import Mesh
from hstu.parallel.tables import TableRoom
from hstu.train.builder import build_trainer
from tests.config.gin_files import ALL_RULES, changed, write
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.train.tiny import (
    OF_THE_ACTION,
    build,
    run,
    skip_measuring_the_peak,
    tables_with_dynamic,
    tiny_config,
    walks,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adagrad": {"optimizer": {"optimizer_str": "adagrad", "ema_decay": 0.9}},
    "momentum": {
        "optimizer": {"optimizer_str": "sgd", "momentum": 0.9, "sparse_optimizer_str": "rowwise_adagrad"},
        "network": {"position_encoding": "relative_bias", "item_embedding_dim": 8},
    },
    "replicated": {"sharded": (), "optimizer": {"optimizer_str": "rowwise_adagrad", "ema_decay": 0.9}},
    "tasks": {"task_args": OF_THE_ACTION, "dataset": {"max_num_candidates": 3}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    return write_small_store(tmp_path_factory.mktemp("walks") / "store", **walks())


def built_tensors(mesh: Mesh, store: str, output: str, name: str) -> dict[str, tuple[int, ...]]:
    skip_measuring_the_peak()
    trainer = build(tiny_config("ranking", store, output, **OPTIONS[name]), mesh)
    sizes = {tensor: tuple(each.size()) for tensor, each in trainer.state.tensors().items()}
    trainer.run_directory.close()
    return {tensor: shape for tensor, shape in sizes.items() if not tensor.startswith("ids.")}


def saved(mesh: Mesh, store: str, output: str) -> None:
    skip_measuring_the_peak()
    run(tiny_config("ranking", store, output, trainer={"ckpt_save_interval": 4}), mesh)


@pytest.fixture(scope="module")
def trained(store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with a finished run of the default options, and by case the tensors that a real run has."""
    output = tmp_path_factory.mktemp("trained")
    cases: dict[str, Callable[[Mesh], Any]] = {
        name: partial(built_tensors, store=str(store.path), output=str(output / name), name=name) for name in OPTIONS
    }
    cases["saved"] = partial(saved, store=str(store.path), output=str(output))
    return output, run_cases(Launch(1, timeout_s=120), cases)[0]


@pytest.fixture
def text(store: SequenceStore, tmp_path: Path) -> str:
    """A gin file that is right."""
    return tiny_config("ranking", store, tmp_path).operative_gin()


def problems(tmp_path: Path, text: str, *lines: str, task: Any = "ranking") -> list[str]:
    """What is wrong with a file after ``lines`` have been changed in it."""
    file = write(tmp_path, changed(text, *lines))
    try:
        read_and_check([file], [], task, 1, (*ALL_RULES, what_the_file_names_fits))
    except ConfigError as error:
        assert all(re.match(rf"{re.escape(file)}:\d+: ", line) for line in error.problems), error.problems
        return [line.removeprefix(f"{file}:") for line in error.problems]
    return []


def test_a_run_that_could_start_has_no_problems_and_nothing_is_written(text: str, tmp_path: Path) -> None:
    assert problems(tmp_path, text, "TrainerArgs.ckpt_save_interval = 2") == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.gin"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("DatasetArgs.dataset_path = '/no/such/place'", "no preprocessed data at /no/such/place. Make it with"),
        ("DatasetArgs.eval_dataset_path = '/no/such/place'", "no preprocessed data at /no/such/place. Make it with"),
        ("DatasetArgs.contextual_feature_names = ['twon']", "'twon' is no context feature of .* did you mean 'town'"),
        ("item_id_table/EmbeddingArgs.item_vocab_size_or_capacity = 9", "has 11 ids; it must be at least 11"),
        ("town_table/EmbeddingArgs.feature_names = ['city']", "the data has no feature 'city'; it has"),
        ("RankingArgs.prediction_head_arch = [8, 2]", "ends in 2 classes, but 'action' goes up to 3"),
        ("NetworkArgs.disable_contextual_mask = False", "from the second layer on, an item sees its own action"),
        ("TrainerArgs.tokens_per_rank = 16", "less than the longest possible sequence, which has 17 tokens"),
        ("TrainerArgs.ckpt_load_dir = '/no/such/place'", "no complete checkpoint in /no/such/place"),
        ("TrainerArgs.ckpt_param_map = '/no/such/place'", "cannot be read"),
        ("TrainerArgs.output_dir = '/proc/run'", "/proc cannot be written"),
        ("ContextParallelArgs.context_parallel_size = 2", "must divide the number of ranks, which is 1"),
        ("NetworkArgs.truncate_after_layer = 1", "has no effect with NetworkArgs.truncate_to_items"),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, tmp_path: Path, line: str, said: str) -> None:
    found = problems(tmp_path, text, line)
    name = line.partition(" ")[0]
    assert [problem for problem in found if re.search(rf"\d+: {re.escape(name)} = .*{said}", problem)], found


def test_labels_that_do_not_fit_a_task_are_told_with_its_line(store: SequenceStore, tmp_path: Path) -> None:
    text = tiny_config("ranking", store, tmp_path, **OPTIONS["tasks"]).operative_gin()
    assert problems(tmp_path, text) == []
    wrong = ["level/RankingTaskArgs.num_classes = 3", 'odd/RankingTaskArgs.label = "actoin"']
    (told,) = problems(tmp_path, text, *wrong)
    assert "did you mean 'action'" in told
    (told,) = problems(tmp_path, text, wrong[0])
    assert "num_classes = 3: must fit the labels, which are from 0 to 3" in told


def test_more_memory_than_there_is_is_told(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = problems(tmp_path, text, "item_id_table/EmbeddingArgs.item_vocab_size_or_capacity = 10000000000")
    assert re.search("the rows of the tables need 640.00 GB on this host, which has [\\d.]+ GB of memory;", found)
    monkeypatch.setattr(validate, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=1000)))
    (found,) = problems(tmp_path, text)
    assert re.search(r"train_batch_size = 8: a rank needs about [\d.]+ kB, and this host has 1.00 kB", found)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["-town_table/EmbeddingArgs"], "DatasetArgs.dataset_name = .*: feature 'town' has no table"),
        (
            ["OptimizerArgs.part_optimizers = [@odd/PartOptimizerArgs()]", "odd/PartOptimizerArgs.regex = 'haed'"],
            "odd/PartOptimizerArgs.regex = 'haed': matches no dense weight",
        ),
        (
            ["NetworkArgs.kernel_backend = 'cutlass'", "NetworkArgs.strict_kernel_backend = True"],
            "NetworkArgs.kernel_backend = 'cutlass': .*strict_kernel_backend = False",
        ),
    ],
)
def test_a_mistake_of_several_lines_is_told(text: str, tmp_path: Path, lines: list[str], said: str) -> None:
    found = problems(tmp_path, text, *lines)
    assert [line for line in found if re.search(said, line)], found


def test_a_full_disk_is_told(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(validate.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    (found,) = problems(tmp_path, text, "TrainerArgs.ckpt_save_interval = 2")
    assert re.search(r"TrainerArgs.ckpt_save_dir = .*: a checkpoint has about [\d.]+ kB, and 1.00 kB are free", found)
    assert problems(tmp_path, text, "TrainerArgs.ckpt_save_interval = -1") == [], "nothing is saved"


def test_no_mistake_hides_another(text: str, tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        text,
        "NetworkArgs.hidden_dropout = 1.5",
        "TrainerArgs.log_intervall = 3",
        "RankingArgs.prediction_head_arch = [8, 2]",
        "DatasetArgs.contextual_feature_names = ['twon']",
        "item_id_table/EmbeddingArgs.item_vocab_size_or_capacity = 9",
        "TrainerArgs.ckpt_load_dir = '/no/such/place'",
        "TrainerArgs.output_dir = '/proc/run'",
    )
    for said in ("= 1.5", "log_intervall", "2 classes", "'twon'", "11 ids", "no complete checkpoint", "/proc cannot"):
        assert [line for line in found if said in line], (said, found)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_the_tensors_of_a_run_are_known_before_it_starts(
    name: str, store: SequenceStore, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = tiny_config("ranking", store, tmp_path, **OPTIONS[name])
    draft = RunDraft(**vars(config), world_size=1)
    built = Built(draft)
    for step in (validate.open_data, validate.fit_tables, validate.build_dense):
        step(draft, built)
    assert built.problems == []
    assert {tensor: tuple(shape) for tensor, shape in built.tensors.items()} == trained[1][name]


def test_a_checkpoint_of_the_same_model_is_accepted(
    text: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for place in (trained[0] / "checkpoints", locate(str(trained[0] / "checkpoints"))):
        assert problems(tmp_path, text, f"TrainerArgs.ckpt_load_dir = '{place}'") == []


def test_a_checkpoint_of_another_model_is_told_as_the_run_would(
    text: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    lines = f"TrainerArgs.ckpt_load_dir = '{trained[0] / 'checkpoints'}'", "NetworkArgs.num_layers = 3"
    (found,) = problems(tmp_path, text, *lines)
    said = "NetworkArgs.num_layers = 2 in the checkpoint, 3 in this run"
    assert "TrainerArgs.ckpt_load_dir = " in found and said in found
    assert problems(tmp_path, text, *lines, "TrainerArgs.ckpt_load_strict = False") == []


def test_an_export_or_a_damaged_checkpoint_is_told(
    text: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    exported = export(locate(str(trained[0] / "checkpoints")), tmp_path / "exported")
    place = f"TrainerArgs.ckpt_load_dir = '{exported}'"
    (found,) = problems(tmp_path, text, place)
    assert "holds only weights" in found
    assert problems(tmp_path, text, place, "TrainerArgs.ckpt_load_optimizer = False") == []
    damaged = exported / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (found,) = problems(tmp_path, text, place, "TrainerArgs.ckpt_load_optimizer = False")
    assert "model.safetensors is damaged" in found


def test_retrieval_with_a_dynamic_table_is_checked_too(store: SequenceStore, tmp_path: Path) -> None:
    tables = tables_with_dynamic(store, rows=5)
    text = tiny_config("retrieval", store, tmp_path, tables=tables).operative_gin()
    assert problems(tmp_path, text, "TrainerArgs.ckpt_save_interval = 2", task="retrieval") == []


def planned_beside(mesh: Mesh, store: str, output: str) -> tuple[int, int]:
    """(memory beside the tables that a starting run estimates where it runs on a GPU, the estimate)."""
    skip_measuring_the_peak()
    config, found = tiny_config("ranking", store, output), []
    on_a_cpu = tables.room_of_rank

    def as_on_a_gpu(device: torch.device, ranks_on_host: int, beside_tables: Callable[[], int]) -> TableRoom:
        found.append(beside_tables())
        return on_a_cpu(device, ranks_on_host, beside_tables)

    tables.room_of_rank = as_on_a_gpu
    build_trainer(config, mesh, beside_tables_of_run).run_directory.close()
    return found[0], beside_tables(plan_workload(config, 1, 1, "cpu"))


def test_a_run_plans_its_tables_beside_what_its_step_needs(store: SequenceStore, tmp_path: Path) -> None:
    case = partial(planned_beside, store=str(store.path), output=str(tmp_path))
    found, estimated = run_cases(Launch(1), {"run": case})[0]["run"]
    assert found == estimated > 100_000
