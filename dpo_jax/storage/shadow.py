"""Copies on this machine of what buckets hold: pulled before they are read, pushed when changed.

The bucket is what counts: a run that starts makes its copy equal to it, so that it goes on in the
same way on an empty machine. Pushed are whole files, as they are at that moment, in an order that
leaves the bucket right whenever the machine is lost: what records other files (done.json, sums)
comes after them, and was read before them. Imports no jax.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import threading
from collections.abc import Callable, Container, Iterator

from dpo_jax.storage import buckets, lease
from dpo_jax.storage.addresses import (
    address_of,
    is_address,
    local_path,
    normal,
    scheme_of,
    shadow_root,
)
from dpo_jax.whole_file import whole_file

PUSH_EVERY = 30  # seconds between two looks for what has changed, while a command works
AT_ONCE = 8  # files that travel at a time
COMMITTED = "commit_success.txt"  # the last object of a checkpoint in a bucket, as orbax has it
# A file that records others, by the end of its name.
RECORDS = ("done.json", ".sums", ".sha256")
# Of this machine and this attempt alone.
_NOT_PUSHED = (".lock", ".draft", lease.NAME)
_NOT_PUSHED_FOLDERS = ("wandb", "hf.partial", "hf.old", "adapter.partial", "adapter.old")

# What is read of a stage without its folder being locked.
_STAGE_RECORDS = (
    *("config.json", "done.json", "stopped.json", "ledger.json", "weights.json"),
    "cost.json",
    *("metrics.jsonl", "completions.jsonl", "completions.sums", "reference_completions.jsonl"),
)
_EXPORTS = ("hf", "adapter")  # folders of a stage, which have a config.json of their own

# Files that this process has pulled or pushed, and so may remove from the bucket when they go.
_own: set[str] = set()
_pushed: set[pathlib.Path] = set()  # folders that are pushed now and then
_pushing = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Copy:
    """A file here and its object, when they were the same."""

    size: int
    modified: int  # nanoseconds
    version: str  # of the object


def place(path: str | os.PathLike) -> pathlib.Path:
    """Return the path on this machine that stands for a path, which may be an address.

    Who writes there pulls before, and pushes after. Raises ValueError for an address that cannot be
    written to.
    """
    if not is_address(path):
        return pathlib.Path(path)
    address = normal(path)
    if scheme_of(address) == "hf":
        raise ValueError(f"{path}: hf:// can be read alone. Give a folder, gs:// or s3://.")
    return local_path(address)


def is_outside_stages(name: str, names: Container[str]) -> bool:
    """Return whether a file of a WORKDIR is read without its stage's folder being locked.

    So are the records and the metrics of a stage, and what is in no stage's folder. names: all of
    them.
    """
    for parent in pathlib.PurePosixPath(name).parents:
        is_stage = parent.name not in _EXPORTS and f"{parent}/config.json" in names
        if is_stage:
            return name.removeprefix(f"{parent}/") in _STAGE_RECORDS
    return True


def make_folder(path: pathlib.Path) -> None:
    """Make a folder, and see that its bucket can be written, if it is a copy."""
    path.mkdir(parents=True, exist_ok=True)
    if is_copy(path):
        buckets.check(address_of(path))


def checkpoint_folder(path: pathlib.Path):
    """Return where orbax keeps the checkpoints of a folder, an epath.Path: in gs://, or here."""
    from etils import epath

    # epath may be the first here to talk to the bucket.
    buckets.prepare_clients()
    address = address_of(path)
    return epath.Path(address if scheme_of(address) == "gs" else path.absolute())


def is_copy(path: str | os.PathLike) -> bool:
    """Return whether a path is a copy of what a bucket holds, or will hold."""
    return bool(address_of(path))


def is_pushed(path: pathlib.Path) -> bool:
    """Return whether a folder is pushed now and then already."""
    return any(path.is_relative_to(folder) for folder in _pushed)


def fetch(
    path: str | os.PathLike, wanted: Callable[[str, Container[str]], bool] | None = None
) -> pathlib.Path:
    """Return the path of a file or folder to read; what is in a bucket is copied here before.

    wanted: as for `pull`. Raises FileNotFoundError where an address has nothing.
    """
    if not is_address(path):
        return pathlib.Path(path)
    address = normal(path)
    found = buckets.find(address)
    if not found:
        raise FileNotFoundError(f"{address} does not exist: no object is there, nor under it.")
    target = local_path(address)
    pull(target, wanted, found=found)
    return target


def pull(
    path: pathlib.Path,
    wanted: Callable[[str, Container[str]], bool] | None = None,
    *,
    names: list[str] | None = None,
    exactly: bool = False,
    found: dict[str, buckets.Stored] | None = None,
) -> None:
    """Copy what a bucket holds in a folder, or as a file; nothing where the path is no copy.

    wanted: (name within the folder, all names) -> whether it is copied. names: the only ones that
    are looked for. exactly: remove what the bucket does not hold, and replace what another process
    is at work on; for who has the lease. found: `buckets.find` of the folder, where it is known.
    """
    address = address_of(path)
    if not address:
        return
    if names is not None:
        found = {name: buckets.stored(_join(address, name)) for name in names}
        found = {name: stored for name, stored in found.items() if stored is not None}
    elif found is None:
        found = buckets.find(address)
    chosen = _whole(address, found)
    if wanted is not None:
        chosen = [name for name in chosen if wanted(name, found)]
    if not exactly:
        chosen = _not_in_use(path, chosen)
    with _locked():
        known = _read_known()
        stale = []
        for name in chosen:
            copy = known.get(_join(address, name))
            if copy is None or _state(_inside(path, name), found[name].version) != copy:
                stale.append(name)
        if exactly:
            _remove_others(path, chosen, names)
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            get = functools.partial(_download, address, path)
            list(pool.map(get, stale))
        states = {name: _state(_inside(path, name), found[name].version) for name in chosen}
        _keep({_join(address, name): state for name, state in states.items()})
    _own.update(_join(address, name) for name in chosen)


def push(path: pathlib.Path, names: list[str] | None = None) -> None:
    """Make a bucket hold what has changed in a folder, or a file, since it was pulled or pushed.

    names: the only files that are pushed, in this order but for records, which come last. Raises
    OSError where the bucket refuses. Nothing where the path is no copy.
    """
    address = address_of(path)
    if not address:
        return
    lease.check(address)
    with _pushing:
        here = [name for name in _names(path) if names is None or name in names]
        if names is not None:
            here.sort(key=names.index)
        # Read first: what they record was complete then, and is read after them.
        records = {}
        states = {}
        for name in filter(_records, here):
            states[name] = _state(_inside(path, name))
            records[name] = _content(_inside(path, name))
        for name in here:
            if not _records(name):
                states[name] = _state(_inside(path, name))
        known = _read_known()
        changed = []
        for name, state in states.items():
            copy = known.get(_join(address, name))
            if state is not None and (copy is None or not _same_file(state, copy)):
                changed.append(name)
        others = [name for name in changed if not _records(name)]
        changed_records = [name for name in changed if records.get(name) is not None]
        if names is None:
            _push_gone(address, states)
            _withdraw(address, others, changed_records)
        _upload_all(address, path, others, states, at_once=AT_ONCE if names is None else 1)
        for name in changed_records:
            target = _join(address, name)
            buckets.write(target, records[name])
            _note({target: _with_version(target, states[name])})
        if scheme_of(address) == "s3" and names is None:
            _push_checkpoints(address, path)


@contextlib.contextmanager
def pushed(
    path: pathlib.Path, say: Callable[[str], None], names: list[str] | None = None
) -> Iterator[None]:
    """Push a folder now and then within, and all of it in the end; say: tells of a failure.

    names: as for `push`. For one process. Nothing where the path is no copy.
    """
    if not is_copy(path):
        yield
        return
    over = threading.Event()

    def work():
        while not over.wait(PUSH_EVERY):
            try:
                push(path, names)
            except (OSError, RuntimeError) as error:
                say(f"{error} It is tried again in {PUSH_EVERY} s.")

    thread = threading.Thread(target=work, name="push", daemon=True)
    thread.start()
    _pushed.add(path)
    try:
        yield
    finally:
        _pushed.discard(path)
        over.set()
        thread.join()
        push(path, names)


def checkpoint_steps(path: pathlib.Path) -> list[int] | None:
    """Return the steps of the complete checkpoints that a bucket holds for a folder.

    None where they are in the folder itself, or have been pulled there.
    """
    address = address_of(path)
    is_direct = scheme_of(address) == "gs"
    if not address or not is_direct and any(item.name.isdigit() for item in path.glob("*")):
        return None
    steps = set()
    for name in buckets.find(address):
        step, _, rest = name.partition("/")
        if step.isdigit() and rest == COMMITTED:
            steps.add(int(step))
    return sorted(steps)


def remove_partial_checkpoints(path: pathlib.Path) -> None:
    """Remove the parts of checkpoints that a lost run has left in a folder of gs://.

    Before any process lists the folder: orbax would remove them while others do, and a folder in a
    bucket is gone with its last object. Elsewhere they have names of their own.
    """
    address = address_of(path)
    if scheme_of(address) != "gs":
        return
    found = buckets.find(address)
    partial = []
    for name in found:
        step = name.partition("/")[0]
        if step.isdigit() and f"{step}/{COMMITTED}" not in found:
            partial.append(f"{address}/{name}")
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(buckets.remove, partial))


def _whole(address: str, found: dict[str, buckets.Stored]) -> list[str]:
    """Return the names that are copied: of checkpoints, complete ones that orbax reads here."""
    names = []
    for name in found:
        if _is_private(name):
            continue
        before, is_checkpoint, inside = name.rpartition("checkpoints/")
        if not is_checkpoint:
            names.append(name)
            continue
        step = inside.partition("/")[0]
        is_committed = f"{before}checkpoints/{step}/{COMMITTED}" in found
        # The object that marks it is no file of the folder.
        is_marker = name.endswith(f"/{COMMITTED}")
        if scheme_of(address) != "gs" and is_committed and not is_marker:
            names.append(name)
    return names


def _not_in_use(path: pathlib.Path, names: list[str]) -> list[str]:
    """Return names without those in folders that a process of this machine is at work in."""
    in_use = {
        folder
        for folder in {name.rpartition("/")[0] for name in names}
        if _is_locked(path / folder)
    }
    return [name for name in names if name.rpartition("/")[0] not in in_use]


def _is_locked(folder: pathlib.Path) -> bool:
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        return False
    return False


def _names(path: pathlib.Path) -> list[str]:
    """Return the names of the files in a folder that are pushed one by one."""
    names = []
    for parent, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name not in ("checkpoints", *_NOT_PUSHED_FOLDERS)]
        inside = pathlib.Path(parent).relative_to(path)
        names += [(inside / name).as_posix() for name in files if not _is_private(name)]
    return names


def _is_private(name: str) -> bool:
    return name.endswith(_NOT_PUSHED) or any(
        part in _NOT_PUSHED_FOLDERS for part in pathlib.PurePosixPath(name).parts
    )


def _records(name: str) -> bool:
    return name.endswith(RECORDS)


def _content(file: pathlib.Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _state(file: pathlib.Path, version: str = "") -> Copy | None:
    """Return a file's state, None where there is none."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Copy(found.st_size, found.st_mtime_ns, version)


def _same_file(state: Copy, copy: Copy) -> bool:
    return (state.size, state.modified) == (copy.size, copy.modified)


def _push_gone(address: str, states: dict[str, Copy | None]) -> None:
    """Remove objects whose files were here, and have gone."""
    inside = f"{address}/"
    for target in sorted(_own):
        is_gone = states.get(target.removeprefix(inside)) is None
        if target.startswith(inside) and "/checkpoints/" not in target and is_gone:
            buckets.remove(target)
            _own.discard(target)


def _withdraw(address: str, others: list[str], records: list[str]) -> None:
    """Remove done.json of stages of which more will change, until it is written again."""
    for name in records:
        stage, _, file = name.rpartition("/")
        if file == "done.json" and any(other.startswith(f"{stage}/") for other in others):
            buckets.remove(_join(address, name))


def _upload_all(
    address: str,
    path: pathlib.Path,
    names: list[str],
    states: dict[str, Copy],
    *,
    at_once: int = AT_ONCE,
) -> None:
    uploaded = {}

    def upload(name: str) -> None:
        target = _join(address, name)
        # A file may go while others are read, such as a checkpoint's.
        with contextlib.suppress(FileNotFoundError):
            buckets.upload(_inside(path, name), target)
            uploaded[target] = _with_version(target, states[name])

    try:
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            list(pool.map(upload, names))
    finally:
        # Where one fails, the others are there all the same.
        _note(uploaded)


def _push_checkpoints(address: str, path: pathlib.Path) -> None:
    """Push complete checkpoints, each with its marker last, and remove those that have gone."""
    for parent, folders, _ in os.walk(path):
        if pathlib.Path(parent).name == "checkpoints":
            here = pathlib.Path(parent)
            _push_steps(_join(address, here.relative_to(path).as_posix()), here)
            folders.clear()


def _push_steps(address: str, here: pathlib.Path) -> None:
    """Make the checkpoints of one folder in the bucket those that are here."""
    there = buckets.find(address)
    known = _read_known()
    steps = {name.partition("/")[0] for name in there}
    steps |= {item.name for item in here.iterdir() if item.name.isdigit()}
    for step in sorted(steps):
        marker = f"{step}/{COMMITTED}"
        objects = [name for name in there if name.startswith(f"{step}/") and name != marker]
        files = [file for file in (here / step).rglob("*") if file.is_file()]
        states = {file.relative_to(here).as_posix(): _state(file) for file in files}
        copies = {name: known.get(_join(address, name)) for name in states}
        is_same = all(
            state and copies[name] and _same_file(state, copies[name])
            for name, state in states.items()
        )
        if states and is_same and marker in there:
            continue
        # What another run left is not this one's to remove, unless it is half of a checkpoint.
        is_own = any(_join(address, name) in _own for name in objects)
        if not states and marker in there and not is_own:
            continue
        # Without its marker a checkpoint counts for nothing: it goes first, and comes last.
        buckets.remove(_join(address, marker))
        for name in objects:
            if name not in states:
                buckets.remove(_join(address, name))
        _upload_all(address, here, list(states), states)
        # Orbax may have removed it meanwhile.
        if states and (here / step).is_dir():
            buckets.write(_join(address, marker), b"")


def _download(address: str, path: pathlib.Path, name: str) -> None:
    file = _inside(path, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as draft:
        buckets.download(_join(address, name), draft)


def _remove_others(path: pathlib.Path, kept: list[str], names: list[str] | None) -> None:
    """Remove files that the bucket does not hold: another machine went on without them.

    names: the only ones that are looked at.
    """
    if names is not None:
        for name in set(names) - set(kept):
            (path / name).unlink(missing_ok=True)
        return
    for parent, _, files in os.walk(path, topdown=False):
        inside = pathlib.Path(parent).relative_to(path)
        for file in files:
            name = (inside / file).as_posix()
            if name not in kept and not _is_private(name):
                (path / name).unlink()
        if pathlib.Path(parent) != path and not os.listdir(parent):
            os.rmdir(parent)


def _join(address: str, name: str) -> str:
    return f"{address}/{name}" if name else address


def _inside(path: pathlib.Path, name: str) -> pathlib.Path:
    return path / name if name else path


# What is known of copies is kept beside them, for the next command.


def _known_file() -> pathlib.Path:
    return shadow_root() / "copies.json"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Keep other processes of this machine from pulling at the same time."""
    root = shadow_root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_known() -> dict[str, Copy]:
    try:
        stored = json.loads(_known_file().read_bytes())
        return {address: Copy(*values) for address, values in stored.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}  # then all is copied again


def _keep(copies: dict[str, Copy | None]) -> None:
    """Add what is known of copies; the lock is held."""
    known = _read_known() | copies
    stored = {
        address: dataclasses.astuple(copy) for address, copy in known.items() if copy is not None
    }
    with whole_file(_known_file()) as draft:
        draft.write_text(json.dumps(stored))


def _with_version(target: str, state: Copy) -> Copy:
    """Return a file's state with the version of the object that has just been made of it."""
    found = buckets.stored(target)
    return dataclasses.replace(state, version=found.version if found else "")


def _note(copies: dict[str, Copy]) -> None:
    """Write down that objects hold what files held, by address; only `push` does, one at a time."""
    _own.update(copies)
    with _locked():
        _keep(copies)
