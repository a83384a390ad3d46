"""An exported directory computes what the model computes, and says what is wrong with files and requests."""

import ast
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.base.errors import EXIT_BAD_DATA, ConfigError, DataError
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve import command, runtime
from hstu.serve.contents import as_texts, check_can_be_served
from hstu.serve.export import TOLERANCE, read_export, write_serving
from hstu.serve.predict import RankingPredictor
from hstu.serve.runtime import Candidates, History, ServingError
from hstu.serve.runtime.files import digest_of, read_tensors, texts_of
from hstu.serve.server.swap import find_exports
from scripts import export
from tests.helpers import flip
from tests.serve.served import (
    Served,
    Tensors,
    delta_of,
    export_with,
    histories,
    largest_difference,
    random_model,
    request,
    rewrite,
)
from tests.train.tiny import FinishedRun


def test_requests_of_a_batch_do_not_change_each_other(
    features: SequenceStore, retrieval: Served, ranking: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = histories(features)
    alone = torch.stack([retrieval.model.embed(history) for history in given])
    together = retrieval.model.embed_batch(given)
    monkeypatch.setattr("hstu.serve.runtime.model._SCORES_AT_ONCE", 500)  # several runs, of equal lengths
    for found in (alone, retrieval.model.embed_batch(given)):
        torch.testing.assert_close(found, together, rtol=0, atol=1e-6)
    events = {name: ["value 001"] * 5 for name in ("device", "watched")} | {"spent": [None] * 5}
    whole = [request([1000, 1001, 1002, 1003, 1004], [0, 1, 2, 3, 0], range(5), features=events)] * 2
    own = {"device": ["value 001", None, "value 002"]}
    shown = [Candidates([1005, 1000, 1010], own), Candidates([1005], {"device": ["value 001"]})]
    three, one = ranking.model.predict_batch(whole, shown, at=9)
    torch.testing.assert_close(three[:1], one, rtol=1e-5, atol=1e-5)
    assert retrieval.model.embed_batch([]).shape == (0, 12) and retrieval.model.recommend_batch([]) == []
    assert [len(each) for each in ranking.model.predict_batch(whole[:1], [Candidates([], {"device": []})])] == [0]


def test_scores_are_predictions_of_the_tasks(ranking: Served) -> None:
    assert largest_difference(ranking.trained, ranking.model) <= TOLERANCE
    history = request([1000], [1], [0], features={"device": ["value 000"], "watched": [None], "spent": [1.5]})
    shown = Candidates([1000, 1001], {"device": [None, None]})
    scores = ranking.model.score(history, shown)
    assert [*scores] == [*(f"p_level_{level}" for level in range(4)), "score_odd", "score_high"]
    assert {len(values) for values in scores.values()} == {2}
    with pytest.raises(ServingError, match="has no items; give the time of the request"):
        ranking.model.score(History(items=[]), shown)
    assert len(ranking.model.score(History(items=[]), shown, at=9)["score_odd"]) == 2
    (logits,) = ranking.model.predict_batch([history], [shown])
    assert scores["score_odd"] == pytest.approx(logits[:, 4].sigmoid().tolist())
    assert scores["p_level_2"] == pytest.approx(logits[:, :4].softmax(1)[:, 2].tolist())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (7.5, "value 003"),
        ("1e3", "value 003"),
        (7, "value 002"),
        ("0.99", "value 001"),
        (0, "value 000"),
        (-3, "value 000"),
    ],
)
def test_a_number_is_read_as_the_range_of_training_that_holds_it(ranking: Served, given: object, meant: str) -> None:
    for encoder in (ranking.model.encoder, ranking.trained.encoder):
        watched = encoder.vocabularies["watched"]
        found, expected, nothing = (watched.rows([value]) for value in (given, meant, ""))
        assert found.equal(expected) and not found.equal(nothing)


def test_an_answer_names_the_values_that_the_model_does_not_have(ranking: Served, retrieval: Served) -> None:
    watched = ["teenager", "nan", "1_0", True, "1e999"]
    features = {"watched": [*watched, None], "spent": [1.5] * 6, "device": ["value 000"] * 5 + ["tablet"]}
    user = request([1000] * 6, [1] * 5 + [9], range(6), features=features, context={"town": 7.5})
    shown = Candidates([1000, -5], {"device": [None, "fridge"]})
    unknown = {"action": [9], "watched": sorted(watched, key=str), "device": ["fridge", "tablet"], "town": [7.5]}
    assert ranking.model.score(user, shown).unknown == {**unknown, "item_id": [-5]}
    each = ranking.model.unknown_batch([user, request([1000], [1], [0]), user], [[], [], shown])
    assert each == [{**unknown, "device": ["tablet"]}, {}, {**unknown, "item_id": [-5]}]
    assert retrieval.model.recommend(request([1000, 7], [1, 1], [0, 1])).unknown == {"item_id": [7]}
    with pytest.raises(ServingError, match=r"no feature device \(text: value 000, value 001, value 002\), which"):
        ranking.model.score(request([1000], [1], [0]), shown)


def test_an_export_can_be_found_only_after_it_has_been_compared(
    ranking: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_meanwhile = []

    def differs(*_: object) -> float:
        found_meanwhile.append(find_exports(tmp_path))
        return 1.0

    monkeypatch.setattr("hstu.serve.export.trace", lambda _: torch.export.load(ranking.folder / "program.pt2"))
    monkeypatch.setattr("hstu.serve.export.difference", differs)
    with pytest.raises(DataError, match="it differs from the model by 1"):
        write_serving(ranking.trained, tmp_path / "new/serving")
    assert found_meanwhile == [[]] and find_exports(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["program.pt2", "weights.safetensors", "tables.safetensors", "manifest.json", "serving.json"]
)
def test_a_flipped_byte_is_an_error(retrieval: Served, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(retrieval.folder, tmp_path / "copy")
    flip(folder / name)
    with pytest.raises(ServingError, match=f"{name} is damaged"):
        runtime.load(folder)


def test_a_directory_that_was_copied_in_part_is_an_error(retrieval: Served, tmp_path: Path) -> None:
    folder = shutil.copytree(retrieval.folder, tmp_path / "copy")
    path = folder / "tables.safetensors"
    path.unlink()
    with pytest.raises(ServingError, match=r"is no complete export .*tables.safetensors is missing. Copy the"):
        runtime.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ServingError, match=r"it has no manifest.json, which is written last"):
        runtime.load(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("heads",), None, "KeyError: 'heads'"),
        (("features", "action", "table"), "lost", "KeyError: 'lost'"),
        (("tokens_per_item",), 10**9, "the size of 'tokens_per_item' is 1000000000; it may be at most 2"),
        (("features", "hour_of_day", "size"), 10**11, "the size of 'hour_of_day' is 100000000000; it may be at most 2"),
        (("numbers", 0, "width"), 10**11, "the size of 'price' is 100000000000; it may be at most"),
        (("max_items",), 7.5, "the size of 'max_items' is 7.5"),
        (("version",), None, "serving.json is damaged: it has no 'version'"),
        (("version",), 5, "has the format hstu-serving 5, and this program reads hstu-serving 4"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(
    ranking: Served, tmp_path: Path, place: tuple[Any, ...], value: object, message: str
) -> None:
    folder = shutil.copytree(ranking.folder, tmp_path / "copy")
    facts = json.loads((folder / "serving.json").read_text())
    *outer, last = place
    entry = functools.reduce(lambda entry, key: entry[key], outer, facts)
    entry[last] = value
    if value is None:
        del entry[last]
    rewrite(folder, "serving.json", json.dumps(facts).encode())
    with pytest.raises(ServingError, match=message):
        runtime.load(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "hstu_serving/../../x"])
def test_a_manifest_lists_only_files_of_its_folder(retrieval: Served, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(retrieval.folder, tmp_path / "copy")
    rewrite(folder, name, None)
    with pytest.raises(ServingError, match=r"manifest.json lists it, but it lies outside the folder"):
        runtime.load(folder)


@pytest.mark.parametrize(
    ("history", "at", "message"),
    [
        ({"items": []}, None, "has no items"),
        ({"items": [1]}, None, r"no actions, but the model reads action \(integer: 0, 1, 2, 3\): give"),
        ({"items": [1], "actions": [1]}, None, "has no timestamps"),
        ({"items": [1, 2], "actions": [1], "timestamps": [1, 2]}, None, "has 1 actions for 2 items"),
        ({"context": {"country": 1}}, None, r"has no contextual feature 'country'; it has town \(integer: 0, 1, 2\)"),
        (
            {"features": {"colours": [1]}},
            None,
            r"or events 'colours'; it has colour \(text: value 000, value 001, value 002\), tags \(list of text: ",
        ),
        ({"features": {"price": ["much"]}}, None, "a value of 'price' is 'much'; give a finite number"),
        ({"features": {"price": [10**400]}}, None, "a value of 'price' is 1000.*0000; give a finite number"),
        ({"features": {"colour": [["value 000"]]}}, None, r"'colour' is \['value 000'\]; give one value, or None"),
        ({"features": {"tags": ["value 000"]}}, None, "'tags' is 'value 000'; give a list, or None"),
        ({"items": [1, 2], "actions": [1, 1], "timestamps": [5, 4]}, None, "has an event at 5 before one at 4; give"),
        ({"timestamps": [1_700_000_000_000]}, None, "has the time 1700000000000; give whole seconds since 1970, not"),
        ({}, 1_700_000_000_000, "has the time 1700000000000; give"),
        ({}, 4, "has an event at 5, which is later than the request at 4"),
    ],
)
def test_a_request_that_the_model_cannot_read_is_an_error(
    retrieval: Served, history: dict[str, Any], at: int | None, message: str
) -> None:
    whole = {"items": [1000], "actions": [1], "timestamps": [5]} if "items" not in history else {}
    with pytest.raises(ServingError, match=message):
        retrieval.model.recommend(History(**{**whole, **history}), at=at)


@pytest.mark.parametrize("item", [" 1000 ", "1_000", "+1000", "\u0661\u0660\u0660\u0660", "1000.0", 1000.5, "1" * 5000])
def test_only_digits_are_a_number(retrieval: Served, item: object) -> None:
    assert retrieval.model.encoder.items.places([item, "1000", 1000]).tolist() == [-1, 0, 0]


def test_models_whose_requests_would_lack_something_are_refused(
    mesh: Mesh, features: SequenceStore, tmp_path: Path
) -> None:
    network, dataset = {"target_group_size": 2}, {"max_num_candidates": 2}
    grouped = random_model("ranking", features, mesh, tmp_path, network=network, dataset=dataset)
    with pytest.raises(ConfigError, match="target_group_size = 2"):
        check_can_be_served(grouped)
    with pytest.raises(ConfigError, match=r"in groups of 2 .* train with target_group_size = 1"):
        nothing = np.zeros(0, dtype=np.int64)
        RankingPredictor(grouped, command.Candidates(nothing, nothing, nothing, {}))


def test_the_folder_has_the_package_which_imports_torch_and_the_standard_library_alone(retrieval: Served) -> None:
    package, allowed = retrieval.folder / "hstu_serving", {*sys.stdlib_module_names, "torch"}
    assert {path.name for path in package.iterdir()} == {
        path.name for path in Path(runtime.__file__).parent.glob("*.py")
    }
    for path in package.iterdir():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= allowed, path


def grown(items: list[int], colours: list[str]) -> Callable[[Tensors, Tensors], None]:
    """A change to these items and values of "colour": rows go with their ids, and those of new ids are 2."""

    def places_of(now: Sequence[object], before: list[object]) -> list[int]:
        return [before.index(each) if each in before else -1 for each in now]

    def taken(rows: torch.Tensor, places: list[int]) -> torch.Tensor:
        return torch.cat([rows, torch.full_like(rows[:1], 2)])[places]

    def change(tables: Tensors, words: Tensors) -> None:
        places = places_of(items, words["ids.item_id"].tolist())
        rows = places_of(colours, [*texts_of(words, "ids.colour")])
        for name in ("item_id_table", "item_vectors"):
            tables[name] = taken(tables[name], places)
        tables["colour_table"] = taken(tables["colour_table"], rows)
        words["item.price"] = taken(words["item.price"], places)
        words["item.colour"] = taken(torch.tensor([rows.index(row) for row in words["item.colour"].tolist()]), places)
        lists = [*words["item.tags"].split(words["item.tags.offsets"].diff().tolist()), torch.tensor([3, 0, 1])]
        words["item.tags"] = torch.cat([lists[place] for place in places])
        words["item.tags.offsets"] = torch.tensor([0, *(len(lists[place]) for place in places)]).cumsum(0)
        words |= {"ids.item_id": torch.tensor(items), **as_texts("ids.colour", colours)}
        words |= as_texts("titles", [f"Film {item}" * (item % 3) for item in items])

    return change


def touched(tables: Tensors, words: Tensors) -> None:
    tables["item_id_table"][[1, 2]] += 1e-3
    tables["item_id_table"][4, 0] = -tables["item_id_table"][4, 0]


@pytest.fixture(scope="module")
def chain(retrieval: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole exports w0 to w3, and deltas: d1 from w0, d2 from d1, d3 from d2."""
    root, colours = tmp_path_factory.mktemp("chain"), ["value 000", "value 001", "value 002"]
    shutil.copytree(retrieval.folder, root / "w0")
    export_with(root / "w0", root / "w1", grown([5, 1000, 1001, *range(1004, 1011), 2000], colours))
    export_with(root / "w1", root / "w2", grown([5, *range(1000, 1011), 2000], ["a", *colours, "z"]))
    export_with(root / "w2", root / "w3", touched)
    for number, base in enumerate(("w0", "d1", "d2"), 1):
        delta_of(root / f"w{number}", root / base, root / f"d{number}")
    return root


def held_by(folder: Path) -> dict[str, bytes]:
    """What an export holds: the bytes of each file that a service reads, also if it follows from a base."""
    found = read_export(folder)
    tensors = {
        f"{file}/{name}": each.numpy().tobytes() for file in found.tensors for name, each in found.tensors[file].items()
    }
    return tensors | {name: found.path_of(name).read_bytes() for name in found.files if name not in found.tensors}


def test_a_base_and_its_deltas_hold_what_whole_exports_hold(chain: Path) -> None:
    for number in (1, 2, 3):
        assert held_by(chain / f"d{number}") == held_by(chain / f"w{number}")
        assert digest_of(chain / f"d{number}") == digest_of(chain / f"w{number}")
    history = request([1000, 1003, 2000], [1, 2, 3], [60, 120, 180])
    assert runtime.load(chain / "d3").recommend(history) == runtime.load(chain / "w3").recommend(history)


def test_a_delta_has_the_rows_that_have_changed_and_not_those_that_have_moved(chain: Path) -> None:
    def changed(delta: str) -> dict[str, int]:
        changes = read_tensors(chain / delta / "changes.safetensors")
        return {key.split("/")[1]: len(each) for key, each in changes.items() if key.endswith("/values")}

    added = {"item_id_table", "item_vectors", "item.price", "item.colour", "ids.item_id", "item.tags.offsets"}
    assert {name: changed("d1").get(name) for name in added} == dict.fromkeys(added, 2)
    second = changed("d2")
    assert {name: second[name] for name in added} == dict.fromkeys(added, 2) and second["colour_table"] == 2
    assert second["item.tags"] == 2 * 2 and second["ids.colour.offsets"] == second["ids.colour.utf8"] == 2
    assert changed("d3") == {"item_id_table": 3}


def test_a_delta_shares_with_its_base_what_has_not_changed(chain: Path) -> None:
    base = runtime.load(chain / "d2")
    model = runtime.load(chain / "d3", like=base)
    assert model._program is base._program and model.encoder.items is base.encoder.items
    assert model.tables["tags_table"].weight is base.tables["tags_table"].weight
    assert runtime.load(chain / "d3").item_vectors([1000]).equal(model.item_vectors([1000]))


def test_rows_that_change_by_less_than_a_threshold_are_left_out_and_counted_from_what_is_served(
    chain: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(chain, tmp_path / "copy"))
    export_with(root / "w3", root / "w4", touched)
    export_with(root / "w4", root / "w5", touched)
    sizes = [delta_of(root / f"w{n}", root / base, root / f"d{n}", 1.5e-3) for n, base in ((4, "d3"), (5, "d4"))]
    assert [size.changed for size in sizes] == [1, 2 + 1]  # those two are 1e-3 and then 2e-3 behind
    assert sizes[0].num_bytes < sizes[0].whole_bytes / 2
    assert held_by(root / "d5") == held_by(root / "w5")


@pytest.mark.parametrize(
    ("name", "happens", "message"),
    [
        ("d2", "", "d2 is no complete export .* it has no manifest.json"),
        ("d2/changes.safetensors", "flip", "changes.safetensors is damaged: its sha256"),
        ("w0/tables.safetensors", "flip", "d1 leads .*tables.safetensors is damaged"),
        ("d2", "w1", "the export at .*d2 has {w1}"),
        ("d2", "d3", "the export at .*d2 has {w3}"),
    ],
)
def test_a_delta_whose_base_is_missing_damaged_or_another_is_refused(
    chain: Path, tmp_path: Path, name: str, happens: str, message: str
) -> None:
    root = Path(shutil.copytree(chain, tmp_path / "copy"))
    if happens == "flip":
        flip(root / name)
    else:
        shutil.rmtree(root / name)
    if happens in ("w1", "d3"):
        shutil.copytree(root / happens, root / name)
    digests = {name: digest_of(chain / name)[:12] for name in ("w1", "w2", "w3")}
    with pytest.raises(ServingError, match=message.format(**digests)) as refused:
        runtime.load(root / "d3")
    if "d1 leads" not in message:
        assert f"d3 leads from the export with the digest {digests['w2']} to {digests['w3']}, but " in str(
            refused.value
        )
        assert f"Put the export with {digests['w2']} at {root}/d2, or make a whole export" in str(refused.value)


def test_a_delta_between_models_that_do_not_fit_is_refused(chain: Path, ranking: Served, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its program.pt2 has the sha256 .*; make a whole export: leave out --delta"):
        delta_of(ranking.folder, chain / "d3", tmp_path / "d")

    def halve(tables: Tensors, _: Tensors) -> None:
        tables |= {name: rows.bfloat16() for name, rows in tables.items()}

    half = export_with(chain / "w3", tmp_path / "half", halve)
    with pytest.raises(DataError, match=r"table .* has float32, not bfloat16; give --table_dtype float32"):
        delta_of(half, chain / "d3", tmp_path / "d")


def test_the_command_writes_a_delta_of_a_later_checkpoint(
    finished: Callable[[str], FinishedRun],
    exported: Callable[[str], Path],
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "mesh_of_this_process", lambda: mesh)
    command, whole = ["--run_dir", str(finished("retrieval").path)], exported("retrieval")
    for name, options in {
        "base": ["--ckpt", "12", "--program"],
        "delta": ["--ckpt", "15", "--delta", str(tmp_path / "base")],
    }.items():
        assert export.main([*command, *options, "--output", str(tmp_path / name)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"delta: \d+ of \d+ rows, [\d,]+ bytes; a whole export has [\d,]+", last)
    assert held_by(tmp_path / "delta") == held_by(whole)
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {"manifest.json", "serving"}
    assert runtime.load(tmp_path / "delta/serving").facts == runtime.load(whole / "serving").facts
    shutil.rmtree(tmp_path / "base/serving")
    command += ["--delta", str(tmp_path / "base"), "--output", str(tmp_path / "next")]
    assert export.main(command) == EXIT_BAD_DATA
    assert "base is no export for serving; give" in capsys.readouterr().err
