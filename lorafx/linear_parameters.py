"""Parameters that a module uses as the weight of one linear layer, as routers of experts do with theirs.

PEFT adapts them as parameters (``target_parameters``; "all-linear" takes routers, too) and adds B A to the weight at
each call. Here the module's own forward runs, and what is in it is found by watching what becomes of the parameter.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CASTS = (
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.contiguous,
)
LEADING = ((2, 3), (6,))  # of the inputs that a forward is tried on: rows and positions, apart and as one

_tried: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


class Watching(TorchFunctionMode):
    """While it is on, ``then(name, y, x)`` takes the place of ``y = linear(x, weight)`` for each of these weights, and
    for their casts. Dynamo traces it, so in a graph there is nothing of it but what ``then`` does.

    weights: by name
    """

    def __init__(self, weights: Mapping[str, Tensor], then: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.known = list(weights.items())
        self.then = then

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in CASTS:
            name = self.name_of(args[0])
            if name is not None:
                self.known.append((name, out))
        elif func is F.linear:
            x, weight = linear_arguments(*args, **kwargs)
            name = self.name_of(weight)
            if name is not None:
                return self.then(name, out, x)
        return out

    def name_of(self, tensor: Tensor) -> str | None:
        for name, known in self.known:
            if tensor is known:
                return name
        return None


class _Judge(TorchFunctionMode):
    """Counts the linear layers with this weight, and what else is computed from it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.known = [weight]
        self.layers = self.others = 0

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        found: list[Tensor] = []
        torch.utils._pytree.tree_map_only(Tensor, found.append, (args, kwargs))
        if not any(self._is_known(tensor) for tensor in found):
            return out
        if func in CASTS:
            if self._is_known(args[0]):  # else x.to(weight), which asks for its dtype
                self.known.append(out)
        elif func is F.linear and not self._is_known(linear_arguments(*args, **kwargs)[0]):
            self.layers += 1
        else:
            results: list[Tensor] = []
            torch.utils._pytree.tree_map_only(Tensor, results.append, out)
            self.others += bool(results)  # shapes and dtypes may be asked for
        return out

    def _is_known(self, tensor: Tensor) -> bool:
        return any(tensor is known for known in self.known)


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x, weight) of a call of ``torch.nn.functional.linear``, by its argument names."""
    return input, weight


def is_linear_weight(module: nn.Module, parameter: str) -> bool:
    """Whether the forward of ``module`` is seen to use this parameter as the weight of one linear layer of its input,
    and for nothing else: it is tried once, on a copy without memory."""
    tried = _tried.setdefault(module, {})
    if parameter not in tried:
        tried[parameter] = _is_seen_to(module, parameter)
    return tried[parameter]


def _is_seen_to(module: nn.Module, parameter: str) -> bool:
    bare = _without_memory(module)
    weight = bare._parameters[parameter]
    widths = {weight.shape[-1] for weight in bare._parameters.values() if weight is not None and weight.dim() == 2}
    seen = []
    for leading, width in itertools.product(LEADING, widths):
        x = torch.empty(*leading, width, dtype=weight.dtype, device="meta")
        judge = _Judge(weight)
        try:
            with torch.no_grad(), judge:
                bare(x)
        except Exception:  # the model's own code may raise anything at inputs that are not its own, or too few
            continue
        seen.append((judge.layers, judge.others))
    return bool(seen) and set(seen) == {(1, 0)}


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy on the meta device without hooks, which shares all that is no tensor."""

    def empty(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        meta = torch.empty_like(tensor, device="meta")
        return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta

    bare = copy.copy(module)
    own = vars(bare)
    for name in ("_parameters", "_buffers"):
        own[name] = {key: empty(tensor) for key, tensor in own[name].items()}
    own["_modules"] = {
        key: child if child is None else _without_memory(child) for key, child in own["_modules"].items()
    }
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        own[name] = OrderedDict()
    own.pop("forward", None)
    return bare
