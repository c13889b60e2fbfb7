"""Tiny models on a shared machine: one thread, and nothing compiled is carried from test to test."""

from __future__ import annotations

import signal

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


@pytest.fixture
def interruptible():
    """Python's own SIGINT handler, also where a shell has started us in the background, which ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
