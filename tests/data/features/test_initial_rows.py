"""Files of vectors by raw id, and what is wrong with them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import EmbeddingArgs
from hstu.data.features import initial_rows
from hstu.data.features.initial_rows import InitialRows, find_initial_rows
from tests.conftest import write_small_store

NUMBERS = np.array([1000, 1003, 1007, 1010])
TEXTS = np.array(["a", "b", "d", "é"], dtype=object)


def opened(path: Path, columns: dict[str, Any], raw_ids: np.ndarray | None = NUMBERS, dim: int = 3) -> InitialRows:
    pq.write_table(pa.table(columns), path / "rows.parquet")
    table = EmbeddingArgs(
        feature_names=["item_id"],
        table_name="item",
        item_vocab_size_or_capacity=9,
        sharding_type="data_parallel",
        initial_rows=str(path / "rows.parquet"),
    )
    return InitialRows(table, raw_ids, 4, dim, initial_rows.cite)


def read(rows: InitialRows) -> dict[int, list[float]]:
    blocks = list(rows.blocks())
    return {code: vector for codes, vectors in blocks for code, vector in zip(codes, vectors.tolist(), strict=True)}


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2), pa.large_list(pa.float64())])
@pytest.mark.parametrize(
    ("raw_ids", "ids"),
    [
        (NUMBERS, [1010, 5, 1000]),
        (TEXTS, ["é", "c", "a"]),
        (None, [3, 7, 0]),  # the raw ids are the rows, of which there are 4
        (NUMBERS, pa.array([1010, 5, 1000], pa.int32())),
    ],
)
def test_vectors_are_found_by_raw_id_in_blocks(
    kind: pa.DataType, raw_ids: np.ndarray | None, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_rows, "_BLOCK_ROWS", 2)
    vectors = pa.array([[1, 2], [3, 4], [5, 6]], kind)
    rows = opened(tmp_path, {"other": [0, 0, 0], "vector": vectors, "id": ids}, raw_ids)
    assert read(rows) == {3: [1, 2], 0: [5, 6]}
    assert (rows.known, rows.unknown, rows.width) == (2, 1, 2)
    assert str(rows).startswith(
        "2 of 4 rows start with the vectors of "
    ) and "(2 of 3 columns); ids of the file that the data lacks: 1" in str(rows)


VECTORS = pa.array([[1.0, 2], [3, 4]], pa.list_(pa.float32()))
LISTS = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id": [1000, 1003]}, "must have one column 'vector'; it has 'id'"),
        ({"id": [1000, 1000], "vector": VECTORS}, "the id 1000 occurs more than once"),
        ({"id": [1000, None], "vector": VECTORS}, "'id' has nulls"),
        ({"id": ["1000", "1003"], "vector": VECTORS}, "'id' is of string, and the raw ids of the data are int64"),
        ({"id": [1000.0, 1003.0], "vector": VECTORS}, "'id' is of double, and the raw ids of the data are int64"),
        ({"id": pa.array([1, 2**63], pa.uint64()), "vector": VECTORS}, "ids that are no int64"),
        ({"id": [1000, 1003], "vector": [1.0, 2.0]}, "'vector' is of double; it must have lists of float32"),
        ({"id": [1000, 1003], "vector": pa.array([[1.0], [1, 2]], LISTS)}, "has 1 numbers and another one 2"),
        ({"id": [1000, 1003], "vector": pa.array([None, [1, 2]], LISTS)}, "a vector is missing or empty"),
        ({"id": [1000, 1003], "vector": pa.array([[1.0], [None]], LISTS)}, "missing or not finite"),
        ({"id": [1000, 1003], "vector": pa.array([[1.0], [np.inf]], LISTS)}, "missing or not finite"),
        (
            {"id": [1000, 1003], "vector": pa.array([[1.0] * 4] * 2, LISTS)},
            "have 4 numbers and the rows of the table 3",
        ),
        ({"id": pa.array([], pa.int64()), "vector": pa.array([], LISTS)}, "the file has no rows"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(
    columns: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"EmbeddingArgs.initial_rows = '.*': .*{re.escape(said)}"):
        opened(tmp_path, columns).check()


def test_ids_that_recur_in_a_later_block_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_rows, "_BLOCK_ROWS", 1)
    with pytest.raises(ConfigError, match="the id 1003 occurs more than once"):
        opened(tmp_path, {"id": [1003, 1003], "vector": VECTORS}).check()


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    rows = opened(tmp_path, {"id": [1000, 1003], "vector": VECTORS})
    (tmp_path / "rows.parquet").write_text("id,vector")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        rows.check()
    (tmp_path / "rows.parquet").unlink()
    with pytest.raises(ConfigError, match="there is no such file"):
        rows.check()


def test_a_table_whose_rows_stand_for_several_raw_ids_has_no_initial_rows(tmp_path: Path) -> None:
    store = write_small_store(tmp_path / "store", [[0, 1], [1, 0]], context={"town": [0, 1]})
    table = EmbeddingArgs(
        feature_names=["item_id", "town"],
        table_name="both",
        item_vocab_size_or_capacity=9,
        sharding_type="data_parallel",
        initial_rows="rows.parquet",
    )
    with pytest.raises(ConfigError, match="the features item_id, town of the table have different raw ids"):
        find_initial_rows(store, [table], {"both": 4})
