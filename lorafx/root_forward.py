"""``model.forward(...)``, which nn.Module knows nothing of: what calls it in place of ``model(...)`` would go past the
compiled call (sentence-transformers does)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from lorafx.sites import RefuseNames

if TYPE_CHECKING:
    from lorafx.runtime import Runtime


class RootForward:
    """Stands for the root's ``forward``: from outside it is the compiled call, inside that the class's own."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.__doc__ = type(runtime.root).forward.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.runtime.root).forward.__get__(self.runtime.root))

    @torch.compiler.disable(recursive=False)  # what Dynamo compiles stays the class's forward, not one frame for all
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root = self.runtime.root
        if self.runtime.is_running():
            return type(root).forward(root, *args, **kwargs)
        return root(*args, **kwargs)


def stand_before(root: nn.Module, runtime: Runtime) -> None:
    """Not where the model has a forward of its own, as accelerate's hooks give it: that is called as it is."""
    if "forward" not in vars(root):
        vars(root)["forward"] = RootForward(runtime)


def shortest_call(root: nn.Module) -> Callable[..., Any]:
    """What runs the root from inside: the class's own forward, unless nn.Module's call does more than that (names
    of adapters are taken out of ours). The way
    through our own ``forward`` costs a fifth of a millisecond."""
    ours = isinstance(vars(root).get("forward"), RootForward)
    pre_hooks = [hook for hook in root._forward_pre_hooks.values() if not isinstance(hook, RefuseNames)]
    hooked = pre_hooks or root._forward_hooks or root._backward_hooks or root._backward_pre_hooks
    if not ours or hooked or _has_any_global_hook():
        return root._call_impl
    return type(root).forward.__get__(root)


def step_aside(root: nn.Module) -> None:
    """What others have put around us meanwhile stays, and goes through to the class's own."""
    if isinstance(vars(root).get("forward"), RootForward):
        del vars(root)["forward"]
