"""Which stretches of a graph are found to repeat, where they are cut, and that the parts compute what it does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorafx.outlined import Outlined
from lorafx.passes.find_repeats import Rows, find_repeats
from lorafx.passes.graph_values import Values
from lorafx.passes.outline import NoOutline, outline

WIDTH = 8


def seen(model, *args, dynamic=False, grad=False):
    """What outlining makes of ``model``'s graph. ``plan`` is None where ``reason`` says why."""
    result = SimpleNamespace(plan=None, reason=None, calls=0)

    def backend(gm, inputs):
        result.rows = Rows(gm.graph, Values(gm, inputs, torch._guards.detect_fake_mode(inputs)))
        result.repeats = find_repeats(result.rows)
        try:
            result.plan = outline(gm, inputs)
        except NoOutline as error:
            result.reason = str(error)
            return gm.forward

        def counting(part):
            def call(values):
                result.calls += 1
                return part.module(*values)

            return call

        return Outlined(result.plan, [counting(part) for part in result.plan.parts])

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        result.out = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return result


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """``step(i, layer, x)`` for each layer, between an embedding of a kind and a head."""

    def __init__(self, step, count=6, bias=lambda i: True, width=lambda i: WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, width(i), bias(i)), "down": nn.Linear(width(i), WIDTH)})
            for i in range(count)
        )

    def forward(self, x, *more):
        x = x.sin() * 2
        for i, layer in enumerate(self.layers):
            x = self.step(i, layer, x, *more)
        return x.tanh(), x.exp()


def plain(i, layer, x):
    return x + layer["down"](layer["up"](x).relu())


NODES = 4  # of `plain`: linear, relu, linear, add


def assert_same(result, model, *args):
    with torch.no_grad():
        expected = model(*args)
    torch.testing.assert_close(result.out, expected, rtol=0, atol=0)


def test_layers_are_one_part():
    model, x = Layers(plain), noise(3, WIDTH)
    result = seen(model, x)
    (repeat,) = result.repeats
    assert (repeat.start, repeat.period, repeat.count) == (2, NODES, 6)
    assert [len(part.module.graph.find_nodes(op="placeholder")) for part in result.plan.parts] == [1, 5, 1]
    assert [step.part for step in result.plan.steps] == [0, 1, 1, 1, 1, 1, 1, 2]
    assert result.plan.repeats == 5
    assert result.calls == 8
    assert_same(result, model, x)


def test_one_value_crosses():
    """The cut is between two layers, not inside one: there a layer's input lives beside what is computed of it."""
    result = seen(Layers(plain), noise(3, WIDTH))
    head, layer, tail = (part.module.graph.output_node().args[0] for part in result.plan.parts)
    assert (len(head), len(layer), len(tail)) == (1, 1, 2)
    last = result.rows.nodes[result.repeats[0].stop - 1]
    assert last.target.__name__ == "add"


def test_what_is_dead_is_dropped():
    plan = seen(Layers(plain), noise(3, WIDTH)).plan
    assert [len(step.dead) for step in plan.steps] == [0] + [1] * 7, "nobody reads a layer's input after it"


def test_a_value_for_all_layers():
    model = Layers(lambda i, layer, x, mask: plain(i, layer, x) * mask)
    args = noise(3, WIDTH), noise(3, 1, seed=1)
    result = seen(model, *args)
    assert result.plan.repeats == 5
    assert_same(result, model, *args)


def test_what_layers_return():
    """Each layer's result is a result of the graph too."""

    class All(Layers):
        def forward(self, x):
            outs = [x.sin()]
            for i, layer in enumerate(self.layers):
                outs.append(plain(i, layer, outs[-1]))
            return outs, None

    model, x = All(plain), noise(3, WIDTH)
    result = seen(model, x)
    assert result.plan.repeats == 5
    assert_same(result, model, x)


def test_a_layer_that_reads_the_one_before_the_last():
    class Skips(Layers):
        def forward(self, x):
            before, x = x.sin(), x.cos()
            for i, layer in enumerate(self.layers):
                before, x = x, plain(i, layer, x) + before
            return x

    model, x = Skips(plain, count=8), noise(3, WIDTH)
    result = seen(model, x)
    assert result.plan.repeats >= 5
    assert_same(result, model, x)


def test_two_kinds_of_layers_in_turn():
    model = Layers(lambda i, layer, x: plain(i, layer, x.relu() if i % 2 else x.sigmoid()), count=10)
    result = seen(model, x := noise(3, WIDTH))
    (repeat,) = result.repeats
    assert (repeat.period, repeat.count) == (2 * (NODES + 1), 5)
    assert_same(result, model, x)


def test_two_stacks():
    """Encoder and decoder: each has a part of its own."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Layers(plain), Layers(lambda i, layer, x: plain(i, layer, x.sigmoid()))

        def forward(self, x):
            return self.right(self.left(x)[0])

    model, x = Both(), noise(3, WIDTH)
    result = seen(model, x)
    assert [(repeat.period, repeat.count) for repeat in result.repeats] == [(NODES, 6), (NODES + 1, 6)]
    assert len(result.plan.parts) == 5
    assert_same(result, model, x)


@pytest.mark.parametrize(
    "model",
    [
        Layers(lambda i, layer, x: plain(i, layer, x) * (i + 1)),
        Layers(lambda i, layer, x: plain(i, layer, x)[:, [*range(i, WIDTH), *range(i)]]),
        Layers(lambda i, layer, x: x.roll(i) + plain(i, layer, x)),
        Layers(plain, count=3),
        Layers(plain, bias=lambda i: i % 3 == 0),
        Layers(plain, width=lambda i: 4 + i),
        Layers(lambda i, layer, x: x + layer["down"](layer["up"](x).relu() if i % 2 else layer["up"](x).sigmoid()), 4),
    ],
    ids=["constant", "indices", "argument", "too few", "a bias here and there", "widths", "two kinds, four"],
)
def test_looks_repeated(model):
    x = noise(3, WIDTH)
    result = seen(model, x)
    assert result.repeats == []
    assert "nothing in it repeats" in result.reason
    assert_same(result, model, x)


def test_a_constant_of_another_type():
    """1, 1.0 and True are equal, and compute different things."""

    class Mixed(nn.Module):
        def forward(self, x):
            for one in (1, 1.0, 1, 1.0, 1, 1.0):
                x = (x // 2) * one
            return x

    result = seen(Mixed(), torch.arange(12))
    assert all(repeat.period > 2 for repeat in result.repeats)


def test_wired_otherwise():
    """Alike node by node, but in layer 4 another value goes into the product and into the sum, wherever the cut is."""

    class Wired(nn.Module):
        def forward(self, x):
            for i in range(10):
                a, b = x.sin(), x.cos()
                c = a * (a if i == 4 else b)
                d = c.exp()
                x = d + (d if i == 4 else c)
            return x

    model, x = Wired(), noise(3, WIDTH)
    result = seen(model, x)
    covered = {row for repeat in result.repeats for row in range(repeat.start, repeat.stop)}
    product, total = (4 * 5 + i for i in (2, 4))
    assert covered, "the other layers repeat"
    assert not {product, total} <= covered
    assert_same(result, model, x)


def test_one_layer_is_other():
    """A stretch ends there, another begins behind the node that is different."""
    model = Layers(lambda i, layer, x: plain(i, layer, x.sigmoid() if i == 5 else x), count=10)
    result = seen(model, x := noise(3, WIDTH))
    assert [repeat.count for repeat in result.repeats] == [5, 5]
    assert_same(result, model, x)


# ------------------------------------------------------------------------------------------------ memory


def caches(count=6, seed=3):
    return [noise(5, WIDTH, seed=seed + i) for i in range(count)]


def write_and_read(i, layer, x, caches, at):
    caches[i].index_copy_(0, at, x)
    return plain(i, layer, caches[i].mean(0, keepdim=True) + x)


def assert_writes(step, count=6, shared=None):
    model = Layers(step, count)
    mine, theirs = (shared() if shared else caches(count) for _ in range(2))
    x, at = noise(1, WIDTH), torch.tensor([2])
    result = seen(model, x, mine, at)
    with torch.no_grad():
        expected = model(x, theirs, at)
    torch.testing.assert_close(result.out, expected, rtol=0, atol=0)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    return result


def test_writes_to_inputs():
    assert assert_writes(write_and_read).plan.repeats == 5


def test_writes_to_one_input_in_turn():
    """All layers write to one tensor, which the next one reads."""

    def one():
        cache = noise(5, WIDTH, seed=3)
        return [cache] * 6

    assert assert_writes(write_and_read, shared=one).plan.repeats == 5


def test_inputs_that_share_memory():
    """A layer writes to one and reads the other: compiled for two that share nothing, it would read too early."""

    def views():
        whole = noise(6, WIDTH, seed=3)
        return [whole[i % 2 : i % 2 + 5] for i in range(8)]

    def both(i, layer, x, caches, at):
        caches[i].index_copy_(0, at, x)
        return plain(i, layer, caches[i + 2].mean(0, keepdim=True) + caches[i + 1].mean(0, keepdim=True) + x)

    model = Layers(both, 6)
    mine, theirs = views(), views()
    x, at = noise(1, WIDTH), torch.tensor([2])
    result = seen(model, x, mine, at)
    assert result.repeats == []
    assert "share memory" in result.reason
    with torch.no_grad():
        expected = model(x, theirs, at)
    torch.testing.assert_close(result.out, expected, rtol=0, atol=0)


def test_a_computed_value_that_is_written_to_later():
    """Its memory belongs to one part, and what another writes there must not be lost."""

    class Sums(Layers):
        def forward(self, x):
            total = x.cos()
            for i, layer in enumerate(self.layers):
                x = plain(i, layer, x)
                total.add_(x)
            return x, total

    model, x = Sums(plain), noise(3, WIDTH)
    result = seen(model, x)
    assert result.plan is None
    assert_same(result, model, x)


def test_a_computed_value_written_to_where_it_is_made():
    """A cache that the graph makes: zeros, then a write, then it is a result."""

    class Makes(Layers):
        def forward(self, x):
            made = []
            for i, layer in enumerate(self.layers):
                cache = torch.zeros(5, WIDTH)
                cache[1:4].copy_(x)
                made.append(cache)
                x = plain(i, layer, x)
            return x, made

    model, x = Makes(plain), noise(3, WIDTH)
    result = seen(model, x)
    assert result.plan.repeats >= 4
    assert_same(result, model, x)


# ------------------------------------------------------------------------------------------------ left whole


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda i, layer, x: plain(i, layer, F.dropout(x, 0.5)), "random"),
        (lambda i, layer, x: plain(i, layer, x) + torch.rand_like(x), "random"),
        (lambda i, layer, x: plain(i, layer, x) + torch.empty(3, WIDTH).normal_(), "random"),
        (
            lambda i, layer, x: F.scaled_dot_product_attention(*[plain(i, layer, x)[None, None]] * 3, dropout_p=0.5)[
                0, 0
            ],
            "random",
        ),
    ],
    ids=["dropout", "rand_like", "normal_", "attention with dropout"],
)
def test_left_whole(step, reason):
    result = seen(Layers(step), noise(3, WIDTH))
    assert result.plan is None
    assert reason in result.reason


def test_autocast_inside():
    def step(i, layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(i, layer, x)

    result = seen(Layers(step), noise(3, WIDTH))
    assert result.plan is None
    assert "mode of what follows" in result.reason


def test_gradients():
    result = seen(Layers(plain), noise(3, WIDTH), grad=True)
    assert result.plan is None
    assert "gradients" in result.reason
    result.out[0].sum().backward()


# ------------------------------------------------------------------------------------------------ symbolic sizes


def test_a_size_for_all_layers():
    model, x = Layers(lambda i, layer, x: plain(i, layer, x.view(x.shape[0], 2, -1).flatten(1))), noise(3, WIDTH)
    result = seen(model, x, dynamic=True)
    assert result.plan.repeats >= 4  # the first layer's sizes are spelled otherwise
    assert_same(result, model, x)


def test_a_size_for_each_layer():
    """Caches that grow: each has a length with a name of its own."""

    def grow(i, layer, x, caches):
        grown = torch.cat([caches[i], x])
        return plain(i, layer, grown.mean(0, keepdim=True) + grown.shape[0] * x)

    model = Layers(grow)
    grown = [noise(3, WIDTH, seed=i) for i in range(6)]
    for cache in grown:
        torch._dynamo.mark_dynamic(cache, 0)
    x = noise(1, WIDTH)
    with (
        torch._dynamo.config.patch(assume_static_by_default=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        result = seen(model, x, grown)
    assert result.plan.repeats == 5
    part = result.plan.parts[result.plan.steps[2].part]
    assert len(part.renamings) == 5
    assert all(renaming and all(left != right for left, right in renaming.items()) for renaming in part.renamings)
    assert_same(result, model, x, grown)
