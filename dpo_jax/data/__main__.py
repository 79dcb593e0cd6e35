"""python -m dpo_jax.data PATH: the command `dpo-jax data`, from dpo_jax/data_report.py."""

from dpo_jax import data_report

data_report.main()
