"""Prints XLA flags for tests, which compile much and compute little: they halve their time.

Without LLVM's optimiser, and without the emitters of fused loops, a program compiles faster. Later
releases than 0.10 cannot do without those emitters, and refuse flags that they do not know.
"""

from importlib.metadata import version

flags = ["--xla_backend_optimization_level=0"]
if version("jax").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
print(*flags)
