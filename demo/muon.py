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

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Muon", "orthogonalized"]

# Of the quintic that pushes all singular values towards 1, from the article.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """float32 (n, rows, columns) -> the same, all singular values between about 0.7 and 1.2.

    Newton-Schulz iteration: X <- a X + (b G + c G G) X with G = X X^T.
    """
    import torch

    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.mT


class Muon:
    """params: matrices (rows = outputs, columns = inputs), float32.

    An update has the size lr * sqrt(max(1, rows / columns)) in every direction, so the decay of
    lr * weight_decay keeps every singular value below about 1 / weight_decay. Without such a bound
    the first layer of a language model grows until nothing is heard of its input behind it.
    It has the interface of torch's optimizers as far as the training uses it.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float,
    ) -> None:
        self.params = list(params)
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.momenta: dict[int, Tensor] = {}  # by the parameter's number

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self.momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.momenta = dict(state["momenta"])

    def step(self) -> None:
        import torch

        lr = self.param_groups[0]["lr"]
        same_shape: defaultdict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        with torch.no_grad():
            for number, parameter in enumerate(self.params):
                if parameter.grad is None:
                    continue
                momentum = self.momenta.setdefault(number, torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - self.momentum)
                # Nesterov's look ahead
                update = parameter.grad.lerp(momentum, self.momentum)
                same_shape[tuple(parameter.shape)].append((parameter, update))
            for (rows, columns), pairs in same_shape.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                scale = lr * max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - lr * self.weight_decay)
                    parameter.add_(update, alpha=-scale)
