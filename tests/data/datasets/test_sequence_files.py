"""Files with one line per user, ``user item item …``, and JSON of attributes: the same store as that of a table."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import DataError
from hstu.data.preprocess import preprocess
from hstu.data.preprocess.report import format_report
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.data.own_tables import histories, own_store
from tests.data.preprocess.test_restart import arrays, stopped_after_each_stage

Sequences = dict[Any, list[Any]]
Attributes = dict[Any, list[Any] | None]
NAMES: dict[str, Any] = {"user": "user", "item": "item", "context_columns": ("user",), "item_columns": ("attributes",)}


def generate(key: Callable[[int], Any]) -> tuple[Sequences, Attributes]:
    """600 users out of order with 1 to 30 items each; of 90 items some lack a row, a value or all values."""
    rng = np.random.default_rng(7)
    sequences = {
        key(int(user)): [key(int(item)) for item in rng.integers(0, 90, rng.integers(1, 31))]
        for user in rng.permutation(600)
    }
    attributes: Attributes = {key(item): rng.integers(0, 40, item % 4).tolist() for item in range(80)}
    return sequences, attributes | {key(3): None, key(89): ["no item of the events" * 9, " "]}


def as_table(folder: Path, sequences: Sequences, attributes: Attributes) -> dict[str, Any]:
    """Writes both as CSV, line by line; the arguments of own_store."""
    with (folder / "events.csv").open("w") as events, (folder / "items.csv").open("w") as items:
        events.write("user,item\n")
        events.writelines(f"{user},{item}\n" for user, history in sequences.items() for item in history)
        items.write("item,attributes\n")
        items.writelines(f"{item},{'|'.join(map(str, values or ()))}\n" for item, values in attributes.items())
    return NAMES | {
        "interactions": folder / "events.csv",
        "items": folder / "items.csv",
        "lists": {"attributes": "|"},
    }


def as_lines(folder: Path, sequences: Sequences, attributes: Attributes) -> dict[str, Any]:
    """Writes the file of sequences, as badly as allowed, and the JSON; the arguments of own_store."""
    ends, gaps = ("\n", "\r\n", " \n\n"), (" ", "  ", "\t")
    text = "".join(
        gaps[row % 3].join(map(str, (user, *history))) + ends[row % len(ends)]
        for row, (user, history) in enumerate(sequences.items())
    )
    with gzip.open(folder / "lines.txt.gz", "wt", encoding="utf-8-sig", newline="") as file:
        file.write(text)
    (folder / "items.json").write_text(json.dumps({str(item): values for item, values in attributes.items()}, indent=1))
    given = {"interactions": folder / "lines.txt.gz", "items": folder / "items.json", "sequences": True}
    return NAMES | given


@pytest.mark.parametrize(
    "key", [int, lambda number: f"ü{number}", lambda number: f"{number:03}"], ids=["int", "text", "007"]
)
@pytest.mark.parametrize("limits", [{}, {"min_user_events": 9, "min_item_events": 85}], ids=["all", "core"])
def test_lines_of_users_give_the_store_of_a_table(
    key: Callable[[int], Any], limits: dict[str, Any], tmp_path: Path
) -> None:
    data = generate(key)
    of_lines = own_store(tmp_path, **as_lines(tmp_path, *data), **limits, memory_limit="256MiB")
    of_table = own_store(tmp_path, **as_table(tmp_path, *data), **limits, store="table")
    assert arrays(of_lines) == arrays(of_table)
    assert of_lines.statistics == of_table.statistics
    if not limits:
        assert histories(of_lines) == data[0]


@pytest.mark.parametrize(("name", "file"), [("amazon-beauty", "Beauty"), ("amazon-toys", "Toys_and_Games")])
def test_the_real_files_are_complete_and_give_the_store_of_a_table(
    name: str, file: str, raw_data_dir: Path, tmp_path: Path
) -> None:
    raw = raw_data_dir / "amazon"
    store = SequenceStore.open(preprocess(name, raw_path=raw, output=tmp_path / "store"))
    rows = [line.split() for line in (raw / f"{file}.txt").read_text().splitlines()]
    attributes = json.loads((raw / f"{file}_item2attributes.json").read_text())
    table = own_store(tmp_path, **as_table(tmp_path, {row[0]: row[1:] for row in rows}, attributes), store="table")
    assert arrays(store) == arrays(table)
    assert "as published: users, items, events" in format_report(store)


def test_bad_lines_may_be_skipped_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "Beauty.txt").write_text("1 5 6\n2\n1 7 8\n3 5 x 7\n")  # and without attributes
    store = SequenceStore.open(
        preprocess("amazon-beauty", raw_path=tmp_path, output=tmp_path / "store", bad_row_policy="skip")
    )
    assert histories(store) == {1: [5, 6], 3: [5, 7]}
    assert store.statistics["skipped_rows"] == {"unusable item": 2, "unusable user": 2}


@pytest.mark.parametrize("delimiter", [" ", ",", "::", "|"])
def test_lines_of_events_and_other_separators_give_the_same_store(tmp_path: Path, delimiter: str) -> None:
    rows = generate(lambda number: f"ü{number}")[0]
    of_users = [[user, *items] for user, items in rows.items()]
    given: dict[str, Any] = {**NAMES, "item_columns": (), "sequences": True, "delimiter": delimiter}
    for lines in (of_users, [[user, item] for user, items in rows.items() for item in items]):
        file = tmp_path / f"{len(lines)}.txt"
        file.write_text("".join(f"{delimiter.join(line)}\n" for line in lines))
        assert histories(own_store(tmp_path, file, **given, store=file.stem)) == rows
        file.write_text(file.read_text() + delimiter.join(of_users[0]))
        with pytest.raises(
            DataError, match=rf"{file.name}:{len(lines) + 1}: 'user' is 'ü\d+'; .* each line is one event"
        ):
            own_store(tmp_path, file, **given, store="bad")


def test_another_file_continues_the_histories(tmp_path: Path) -> None:
    files = [tmp_path / "may.txt", tmp_path / "june.txt"]
    for file, text in zip(files, ("b 1 2\na 3\n", "a 4\nc 1\n"), strict=True):
        file.write_text(text)
    given: dict[str, Any] = {**NAMES, "item_columns": (), "sequences": True}
    own_store(tmp_path, files[0], **given)
    store = own_store(tmp_path, files[1], **given, append=True)
    assert histories(store) == {"a": [3, 4], "b": [1, 2], "c": [1]}
    assert arrays(store) == arrays(own_store(tmp_path, files, **given, store="at_once"))


def test_a_stopped_build_goes_on_and_its_command_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = as_lines(tmp_path, *generate(int))
    whole = arrays(own_store(tmp_path, **given, store="whole"))
    store, stages = stopped_after_each_stage(monkeypatch, lambda: own_store(tmp_path, **given))
    assert arrays(store) == whole
    assert {"log_0", "item_table_as_read"} <= set(stages)
    command = ["--dataset_name", "shop", "--interactions", "lines.txt.gz", "--sequences"]
    assert [main(command), main(command), main([*command, "--force"])] == [0, 0, 0]
    recorded = f"python scripts/preprocess_dataset.py {' '.join(command[:4])} --user user --item item --sequences"
    assert SequenceStore.open(Path("tmp_data/shop")).command == f"{recorded} --output tmp_data/shop"
