"""Rows of an embedding that an adapter has as its own (PEFT's ``trainable_token_indices``).

PEFT writes them into a copy of the whole weight at each call. Here what the model's own module gave is kept, and what
other rows change of it is put in its place: vectors of tokens that are read, or, at an output head with the same
weight, logits. Beside the modules that an adapter has copies of, they are one more (``saved_modules.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from lorafx.adapters import TOKENS
from lorafx.layer_kinds import describe, why_not

ROWS = "trainable_tokens_delta"  # among the tensors of a module, with TOKENS beside it


class TokenRows(nn.Module):
    """tokens: ``[n]``, which rows of the weight; rows: ``[n, width]``, what they are"""

    def __init__(self, tokens: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.rows = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows, requires_grad=False)

    def forward(self, own: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        """What ``own`` with these rows gives for ``x``; without them that is ``y``."""
        tokens, rows = self.tokens.to(y.device), self.rows.to(own.weight)
        if isinstance(own, nn.Linear):  # PEFT's is without the bias
            whole = y if own.bias is None else linear(x, own.weight)
            return whole.index_copy(-1, tokens, linear(x, rows).to(whole.dtype))
        ordered, order = tokens.sort(stable=True)
        at = order[(torch.searchsorted(ordered, x, right=True) - 1).clamp(min=0)]  # of a token named twice, the last
        scale = describe(own, y)[0]
        new = rows[at] if scale is None else rows[at] * scale.to(rows.dtype)
        return torch.where((tokens[at] == x)[..., None], new.to(y.dtype), y)


class PeftsRows(Mapping[str, TokenRows]):
    """Those of PEFT's wrapper, by adapter: its own parameters."""

    def __init__(self, wrapper: TrainableTokensWrapper) -> None:
        self._layer = wrapper.token_adapter

    def __getitem__(self, name: str) -> TokenRows:
        rows = self._layer.trainable_tokens_delta[name]
        return TokenRows(torch.tensor(self._layer.token_indices[name], device=rows.device), rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.trainable_tokens_delta.keys())

    def __len__(self) -> int:
        return len(self._layer.trainable_tokens_delta)

    def __contains__(self, name: object) -> bool:
        return name in self._layer.trainable_tokens_delta


def unsuitable_for_rows(module: nn.Module) -> str | None:
    """Why rows of this module's weight can't be put into what it gives; None if they can."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "another adapter has a copy of the same module"
    weight = module._parameters.get("weight")
    if not isinstance(module, (nn.Linear, nn.Embedding)) or type(weight) is not nn.Parameter:
        return f"a {type(module).__name__} is no plain embedding or linear layer"
    if isinstance(module, nn.Embedding) and (reason := why_not(module)):
        return reason
    plain = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if type(module) is not plain and not hasattr(module, "embed_scale"):
        return f"a {type(module).__name__} may compute other than {plain.__name__}"
    return None


def with_tokens(
    saved: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of modules, by path, with which rows they are where they are rows of the module's weight."""
    return {path: {**each, TOKENS: tokens[path]} if path in tokens else each for path, each in saved.items()}
