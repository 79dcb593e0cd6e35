"""Flags with which XLA compiles tests' programs quickly. Imports no jax, which reads them once."""

import importlib.metadata

# Less work for the compiler, whose time is most of the tests'.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# XLA ends a process whose flags it does not know, and other versions may not know these.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"
    # One module per program: splitting a small one among threads costs more than it saves.
    QUICK_COMPILES += " --xla_cpu_parallel_codegen_split_count=1"
