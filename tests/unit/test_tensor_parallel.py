"""Splits against hand arithmetic and brute force."""

import numpy as np
import pytest

from export.tensor_parallel import (
    split_columns,
    split_heads,
    split_rows,
    split_vocabulary,
    split_wqkv,
)


def numbered(rows: int, columns: int) -> np.ndarray:
    """Row r, column c holds 100 r + c."""
    return 100 * np.arange(rows)[:, None] + np.arange(columns)


def test_split_rows() -> None:
    first, second = split_rows(numbered(4, 2), 2)
    assert first.tolist() == [[0, 1], [100, 101]]
    assert second.tolist() == [[200, 201], [300, 301]]


def test_split_columns() -> None:
    first, second = split_columns(numbered(2, 4), 2)
    assert first.tolist() == [[0, 1], [100, 101]]
    assert second.tolist() == [[2, 3], [102, 103]]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_column_then_row_parallel_adds_up_to_the_whole_product(tp_size: int) -> None:
    random = np.random.default_rng(0)
    x, up, down = random.random((3, 5)), random.random((16, 5)), random.random((7, 16))
    partial_sums = [
        x @ a.T @ b.T
        for a, b in zip(split_rows(up, tp_size), split_columns(down, tp_size), strict=True)
    ]
    np.testing.assert_allclose(sum(partial_sums), x @ up.T @ down.T)


@pytest.mark.parametrize(
    ("num_heads", "tp_size", "expected"),
    [
        pytest.param(4, 2, [[0, 1], [2, 3]], id="whole-heads"),
        pytest.param(4, 4, [[0], [1], [2], [3]], id="one-each"),
        pytest.param(2, 4, [[0], [0], [1], [1]], id="duplicated"),
        pytest.param(2, 8, [[0]] * 4 + [[1]] * 4, id="duplicated-4-times"),
        pytest.param(1, 2, [[0], [0]], id="a-single-head"),
    ],
)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_split_heads(num_heads: int, tp_size: int, expected: list[list[int]], kind: str) -> None:
    head_dim = 3
    weight = np.repeat(np.arange(num_heads), head_dim)  # every row holds its head's number
    weight = weight if kind == "bias" else np.tile(weight[:, None], (1, 5))
    parts = split_heads(weight, num_heads=num_heads, tp_size=tp_size)
    for part, heads in zip(parts, expected, strict=True):
        assert part.shape == (len(heads) * head_dim, *weight.shape[1:])
        assert sorted(set(part.flat)) == heads


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_rank_holds_the_kv_heads_of_its_query_heads(tp_size: int, kv_heads: int) -> None:
    heads = 8
    q = split_heads(np.arange(heads), num_heads=heads, tp_size=tp_size)
    kv = split_heads(np.arange(kv_heads), num_heads=kv_heads, tp_size=tp_size)
    for rank in range(tp_size):
        own_groups = len(q[rank]) // len(kv[rank])
        for index, head in enumerate(q[rank]):
            assert kv[rank][index // own_groups] == head // (heads // kv_heads)


@pytest.mark.parametrize(
    ("vocab", "tp_size", "lengths"),
    [
        (8, 4, [2, 2, 2, 2]),
        (1283, 4, [321, 321, 321, 320]),  # ceil(1283 / 4) = 321, one padding row
        (92553, 2, [46277, 46276]),
        (151674, 8, [18960] * 7 + [18954]),  # 8 * 18960 = 151680: six padding rows
        (5, 4, [2, 2, 1, 0]),
    ],
)
def test_split_vocabulary(vocab: int, tp_size: int, lengths: list[int]) -> None:
    weight = numbered(vocab, 1)
    parts = split_vocabulary(weight, tp_size)
    assert [len(part) for part in parts] == lengths
    np.testing.assert_array_equal(np.concatenate(parts), weight)


def test_split_wqkv_is_grouped_by_kv_head() -> None:
    # 4 heads, 2 kv heads, head_dim 1: rows are q0 q1 k0 v0 q2 q3 k1 v1
    wqkv = np.array([[10], [11], [50], [90], [12], [13], [51], [91]])
    q, k, v = split_wqkv(wqkv, num_heads=4, num_kv_heads=2, head_dim=1)
    assert q[:, 0].tolist() == [10, 11, 12, 13]
    assert k[:, 0].tolist() == [50, 51]
    assert v[:, 0].tolist() == [90, 91]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 4), (6, 2, 3), (8, 1, 2)])
def test_split_wqkv_against_brute_force(heads: int, kv_heads: int, head_dim: int) -> None:
    groups = heads // kv_heads
    wqkv = np.random.default_rng(0).random((kv_heads * (groups + 2) * head_dim, 5))
    expected: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for row in range(len(wqkv)):
        within = row // head_dim % (groups + 2)
        letter = "q" if within < groups else "k" if within == groups else "v"
        expected[letter].append(wqkv[row])
    parts = split_wqkv(wqkv, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    for part, rows in zip(parts, expected.values(), strict=True):
        np.testing.assert_array_equal(part, rows)
