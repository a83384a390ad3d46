"""Jagged concatenation and positions."""

from itertools import pairwise

import torch
from hypothesis import given

from hstu.ops.layout import part_rows, token_order
from hstu.ops.pytorch.operators import add_positions, jagged_concat
from tests.ops.oracle import User
from tests.ops.strategies import Batch, batches


@given(batches())
def test_tokens_stand_where_a_loop_over_users_puts_them(batch: Batch) -> None:
    real = [user for user in batch.users if not user.is_padding]
    items = [user.history + user.candidates for user in real]
    names = [[f"c{c} of {u}" for u in range(len(real))] for c in range(batch.contextuals)]
    for part in ("item", "action")[: batch.tokens_per_item]:
        names.append([f"{part} {i} of {u}" for u, n in enumerate(items) for i in range(n)])
    flat = [name for part in names for name in part]

    expected = []
    for u, n in enumerate(items):
        expected += [f"c{c} of {u}" for c in range(batch.contextuals)]
        for i in range(n):
            expected += [f"{part} {i} of {u}" for part in ("item", "action")[: batch.tokens_per_item]]

    order = token_order(batch.layout())
    assert [flat[row] for row in order.source.tolist()] == expected
    assert order.source[order.inverse].tolist() == list(range(len(flat)))

    for start, stop in pairwise(
        [0, len(flat) // 3, len(flat) // 2, len(flat)]
    ):  # ranges of tokens, by their rows alone
        of_range = range(start, stop)
        rows_of_parts = part_rows(batch.layout(), of_range)
        own = [name for part, rows in zip(names, rows_of_parts, strict=True) for name in part[rows.start : rows.stop]]
        assert [own[row] for row in token_order(batch.layout(), of_range).source.tolist()] == expected[start:stop]


def test_gradient_goes_back_to_the_row_a_token_came_from() -> None:
    layout = Batch((User(2, 1), User(1, 0)), contextuals=1, tokens_per_item=2, group_size=1).layout()
    parts = [torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (2, 4, 4)]
    assert torch.autograd.gradcheck(lambda *p: jagged_concat(p, token_order(layout)), parts)


def test_positions_beyond_the_table_share_its_last_row() -> None:
    table = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x, positions = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 900])
    out = add_positions(x, table, positions)
    torch.testing.assert_close(out, x + table[[0, 1, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda a, b: add_positions(a, b, positions), (x, table))
