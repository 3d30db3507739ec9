"""The training's optimizer against exact linear algebra, and the windows of its position table."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

from demo.model import demo_config, start_weights, visual_features  # noqa: E402
from demo.muon import Muon, orthogonalized  # noqa: E402
from internvl_triton.model_spec import ModelSpec  # noqa: E402


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_singular_values_go_to_about_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    in_its_bases = u.mT @ orthogonalized(matrices) @ v.mT
    values = in_its_bases.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (in_its_bases - torch.diag_embed(values)).abs().max() < 1e-4


def test_an_update_is_the_formula() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(12, 6, requires_grad=True)
    before = matrix.detach().clone()
    optimizer = Muon([matrix], 0.1, momentum=0.9, weight_decay=0.2)
    momentum = torch.zeros(12, 6)
    wanted = before.double()
    for _ in range(3):
        gradient = torch.randn(12, 6)
        matrix.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalized((0.1 * gradient + 0.9 * momentum)[None])[0]
        wanted = wanted * (1 - 0.1 * 0.2) - 0.1 * 2**0.5 * update.double()
    assert torch.allclose(matrix.detach().double(), wanted, atol=1e-4)


def test_a_parameter_without_gradient_stays() -> None:
    matrix = torch.ones(2, 2, requires_grad=True)
    Muon([matrix], 0.1, weight_decay=0.1).step()
    assert torch.equal(matrix.detach(), torch.ones(2, 2))


def test_the_decay_bounds_what_always_the_same_gradient_does() -> None:
    torch.manual_seed(2)
    matrix = torch.zeros(6, 6, requires_grad=True)
    optimizer = Muon([matrix], 0.1, weight_decay=0.25)
    matrix.grad = torch.randn(6, 6)
    for _ in range(400):
        optimizer.step()
    assert torch.linalg.matrix_norm(matrix.detach(), ord=2) < 1.3 / 0.25


def test_a_small_tile_is_a_window_of_the_position_table() -> None:
    big = ModelSpec.from_config(demo_config(700, tile_size=112))
    small = ModelSpec.from_config(demo_config(700, tile_size=56))
    weights = start_weights(big, seed=3)
    name = "vision_model.embeddings.position_embedding"
    cut = start_weights(small, seed=3)
    tiles = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    grid = weights[name][0, 1:].reshape(8, 8, -1)
    for origin in ((0, 0), (4, 2)):
        row, column = origin
        window = grid[row : row + 4, column : column + 4].reshape(16, -1)
        cut_positions = torch.cat([weights[name][0, :1], window])[None]
        alone = {**weights, name: cut_positions}
        assert cut[name].shape == cut_positions.shape
        expected = visual_features(alone, tiles, small)
        assert torch.equal(visual_features(weights, tiles, small, origin=origin), expected)
