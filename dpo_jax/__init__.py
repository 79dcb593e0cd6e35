"""Direct Preference Optimization (Rafailov et al. 2023) in JAX and Flax."""
