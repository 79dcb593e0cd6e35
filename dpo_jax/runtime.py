"""What a command sets up before it touches a device."""

import os
import pathlib

import jax
from absl import logging

CACHE = pathlib.Path("~/.cache/dpo_jax/compiled").expanduser()  # JAX_COMPILATION_CACHE_DIR overrides it


def start() -> None:
    """Compiled programs are kept between runs; float32 means float32 on every backend; libraries are quiet."""
    logging.set_verbosity(logging.WARNING)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    # GPUs and TPUs would round float32 products to fewer bits; bfloat16 products stay what they are.
    jax.config.update("jax_default_matmul_precision", "float32")
