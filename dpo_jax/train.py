"""Train: dpo-jax train --config=NAME [--config.FIELD=VALUE ...] [--workdir=WORKDIR]

Runs the stages of a config in order, each in its own folder under WORKDIR. The same command
continues an interrupted run where it stopped, and does nothing once everything is done.

A stage that was started with other values is refused, with the fields that differ. With
--allow_change=FIELD, such as lr, it goes on with the new value from its last checkpoint; that is
said, and written to the stage's config.json.

In the end WORKDIR/report.html shows what the run did: see `dpo-jax report`.

With --push=OWNER/NAME it then uploads the result, the last policy's hf/, to the hub.

With --rehearse it makes a step of each training stage on random weights of the real size, says how
much memory and time that takes, and leaves nothing.
"""

import functools

from absl import flags

from dpo_jax import changes, command_line, config_checks, config_files, device_command, report
from dpo_jax.console import say
from dpo_jax.parallel import processes
from dpo_jax.pipeline import push
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.planning import rehearsal
from dpo_jax.run_name import name_run
from dpo_jax.storage import shadow


def main():
    config = command_line.define_config()
    workdir = command_line.define_workdir()
    repository = flags.DEFINE_string(
        "push", "", "OWNER/NAME on the hub that the last policy's hf/ is uploaded to at the end."
    )
    allow_change = flags.DEFINE_string(
        "allow_change",
        "",
        "Fields that a run which is resumed may change, with commas between them: lr, or "
        "dpo.lr,dpo.beta.",
    )
    rehearsed = flags.DEFINE_boolean(
        "rehearse",
        False,
        "Only make a step of each training stage, on random weights and made-up examples of the "
        "longest lengths, and say what it takes. Reads no weights and no data, and writes nothing.",
    )

    def train():
        if rehearsed.value:
            _check_alone(push=repository.value, allow_change=allow_change.value)
        run_config = config.load()
        folder = workdir.value or config.default_workdir()
        config_checks.validate(run_config)  # a name is made of stages that are known to be right
        allowed = changes.allowed_fields(allow_change.value, run_config)
        is_named = bool(run_config.run)
        name_run(run_config, base=config_files.load(config.choice), unnamed=allowed)
        if rehearsed.value:
            rehearsal.rehearse_all(run_config)
            return
        if repository.value:
            push.check(repository.value, run_config)
        say(f"WORKDIR is {folder}")
        with report.at_end(folder):
            run_stages(run_config, folder, allowed=allowed, is_named=is_named)
        if repository.value:
            here = shadow.place(folder)
            upload = functools.partial(push.push, repository.value, here, run_config)
            processes.at_the_end(upload)

    device_command.run(train, __doc__, config=config)


def _check_alone(**others: str) -> None:
    """Raise ValueError where --rehearse is given with flags that it has no use for."""
    given = [f"--{name}={value}" for name, value in others.items() if value]
    if given:
        raise ValueError(
            f"--rehearse and {' and '.join(given)}: a rehearsal leaves nothing to upload, and "
            "resumes no run. Leave out --rehearse, or the other."
        )


if __name__ == "__main__":
    main()
