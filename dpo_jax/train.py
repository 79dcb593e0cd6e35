"""Train: dpo-jax train --config=NAME [--config.FIELD=VALUE ...] [--workdir=WORKDIR]

Runs the stages of a config in order, each in its own folder under WORKDIR. The same command
continues an interrupted run where it stopped, and does nothing once everything is done.

With --push=OWNER/NAME it then uploads the result, the last policy's hf/, to the hub.
"""

import functools

from absl import flags

from dpo_jax import command_line, config_checks, config_files, device_command
from dpo_jax.console import say
from dpo_jax.parallel import processes
from dpo_jax.pipeline import push
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.run_name import name_run
from dpo_jax.storage import shadow


def main():
    config = command_line.define_config()
    workdir = command_line.define_workdir()
    repository = flags.DEFINE_string(
        "push", "", "OWNER/NAME on the hub that the last policy's hf/ is uploaded to at the end."
    )

    def train():
        run_config = config.load()
        folder = workdir.value or config.default_workdir()
        config_checks.validate(run_config)  # a name is made of stages that are known to be right
        name_run(run_config, base=config_files.load(config.choice))
        if repository.value:
            push.check(repository.value, run_config)
        say(f"WORKDIR is {folder}")
        run_stages(run_config, folder)
        if repository.value:
            here = shadow.place(folder)
            upload = functools.partial(push.push, repository.value, here, run_config)
            processes.at_the_end(upload)

    device_command.run(train, __doc__, config=config)


if __name__ == "__main__":
    main()
