"""torch's caches of compiled graphs: found again by the next process, and not by another state of our kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

from lorafx import outlined


@pytest.fixture(autouse=True)
def _own_cache():
    with fresh_cache():
        yield


def compiled_anew() -> Counter[str]:
    """What became of the caches when a graph with a fused op was compiled."""
    torch._dynamo.reset()
    counters.clear()

    def backend(gm, inputs):
        return outlined.compile_whole(gm, inputs, None)

    @torch.compile(backend=backend, fullgraph=True)
    def layer(x, w, a, b):
        return torch.ops.lorafx.fused_lora([F.linear(x, w)], x, [a], [b], [None], [2.0], [None], "aten")[0]

    x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, w, a, b), x @ w.T + 2.0 * x @ a.T @ b.T)
    return Counter(counters["aot_autograd"])


def test_other_kernels_are_compiled_anew(monkeypatch):
    assert compiled_anew()["autograd_cache_miss"] == 1
    assert compiled_anew()["autograd_cache_hit"] == 1
    monkeypatch.setattr(outlined, "fingerprint", lambda: "another state")
    changed = compiled_anew()
    assert changed["autograd_cache_miss"] == 1
    assert not changed["autograd_cache_hit"]
    monkeypatch.undo()
    assert compiled_anew()["autograd_cache_hit"] == 1


def test_the_users_own_tag_still_counts():
    compiled_anew()
    with torch.compiler.config.patch(cache_key_tag="mine"):
        assert compiled_anew()["autograd_cache_miss"] == 1
    assert compiled_anew()["autograd_cache_hit"] == 1
