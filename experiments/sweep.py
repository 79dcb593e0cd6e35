"""Tell who starts the sweep here that it is a command of the package now: dpo-jax sweep."""

import sys

if __name__ == "__main__":
    sys.stderr.write(
        "error: the sweep is a command of the package now: start python -m dpo_jax.sweep, or "
        "dpo-jax sweep, with the same flags.\n"
    )
    sys.exit(2)
