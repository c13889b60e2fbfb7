"""The ops that the passes put into a graph, and what each of them lowers to.

Kernels know nothing of FX, of PEFT or of the bank: they take tensors.
"""

from lorafx.kernels import ops  # noqa: F401  (defines lorafx::site, lorafx::fused_lora, lorafx::routed_lora)
