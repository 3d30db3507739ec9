"""Train the demo model from nothing, on two CPU cores, in pieces if you like.

    python -m demo.train

The state (weights, optimiser, place) is saved every few minutes; the same command goes on from
there. Ctrl-C and SIGTERM save first. Every batch follows from the seed and the step alone, so
an interrupted training sees the same data as one in a single piece.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

__all__ = ["main"]

_DEFAULT = Path("artifacts/demo-training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--directory", type=Path, default=_DEFAULT, help=f"state and log (default {_DEFAULT})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="save and stop after this long"
    )
    arguments = parser.parse_args()
    # Threads that wait must sleep: the other ones may not have a core of their own.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from demo.training import Trainer

    torch.set_flush_denormal(True)  # arithmetic on them is many times slower
    trainer = Trainer(arguments.directory, seed=arguments.seed, threads=arguments.threads)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: trainer.stop())
    trainer.run(minutes=arguments.minutes)


if __name__ == "__main__":
    main()
