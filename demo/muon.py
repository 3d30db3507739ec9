"""Muon: momentum whose update is made orthogonal, for weight matrices.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Here it needs
half the steps of AdamW or fewer. `torch.optim.Muon` computes in bfloat16, which CPUs without
bfloat16 units do several times slower than float32; this one computes in float32, and matrices of
one shape together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Muon", "orthogonalized"]

# Of the quintic that pushes all singular values towards 1, from the article.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """float32 (n, rows, columns) -> the same, all singular values between about 0.7 and 1.2.

    Newton-Schulz iteration: X <- a X + (b G + c G G) X with G = X X^T.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """params: matrices (rows = outputs, columns = inputs), float32.

    An update has the size lr * sqrt(max(1, rows / columns)) in every direction.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            same_shape: defaultdict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                # Nesterov's look ahead
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                same_shape[parameter.shape].append((parameter, update))
            for (rows, columns), pairs in same_shape.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-scale)
