"""The real engines, on a machine with a GPU, inside the container of the gpu profile.

On the host, after `make engines PROFILE=gpu` has built the image:

    docker run --rm --gpus=all --network=host --shm-size=8g internvl-triton:25.08 sh -c \
        "python3 -m pip install pytest pytest-timeout; python3 -m pytest -W default tests/gpu"

(`-W default`: the warnings of NVIDIA's packages are not ours to mend.) Everywhere else these tests
are skipped.
"""

from __future__ import annotations

import pytest

from build.machine import Machine, mixed_gpus, this_machine, wrong_container


@pytest.fixture(scope="session", autouse=True)
def machine() -> Machine:
    """This machine; its tests are skipped when it has no GPU or is not the container."""
    found = this_machine()
    if not found.gpus:
        pytest.skip("no NVIDIA GPU here")
    if problem := wrong_container(found) or mixed_gpus(found):
        pytest.skip(problem)
    return found
