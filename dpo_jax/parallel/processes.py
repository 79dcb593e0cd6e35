"""What a command sets up before it touches a device: libraries, and the processes that run it
together.
"""

import contextlib
import importlib.util
import os
import pathlib
import pickle
import re
import secrets
import socket
import sys
import traceback
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from dpo_jax import command_line

CACHE = pathlib.Path(
    "~/.cache/dpo_jax/compiled"
).expanduser()  # JAX_COMPILATION_CACHE_DIR overrides it
SILENCE = (
    60  # seconds after which a process that gives no sign of life has ended, and so do the others
)


def start() -> None:
    """Compiled programs are kept between runs; float32 means float32 on every backend; libraries
    are quiet.
    """
    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    # GPUs and TPUs would round float32 products to fewer bits; bfloat16 products stay what they
    # are.
    jax.config.update("jax_default_matmul_precision", "float32")


def keep_compiled_programs() -> None:
    """Keep compiled programs between runs, in CACHE unless jax has been told where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))


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
    from absl import flags

    coordinator = flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0. Not on TPU pods and under Slurm, where the processes find each "
        "other.",
    )
    count = flags.DEFINE_integer(
        "num_processes", None, "How many processes there are.", lower_bound=1
    )
    number = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", lower_bound=0)
    start()

    def run_together():
        join(coordinator.value, count.value, number.value)
        with together(), _memory_errors():
            command()

    command_line.run(run_together, description, config=config)


@contextlib.contextmanager
def _memory_errors():
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


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several, by what is given, or as a TPU pod or Slurm says; else it
    stays alone.

    ValueError where only some are given.
    """
    given = dict(
        coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
    )
    some = [value is not None for value in given.values()]
    if any(some) and not all(some):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together: give all three, or none."
        )
    if all(some) or _on_slurm() or _on_tpu():
        jax.distributed.initialize(
            **given,
            local_device_ids=_gpus_of_a_lone_task(),
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )


def _on_slurm() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _on_tpu() -> bool:
    """Whether this is a TPU's host, where jax asks for the other ones."""
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    found = any(pathlib.Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return wanted and found and importlib.util.find_spec("libtpu") is not None


def _gpus_of_a_lone_task() -> list[int] | None:
    """All GPUs of the host, for the one Slurm task there, to which jax would give the first alone;
    else None.
    """
    if not _on_slurm() or int(os.environ["SLURM_STEP_NUM_TASKS"]) != int(
        os.environ.get("SLURM_STEP_NUM_NODES", 0)
    ):
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = (
        given.split(",")
        if given
        else [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    )
    return list(range(len(found))) or None


@contextlib.contextmanager
def together():
    """End all processes when one fails: the others would wait for it for ever.

    Alone, a process raises its own errors.
    """
    try:
        yield
    except SystemExit:
        if jax.process_count() > 1:
            # All of them stop here, and none leaves before the others are through.
            jax.distributed.shutdown()
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = command_line.report(error)
        who = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
        print(f"{who} stops, and so do the others.", file=sys.stderr, flush=True)
        # sys.exit would wait for the others, which wait for this one.
        os._exit(status)


def wait_for_all(name: str) -> None:
    """Waits until every process is here: what process 0 wrote before, all can read after."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_first(function: Callable):
    """What function() gives on process 0, which alone calls it, or the error that it raises there,
    on every process.
    """
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    found = pickle.dumps(_outcome(function)) if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(found))))
    sent = np.frombuffer(found.ljust(size), np.uint8)
    result, error = pickle.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
    if error:
        raise error
    return result


def _outcome(function: Callable) -> tuple:
    """Return (result, None), or (None, error)."""
    try:
        return function(), None
    except Exception as error:  # whatever it is, every process raises it
        # The traceback does not travel, and a bug's is needed.
        if not command_line.is_for_people(error):
            traceback.print_exc()
        return None, error


def check_shared(folder: str | pathlib.Path) -> None:
    """RuntimeError where the processes do not see the same folder; ValueError for a bucket."""
    if "://" in str(folder):
        raise ValueError(
            f"{folder} is a bucket, which cannot be written to as a folder yet: mount it (by gcsfuse, "
            "say) and give the folder where it is."
        )
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    token = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    mark = pathlib.Path(folder) / f".seen-{token}"
    if jax.process_index() == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    wait_for_all("shared folder")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise RuntimeError(
            f"{folder} is not the same folder on all hosts: process {int(np.argmin(seen))} does not see "
            "what process 0 writes there. It must be on storage that all of them share."
        )
