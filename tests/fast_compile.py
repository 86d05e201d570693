"""Prints XLA flags for tests, which compile much and compute little: they halve their time.

Without LLVM's optimiser, and without the emitters of fused loops, a program compiles faster; so it
does in one piece, where there is one core a process. Later releases than 0.10 cannot do without
those emitters, and refuse flags that they do not know.
"""

from importlib.metadata import version

flags = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jax").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
print(*flags)
