"""Commands that use devices, run by one process or by several together.

`command_line.py` has what they share with commands that use none, and imports no jax.
"""

import contextlib
from collections.abc import Callable

import jax
from absl import flags

from dpo_jax import command_line
from dpo_jax.parallel import agreement, processes


def run(
    command: Callable[[], None],
    description: str,
    *,
    config: command_line.ConfigFlags | None = None,
) -> None:
    """Run a command, alone or as one of several processes that run it together; end the program.

    The arguments are command_line.run's. The command's own flags are defined by now, and parsed
    when it is called.
    """
    coordinator = flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0. Not on TPU pods and under Slurm, where the processes find each "
        "other.",
    )
    count = flags.DEFINE_integer(
        "num_processes", None, "How many processes there are.", lower_bound=1, upper_bound=1_000_000
    )
    number = flags.DEFINE_integer(
        "process_id", None, "Which one this is, from 0.", lower_bound=0, upper_bound=1_000_000
    )
    processes.start()

    def run_together():
        with processes.together(command_line.report), explain_full_memory():
            processes.join(coordinator.value, count.value, number.value)
            agreement.check_same(command_line.shared_flags, agreement.SAME_COMMAND)
            agreement.say_own_caches()
            command()

    command_line.run(run_together, description, config=config)


@contextlib.contextmanager
def explain_full_memory():
    """Say what to do when an accelerator's memory is full, instead of jax's own words alone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # The status code that XLA puts first is all that tells this error from others.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        first_line = str(error).splitlines()[0]
        raise MemoryError(
            f"the device's memory is full ({first_line}). In training, set "
            "config.STAGE.microbatch_size below its batch_size, or config.model.remat=full, or "
            "split the weights over more devices by config.mesh.fsdp; `dpo-jax plan` tells in "
            "advance what fits. In sampling and scoring, lower the batch_size."
        ) from error
