"""A run that begins with what another one has learnt."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.export import export
from hstu.checkpoint.find import locate
from hstu.checkpoint.tensors import StoredTensors
from hstu.config.option import options_of
from hstu.config.rules import validate
from hstu.config.run_config import RunConfig
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView
from hstu.parallel.tables import dynamic_tables
from tests.conftest import write_small_store
from tests.train.tiny import ITEMS, FinishedRun, Train, build, run, tables_with_dynamic, tiny_config, walks

SAVING = {"ckpt_save_interval": 4}


def test_weights_alone_begin_a_run_from_the_start(train: Train, tmp_path: Path) -> None:
    train("ranking", trainer=SAVING | {"max_train_iters": 16}, output="first")
    checkpoint = locate(str(tmp_path / "first" / "checkpoints"))
    fresh = train("ranking")
    exported = export(checkpoint, tmp_path / "exported")
    with pytest.raises(DataError, match="ckpt_load_optimizer = False"):
        train("ranking", trainer={"ckpt_load_dir": str(exported)})
    for source in (checkpoint, exported):
        begun = train("ranking", trainer={"ckpt_load_dir": str(source), "ckpt_load_optimizer": False})
        assert [record["iter"] for record in begun.records] == [1, 2, 3, 4]
        assert begun.losses[0] < 0.9 * fresh.losses[0], "with what the first run has learnt"
        assert begun.trainer.state.position == fresh.trainer.state.position, "the data begins anew, too"
    continued = train("ranking", trainer={"ckpt_load_dir": str(checkpoint), "max_train_iters": 18})
    assert [record["iter"] for record in continued.records] == [17, 18]


def test_a_resume_lists_what_has_changed_in_the_configuration(
    train: Train, tmp_path: Path, warnings_of_hstu: pytest.LogCaptureFixture
) -> None:
    train("ranking", trainer=SAVING, output="first")
    checkpoint = str(locate(str(tmp_path / "first" / "checkpoints")))
    warnings_of_hstu.clear()
    train("ranking", trainer=SAVING | {"ckpt_load_dir": "auto"}, output="first")
    assert "the configuration has changed" not in warnings_of_hstu.text, "only where the run reads and writes"
    train(
        "ranking",
        trainer=SAVING | {"ckpt_load_dir": checkpoint, "max_train_iters": 6, "train_batch_size": 4},
        optimizer={"learning_rate": 0.02},
        network={"hidden_dropout": 0.1},
    )
    (warning,) = [r.getMessage() for r in warnings_of_hstu.records if "configuration has changed" in r.getMessage()]
    assert checkpoint in warning
    assert sorted(line.strip() for line in warning.splitlines()[1:]) == [
        "NetworkArgs.hidden_dropout = 0.0 in the checkpoint, 0.1 in this run",
        "OptimizerArgs.learning_rate = 0.01 in the checkpoint, 0.02 in this run",
        "TrainerArgs.max_train_iters = 4 in the checkpoint, 6 in this run",
        "TrainerArgs.train_batch_size = 8 in the checkpoint, 4 in this run",
    ]


HEADS = ["NetworkArgs.num_attention_heads = 2 in the checkpoint, 4 in this run", "NetworkArgs.kv_channels = 8"]
LAYERS = ["stack.layers.2", "NetworkArgs.num_layers = 2 in the checkpoint, 3 in this run"]
LENGTHS = [
    "bias.position_weight is (33,) in the checkpoint, (41,) in this run",
    "DatasetArgs.max_sequence_length = 8 in the checkpoint, 10 in this run",
]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"network": {"num_attention_heads": 4, "kv_channels": 4}}, HEADS),  # weights of equal sizes, another meaning
        ({"network": {"num_layers": 3}}, LAYERS),
        ({"network": {"scaling_seqlen": 7}}, ["NetworkArgs.scaling_seqlen = -1 in the checkpoint, 7 in this run"]),
        ({"dataset": {"max_sequence_length": 10}}, LENGTHS),
    ],
)
def test_another_architecture_is_refused_with_the_lines_that_differ(
    train: Train, tmp_path: Path, changes: dict[str, Any], lines: list[str]
) -> None:
    network = {"position_encoding": "relative_bias"}
    train("ranking", trainer=SAVING, network=network, output="first")
    load = {"ckpt_load_dir": str(tmp_path / "first" / "checkpoints")}
    with pytest.raises(DataError) as refused:
        train("ranking", trainer=load, **{**changes, "network": {**network, **changes.get("network", {})}})
    for line in lines:
        assert line in str(refused.value)
    assert "seed" not in str(refused.value) and "TrainerArgs.ckpt_load_dir" not in str(refused.value)


def another_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value that the option allows and that is not ``value``; the same one for texts and lists without choices."""
    if field.metadata["choices"]:
        chosen = next(choice for choice in field.metadata["choices"] if choice != value)
        return [chosen] if isinstance(value, list) else chosen
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return int(field.metadata["minimum"]) if value is None and field.metadata["minimum"] is not None else value


def weights(finished: FinishedRun) -> list[torch.Tensor]:
    """Of the dense part."""
    return [weight.detach() for weight in unwrap_dense(finished.trainer.state.model).parameters()]


def test_a_run_resumes_with_every_option_that_does_not_change_the_result(
    store: SequenceStore, mesh: Mesh, tmp_path: Path
) -> None:
    checkpoint = {"ckpt_save_interval": 4, "eval_interval": 2, "best_metric": "AUC"}
    whole = run(tiny_config("ranking", store, tmp_path / "whole", trainer=checkpoint | {"max_train_iters": 6}), mesh)
    first = tiny_config("ranking", store, tmp_path / "first", trainer=checkpoint)
    run(first, mesh)
    trainer = {"ckpt_load_dir": str(tmp_path / "first" / "checkpoints"), "max_train_iters": 6}
    left = [
        (part, field)
        for part in ("trainer", "network", "optimizer", "dataset", "data_parallel", "tensor_parallel", "task_args")
        for field in options_of(type(getattr(first, part)))
        if field.metadata["changes"] in ("reports", "speed") and field.name != "strict_kernel_backend"  # needs a GPU
    ]
    while left:  # some exclude each other
        config = tiny_config("ranking", store, tmp_path / f"resumed{len(left)}", trainer=trainer)
        tried: list[Any] = []
        for part, field in left:
            own = getattr(config, part)
            value = another_value(field, getattr(own, field.name))
            changes = dataclasses.replace(config, **{part: dataclasses.replace(own, **{field.name: value})})
            with contextlib.suppress(ConfigError):
                warnings = validate(changes, world_size=1)
                in_force = getattr(getattr(changes, part), field.name)  # the default, if it has no effect
                if in_force != getattr(own, field.name) and not warnings:
                    config, tried = changes, [*tried, (part, field)]
        if not tried:
            break
        print(f"resumed with another {', '.join(field.name for _, field in tried)}")
        for own, other in zip(weights(run(config, mesh)), weights(whole), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        left = [each for each in left if each not in tried]
    assert {field.name for _, field in left} == {
        *(
            "ckpt_load_dir",
            "ckpt_save_dir",
            "ckpt_param_map",
            "output_dir",
            "eval_dataset_path",
            "wandb_project",
            "cache_dir",
        ),
        *("best_metric", "best_metric_mode", "eval_metrics", "ckpt_save_interval"),  # names, or useless alone
        *("tensor_model_parallel_size", "sequence_parallel", "same_second_targets"),
    }, "texts, what needs or names ranks (see tests/distributed), and what is for retrieval"


def test_the_body_of_one_task_begins_another(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train("retrieval", trainer=SAVING, output="first")
    source = str(tmp_path / "first" / "checkpoints")
    (tmp_path / "map.txt").write_text("model.tables.item_id_table model.tables.item_id_table  # itself\n")
    trainer = {
        "ckpt_load_dir": source,
        "ckpt_load_optimizer": False,
        "ckpt_load_strict": False,
        "ckpt_param_map": str(tmp_path / "map.txt"),
    }
    begun = train("ranking", trainer=trainer, output="second")
    log = (begun.path / "log.txt").read_text()
    assert "was loaded in part" in log and "model.task.head" in log
    assert len(begun.losses) == 4


def test_a_dynamic_table_may_have_had_another_name(train: Train, store: SequenceStore, tmp_path: Path) -> None:
    first = train("ranking", tables=tables_with_dynamic(store, rows=20), trainer=SAVING, output="first")
    (tmp_path / "map.txt").write_text("model.tables.films model.tables.movies\n")
    renamed = {"ckpt_load_dir": str(tmp_path / "first" / "checkpoints"), "ckpt_param_map": str(tmp_path / "map.txt")}
    films = tables_with_dynamic(store, rows=20, name="films")
    second = train("ranking", tables=films, trainer=renamed | {"max_train_iters": len(first.losses)}, output="second")
    before, after = (
        dynamic_tables(finished.trainer.state.model)[name].content()
        for finished, name in ((first, "movies"), (second, "films"))
    )
    assert len(before.ids) and torch.equal(before.ids, after.ids) and torch.equal(before.rows, after.rows)
    (tmp_path / "map.txt").write_text("model.tables.films model.tables.songs\n")
    with pytest.raises(DataError, match=r"model\.tables\.songs is not in the checkpoint"):
        train("ranking", tables=films, trainer=renamed, output="third")


def store_of(path: Path, item_ids: list[int]) -> SequenceStore:
    """The walks over items of these raw ids; only those that end in 0 occur, whatever their codes are."""
    arguments = walks()
    codes = [code for code, raw in enumerate(item_ids) if raw % 10 == 0]
    arguments["items"] = [[codes[item] for item in row] for row in arguments["items"]]
    return write_small_store(path, **arguments | {"num_items": len(item_ids), "item_ids": item_ids})


def restored(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """What a run has before its first step."""
    trainer = build(config, mesh)
    trainer.checkpoints.restore(trainer.state)
    trainer.run_directory.close()
    tensors = trainer.state.tensors()
    return {name: next(iter(ShardedView.whole(tensor).shards.values())).clone() for name, tensor in tensors.items()}


def test_a_grown_vocabulary_keeps_the_rows_of_its_ids(mesh: Mesh, tmp_path: Path) -> None:
    ids = list(range(1000, 1000 + 10 * ITEMS, 10))
    grown = sorted([*ids, 1001, 1055, 1056, 2000])  # which moves all codes but the first
    before = store_of(tmp_path / "before", ids)
    after = store_of(tmp_path / "after", grown)
    run(tiny_config("retrieval", before, tmp_path / "first", trainer=SAVING), mesh)
    source = {"ckpt_load_dir": str(tmp_path / "first" / "checkpoints")}
    former = restored(tiny_config("retrieval", before, tmp_path / "same", trainer=source), mesh)
    weights: Any = source | {"ckpt_load_optimizer": False}
    with pytest.raises(DataError, match=r"model\.tables\.item_id_table has rows of other ids in the checkpoint"):
        restored(tiny_config("retrieval", after, tmp_path / "strict", trainer=weights), mesh)

    fresh = restored(tiny_config("retrieval", after, tmp_path / "fresh"), mesh)
    begun = restored(tiny_config("retrieval", after, tmp_path / "phase", trainer=source | {"continue_on": "all"}), mesh)
    for name in ("model.tables.item_id_table", "optimizer.tables.item_id_table.exp_avg"):
        assert former[name].abs().max() > 0
        for code, raw in enumerate(grown):
            expected = former[name][ids.index(raw)] if raw in ids else fresh[name][code]
            assert torch.equal(begun[name][code], expected), (name, raw)
    assert torch.equal(begun["model.tables.action_table"], former["model.tables.action_table"])
    log = (tmp_path / "phase" / "run" / "log.txt").read_text()
    assert "table item_id_table: 4 of 15 ids are not in the checkpoint; their rows are as initialised\n" in log


def test_ids_of_a_dynamic_table_follow_their_raw_ids_and_how_many_are_gone_is_told(mesh: Mesh, tmp_path: Path) -> None:
    ids = list(range(1000, 1000 + 10 * ITEMS, 10))
    others = sorted([*ids[3:], 1001, 5000, 5010, 5020])
    before, after = store_of(tmp_path / "before", ids), store_of(tmp_path / "after", others)
    run(
        tiny_config("ranking", before, tmp_path / "first", tables=tables_with_dynamic(before, ITEMS), trainer=SAVING),
        mesh,
    )
    source = {"ckpt_load_dir": str(tmp_path / "first" / "checkpoints"), "continue_on": "all"}
    (stored,) = read_tables(locate(source["ckpt_load_dir"]))["movies"]
    former = {ids[code]: place for place, code in enumerate(stored.ids.tolist())}
    expected = former.keys() & set(others)
    assert 0 < len(expected) < len(former)

    tables = tables_with_dynamic(after, ITEMS)
    trainer = build(tiny_config("ranking", after, tmp_path / "second", tables=tables, trainer=source), mesh)
    trainer.checkpoints.restore(trainer.state)
    trainer.run_directory.close()
    content = dynamic_tables(trainer.state.model)["movies"].content()
    found = {others[code]: place for place, code in enumerate(content.ids.tolist())}
    assert found.keys() == expected
    for raw, place in found.items():
        assert torch.equal(content.rows[place], stored.rows[former[raw]])
        assert content.scores[place] == stored.scores[former[raw]]
    log = (tmp_path / "second" / "run" / "log.txt").read_text()
    assert f"other ids than in the checkpoint; {len(expected)} of its {len(former)} rows kept" in log


def test_averages_are_what_an_export_has_and_what_another_run_begins_with(mesh: Mesh, tmp_path: Path) -> None:
    store = write_small_store(tmp_path / "store", **walks())
    options: dict[str, Any] = {"optimizer": {"ema_decay": 0.9}}
    run(tiny_config("retrieval", store, tmp_path / "first", trainer=SAVING, **options), mesh)
    checkpoint = locate(str(tmp_path / "first" / "checkpoints"))
    weight, average = "model.tables.action_table", "optimizer.tables.action_table.average"
    stored = StoredTensors(checkpoint)
    kept, averaged = stored.read_whole(weight), stored.read_whole(average)
    assert not torch.equal(kept, averaged)
    exported = export(checkpoint, tmp_path / "exported")
    assert torch.equal(StoredTensors(exported).read_whole(weight), averaged)

    def begun(name: str, source: Path, **options: Any) -> dict[str, Any]:
        trainer = {"ckpt_load_dir": str(source), "ckpt_load_optimizer": False}
        return restored(tiny_config("retrieval", store, tmp_path / name, trainer=trainer, **options), mesh)

    again = begun("again", checkpoint, **options)
    assert torch.equal(again[weight], kept) and torch.equal(again[average], averaged)
    from_export = begun("from_export", exported, **options)
    assert torch.equal(from_export[weight], averaged) and torch.equal(from_export[average], averaged)
    without = begun("without", checkpoint)
    assert torch.equal(without[weight], kept) and average not in without
