import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu.base.hashing import splitmix64
from hstu.parallel.dynamic.hashing import initial_rows, mix, quantiles_of, round_to_bfloat16, table_key, unmix

KEY = table_key(1234, "item")
NORMAL = quantiles_of("normal", torch.device("cpu"))


def test_an_id_has_the_same_row_whoever_is_beside_it_and_another_in_another_table_or_run() -> None:
    ids = torch.tensor([5, -(2**63), 2**63 - 1, 0, -1])
    rows = initial_rows(ids, 6, 0.1, KEY, NORMAL)
    assert torch.equal(initial_rows(ids[[3, 0]], 6, 0.1, KEY, NORMAL), rows[[3, 0]])
    assert len(rows.unique(dim=0)) == len(ids)
    for other in (table_key(1234, "user"), table_key(1235, "item")):
        assert not (initial_rows(ids, 6, 0.1, other, NORMAL) == rows).any()


def test_rows_are_normal_with_the_deviation_asked_for_and_do_not_resemble_one_another() -> None:
    rows = initial_rows(torch.arange(4000), 50, 0.02, KEY, NORMAL) / 0.02
    assert rows.dtype == torch.float32 and rows.shape == (4000, 50)
    assert abs(float(rows.mean())) < 0.01 and abs(float(rows.std()) - 1) < 0.01
    assert abs(float(rows.abs().median()) - 0.6745) < 0.01  # the normal distribution's
    assert float(torch.corrcoef(rows[:50]).fill_diagonal_(0).abs().max()) < 0.6
    assert float(torch.corrcoef(rows.t()).fill_diagonal_(0).abs().max()) < 0.1


def test_rows_may_be_uniform_with_the_same_deviation_or_zeros() -> None:
    ids, device = torch.arange(4000), torch.device("cpu")
    uniform, zeros = (initial_rows(ids, 6, 0.02, KEY, quantiles_of(kind, device)) for kind in ("uniform", "zeros"))
    assert abs(float(uniform.std()) / 0.02 - 1) < 0.01 and not zeros.any()
    assert float(uniform.abs().max()) == pytest.approx(0.02 * 3**0.5, rel=1e-3)
    assert abs(float(uniform.abs().median()) / 0.02 - 3**0.5 / 2) < 0.02


def test_rounding_keeps_what_bfloat16_has_and_on_average_what_it_has_not() -> None:
    kept, keys = torch.tensor([0.0, -0.0, 1.5, -3e38, 1e-40, torch.inf, torch.nan]).bfloat16(), mix(torch.arange(20000))
    rounded = round_to_bfloat16(kept.float().expand(9, -1), keys[:9])
    assert torch.equal(rounded[:, :-1], kept[:-1].expand(9, -1)) and rounded[:, -1].isnan().all()
    between = torch.tensor([1 + 2**-9, -1 - 2**-8 * 1.5, 3e-3, 1 - 2**-10])
    rounded = round_to_bfloat16(between.expand(len(keys), -1), keys).float()
    assert [len(column.unique()) for column in rounded.t()] == [2] * 4
    torch.testing.assert_close(rounded.mean(0), between, rtol=1e-4, atol=0)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_hashes_of_tensors_are_those_of_arrays_and_have_an_inverse(ids: list[int]) -> None:
    mixed = mix(torch.tensor(ids))
    assert np.array_equal(mixed.numpy().view(np.uint64), splitmix64(np.array(ids)))
    assert unmix(mixed).tolist() == ids
