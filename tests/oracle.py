"""The independent reference of the tests: transformers' InternVL port, in fp32.

`build.parity.port` maps the weights; it shares no code with what it is compared with. Prompts come
from the reference template as one string, tiles from the reference formula (`tests.reference`).
"""

from __future__ import annotations

import numpy as np
import pytest

from build.parity.port import Port, pixel_values

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

__all__ = ["Oracle", "torch"]


class Oracle(Port):
    """The port, with a greedy loop of its own."""

    def greedy(
        self, input_ids: list[int], tiles: np.ndarray | None, max_new_tokens: int, end_id: int = -1
    ) -> list[int]:
        """Greedy ids without end_id, by a plain loop over the model's cache."""
        return self.greedy_with_margin(input_ids, tiles, max_new_tokens, end_id)[0]

    @torch.no_grad()
    def greedy_with_margin(
        self, input_ids: list[int], tiles: np.ndarray | None, max_new_tokens: int, end_id: int = -1
    ) -> tuple[list[int], float]:
        """Greedy ids and the smallest gap between the best and second best logit on the way."""
        pixels = None if tiles is None or not len(tiles) else pixel_values(tiles)
        output = self.model(
            input_ids=torch.tensor([input_ids]), pixel_values=pixels, use_cache=True
        )
        answer: list[int] = []
        margin = float("inf")
        while True:
            best = output.logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            token = int(best.indices[0])
            if token == end_id:
                return answer, margin
            answer.append(token)
            if len(answer) == max_new_tokens:
                return answer, margin
            output = self.model(
                input_ids=torch.tensor([[token]]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
