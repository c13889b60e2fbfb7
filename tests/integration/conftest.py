"""Tiny models on a shared machine: one thread, and nothing compiled is carried from test to test."""

from __future__ import annotations

import pytest
import torch

from lorafx.logs import warn_once


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


@pytest.fixture(autouse=True)
def _each_warning_anew():
    """A warning comes once in a process, and tests share one."""
    warn_once.__defaults__[0].clear()
