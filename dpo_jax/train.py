"""Trains: python -m dpo_jax.train --config=FILE [--config.FIELD=VALUE ...] --workdir=DIR

Runs the stages of the config in order, each in its own folder under WORKDIR. The same command goes
on where an interrupted run stopped, and does nothing where all is done.
"""

from dpo_jax.parallel import processes
from dpo_jax.pipeline.stages import run_stages


def main():
    # Flags are made here, not on import, so that the module can be imported by others.
    from absl import flags
    from ml_collections import config_flags

    config = config_flags.DEFINE_config_file("config", None, "The config file; see configs/.")
    workdir = flags.DEFINE_string("workdir", None, "Where the run's folders are.")
    flags.mark_flags_as_required(["config", "workdir"])
    processes.run(lambda _: run_stages(config.value, workdir.value))


if __name__ == "__main__":
    main()
