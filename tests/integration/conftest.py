"""Tiny models on a shared machine: one thread, and nothing compiled is carried from test to test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _forget_graphs():
    yield
    torch._dynamo.reset()
