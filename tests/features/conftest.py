"""One thread, as in a worker: tiny networks on many threads mostly wait for each other."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
