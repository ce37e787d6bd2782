"""Shared by all tests: one thread, so that small shapes are quick and results do not depend on the machine's cores."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
