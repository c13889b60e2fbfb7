"""The ops that the passes put into a graph, and what each of them lowers to.

Kernels know nothing of FX, of PEFT or of the bank: they take tensors.
"""

# Python started in the repository's root finds this folder as `kernels` too, the name of a package that transformers
# looks for by importing it. Then nothing may happen here: importing lorafx would come back to transformers half-way.
if __name__ == "lorafx.kernels":
    from lorafx.kernels import ops  # noqa: F401  (defines lorafx::site, branch, fused_lora and routed_lora)
