"""Set up jax before it touches a device, and the processes that run a command together."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax._src.clusters import ClusterEnv  # public only within jax.distributed.initialize

from dpo_jax import stopping
from dpo_jax.parallel import meeting
from dpo_jax.parallel.company import Company
from dpo_jax.storage.addresses import address_of, is_address

# Where compiled programs are kept; JAX_COMPILATION_CACHE_DIR overrides it.
CACHE = "~/.cache/dpo_jax/compiled"
# Seconds without a sign of life after which a process counts as dead, and the others end too.
SILENCE = 60
# Seconds in which the end of a process is known to the others.
AFTERMATH = 2
# Threads of XLA's CPU backend, by its variable NPROC; its default is one for each core. Between
# several processes each sum blocks a thread, and all sums of a program may be waiting at once: with
# too few threads two processes wait in different ones, for good.
CPU_THREADS = 64


class _State:
    """What this process has to do with others."""

    company: Company | None = None  # None: it is alone
    notifier = None  # jax's handler of SIGTERM


def start() -> None:
    """Set up the libraries: quiet, compiled programs kept, float32 products in float32."""
    logging.set_verbosity(logging.WARNING)
    keep_compiled_programs()
    # GPUs and TPUs would round float32 products to fewer bits. bfloat16 products are not affected.
    jax.config.update("jax_default_matmul_precision", "float32")


def keep_compiled_programs() -> None:
    """Keep compiled programs between runs, in CACHE unless jax has been told where.

    Where the folder cannot be written, it is said once, and they are not kept.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") == "":
        return  # the user wants none kept
    # A user's own choice comes first, by variable or in code.
    folder = jax.config.jax_compilation_cache_dir or os.path.expanduser(CACHE)
    if is_address(folder):
        # XLA cannot write to a bucket: its own cache for GPUs, which would be beside jax's, ends
        # the first compilation.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    problem = _problem_of(folder)
    if problem:
        _say_not_kept(folder, problem)
        folder = None
    jax.config.update("jax_compilation_cache_dir", folder)


@functools.cache
def _say_not_kept(folder: str, problem: str) -> None:
    # Not through the console, which asks jax for the process: too early, before they have joined.
    print(
        f"warning: compiled programs are not kept, as {folder} cannot be written ({problem}). Name "
        "another folder in JAX_COMPILATION_CACHE_DIR, or each run compiles anew.",
        file=sys.stderr,
        flush=True,
    )


def _problem_of(folder: str) -> str:
    """Return why a folder cannot be written to; "" if it can. It is made if it is not there."""
    if folder.startswith("~"):
        return "there is no home folder"
    if is_address(folder):
        return _problem_of_bucket(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        # Not os.access, which takes a read-only disk for writable where the user is root.
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _problem_of_bucket(folder: str) -> str:
    """Return why a bucket cannot be written to; "" if it can."""
    from dpo_jax.storage import buckets

    # jax's own client may be the first that asks for the bucket.
    buckets.prepare_clients()
    probe = f"{folder}/.probe-{secrets.token_hex(4)}"
    try:
        buckets.write(probe, b"")
        buckets.remove(probe)
        return ""
    except (OSError, ImportError, ValueError) as error:
        return str(error)


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Make this process one of several: as given, or as a TPU pod or Slurm says.

    Call it within `together`. Without any of these the process stays alone. Raises ValueError where
    only some arguments are given, and what `meeting.meet` raises where the others do not come, or
    run other code.
    """
    some = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(some) and not all(some):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together: give all three, or none."
        )
    if all(some):
        meeting.split(coordinator)
        if process_id >= num_processes:
            raise ValueError(
                f"--process_id={process_id}: expected a number from 0 to --num_processes - 1 = "
                f"{num_processes - 1}."
            )
    elif not (_on_slurm() or _on_tpu()):
        return
    # On Slurm and TPU pods jax finds what is None here.
    address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        num_processes,
        process_id,
        _gpus_of_a_lone_task(),
        cluster_detection_method=None,
        initialization_timeout=meeting.PATIENCE,
    )
    if None not in (address, count, number):
        me = meeting.Member(number, count, socket.gethostname(), code())
        connections = meeting.meet(address, me)
        if connections:
            _State.company = Company(me, connections)
            stopping.tell(_State.company.stop)
    os.environ.setdefault("NPROC", str(max(CPU_THREADS, os.cpu_count() or 1)))
    jax.distributed.initialize(
        address,
        count,
        number,
        local_device_ids=devices,
        # All have met: one that is not there now has died.
        initialization_timeout=SILENCE,
        heartbeat_timeout_seconds=SILENCE,
        shutdown_timeout_seconds=SILENCE,
    )
    _keep_notifier()


def _keep_notifier() -> None:
    """Handle signals ourselves, where jax has put a handler that only takes a note of SIGTERM.

    Nobody would read that note but the training loop, which has it written by `give_notice`.
    """
    system = ctypes.CDLL(None)
    system.signal.restype = ctypes.c_void_p
    handler = system.signal(signal.SIGTERM, int(signal.SIG_IGN))
    if handler:
        _State.notifier = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    stopping.end_by_exception()


def give_notice() -> None:
    """Let all processes know that this one is to stop; `asked_to_stop` tells each of them when."""
    if _State.notifier is not None:
        _State.notifier(signal.SIGTERM)


# How often the processes have asked each other whether to stop, in all stages together: they agree
# on one of these numbers to stop at, and it must be one that none of them has passed.
_ASKED = itertools.count(1)


def asked_to_stop(caught: int | None) -> int | None:
    """Return the signal to stop by, in every process at the same call: each calls it equally often.

    caught: the signal that has come to this process.
    """
    from jax.experimental import multihost_utils

    if not multihost_utils.reached_preemption_sync_point(next(_ASKED)):
        return None
    # It came to some of them only, and all end with its status.
    signums = multihost_utils.process_allgather(np.int32(caught or 0))
    # None has caught one where jax itself was told that the machine is to be taken.
    return int(signums.max()) or signal.SIGTERM


def code() -> dict[str, str]:
    """Return the versions of the code that all processes must share, by name."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\n" + path.read_bytes())
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return found | {"dpo_jax of sha256": digest.hexdigest()[:16]}


def _on_slurm() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _on_tpu() -> bool:
    """Return whether this is a TPU's host, where jax itself finds the other hosts."""
    # All three: a host may have the library without chips, or chips that it is told not to use.
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    found = any(pathlib.Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return wanted and found and importlib.util.find_spec("libtpu") is not None


def _gpus_of_a_lone_task() -> list[int] | None:
    """Return all GPUs of the host for the one Slurm task there; None where there are more tasks.

    jax would give such a task the first GPU alone.
    """
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 0))
    # With several tasks on a host each takes the GPU of its own number, which is jax's default.
    if not _on_slurm() or int(os.environ["SLURM_STEP_NUM_TASKS"]) != nodes:
        return None
    # Ids count within the visible GPUs, so only their number matters.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        gpus = visible.split(",")
    else:
        gpus = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return list(range(len(gpus))) or None


@contextlib.contextmanager
def together(report: Callable[[BaseException], tuple[str, int]]):
    """End all processes if one raises: the others would wait for it forever.

    They join within. report: prints an error, and returns what it printed and the exit status. A
    process without others raises its own errors.
    """
    try:
        yield
        _leave()
    except SystemExit:
        if _has_others():
            # All of them stop here, and none leaves before the others are through.
            _leave()
            jax.distributed.shutdown()
        raise
    except BaseException as error:
        if not _has_others():
            raise
        company = _State.company
        is_interrupt = isinstance(error, KeyboardInterrupt)
        if company and not is_interrupt:
            # What fails here may only follow from the end of another, whose words say more.
            company.await_end_of_another(AFTERMATH)
        text, status = report(error)
        if not is_interrupt:
            ending = f"{_name_here()} stops, and so do the others."
            text += f"\n{ending}"
            print(ending, file=sys.stderr, flush=True)
        if company:
            company.stop(text, status)
        # sys.exit would wait for the others, which wait for this one.
        os._exit(status)


def _has_others() -> bool:
    """Return whether other processes wait for this one: from their meeting until all let go."""
    is_connected = jax.distributed.is_initialized()
    if _State.company is None:
        return is_connected and jax.process_count() > 1
    # Not by jax's count, which would have it look for devices before it is connected.
    return is_connected or not _State.company.has_left()


def _name_here() -> str:
    """Return this process as an error names it."""
    if _State.company:
        return _State.company.name_here()
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def _leave() -> None:
    """Let the others know that this process may end now."""
    if _State.company:
        _State.company.leave()


def wait_for_all(name: str) -> None:
    """Wait until every process is here: what process 0 wrote before, all can read after."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def at_the_end(function: Callable[[], None]) -> None:
    """Call a function on process 0 when all work is done; the others need not wait for it.

    It may take longer than a process may be silent, as an upload does.
    """
    if jax.process_count() > 1:
        # All let go of each other here, so that the others can end.
        _leave()
        jax.distributed.shutdown()
        # jax has taken its handler of SIGTERM away, and with it ours.
        stopping.end_by_exception()
    if jax.process_index() == 0:
        function()


def from_first(function: Callable):
    """Return on every process what function() returns on process 0, which alone calls it.

    The result is a numpy array, or what JSON holds. An error is raised on every process.
    """
    if jax.process_count() == 1:
        return function()
    header = {}
    result = None
    error = None
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as raised:  # whatever it is, every process raises it
            error = raised
        header = _header(result, error)
    # Not pickle: JSON holds only data, whoever sends it.
    header = json.loads(_broadcast(json.dumps(header).encode()))
    if error is not None:
        raise error  # with its own traceback, which does not travel
    if "error" in header:
        raise _error(**header["error"])
    if "array" in header:
        stored = result.tobytes() if jax.process_index() == 0 else b""
        array = np.frombuffer(_broadcast(stored), header["array"]["dtype"])
        # frombuffer gives a read-only view.
        return array.reshape(header["array"]["shape"]).copy()
    return header["value"]


def _header(result, error: Exception | None) -> dict:
    """Return what other processes need to make the result, but for an array's bytes."""
    if error is not None:
        kind = type(error)
        return dict(error=dict(module=kind.__module__, name=kind.__name__, message=str(error)))
    if isinstance(result, np.ndarray):
        return dict(array=dict(dtype=result.dtype.str, shape=result.shape))
    return dict(value=result)


def _error(module: str, name: str, message: str) -> Exception:
    """Return another process's error; a RuntimeError where its type cannot be made from a text."""
    kind = getattr(sys.modules.get(module), name, RuntimeError)
    try:
        return kind(message)
    except TypeError:
        return RuntimeError(f"{name}: {message}")


def _broadcast(data: bytes) -> bytes:
    """Return process 0's bytes on every process."""
    from jax.experimental import multihost_utils

    # All processes must pass arrays of the same shape, so the length goes first. Those of the
    # others do not matter.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = np.frombuffer(data.ljust(size), np.uint8)
    return multihost_utils.broadcast_one_to_all(sent).tobytes()


def gathered(data: bytes) -> list[bytes]:
    """Return the bytes of every process, by its number, on every process."""
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    # At least one byte, as an array without any cannot be sent.
    sent = np.frombuffer(data.ljust(max(int(sizes.max()), 1)), np.uint8)
    rows = multihost_utils.process_allgather(sent)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def check_shared(folder: str | pathlib.Path) -> None:
    """Check that all processes see the same folder.

    A copy of a bucket's is each host's own. Raises RuntimeError where they do not.
    """
    if jax.process_count() == 1 or address_of(folder):
        return
    if jax.process_index() == 0:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    seen = who_sees(folder)
    if not seen.all():
        blind = int(np.argmin(seen))
        raise RuntimeError(
            f"{folder} is not the same folder on all hosts: process {blind} does not see what "
            "process 0 writes there. It must be on storage that all of them share."
        )


def who_sees(folder: str | pathlib.Path | None) -> np.ndarray:
    """Return for each process whether it sees in its folder what process 0 writes to its own.

    None: this process, which is not process 0, has no folder.
    """
    from jax.experimental import multihost_utils

    # A name that no earlier run has left there.
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    mark = pathlib.Path(folder or "") / f".seen-{token}"
    if jax.process_index() == 0:
        mark.touch()
    wait_for_all("shared folder")
    is_seen = bool(folder) and mark.exists()
    seen = multihost_utils.process_allgather(np.array(is_seen))
    if jax.process_index() == 0:
        mark.unlink()
    return seen
