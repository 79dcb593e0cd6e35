"""One run at a time in a folder of a bucket: an object that its holder writes again and again.

    FOLDER/.lease   {"holder": ..., "beat": ...}

Who finds one waits until it has not changed for LEASE seconds by its own clock, and then takes it.
Best effort: of two that find it expired at once, each looks again after SETTLE seconds, and the one
that wrote first gives way, unless the other one takes longer than that to write. Of two that find
none, buckets with conditional writes let one alone make it. Imports no jax.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from dpo_jax.storage import buckets
from dpo_jax.storage.addresses import address_of

LEASE = 60  # seconds after which a lease that does not change is free
BEAT = 15  # seconds between two renewals
SETTLE = 1  # seconds until a lease that was taken over is looked at again
NAME = ".lease"

_lost: set[str] = set()  # folders of which another run has taken the lease


@contextlib.contextmanager
def held(
    path: pathlib.Path, flags: str, say: Callable[[str], None], *, is_file: bool = False
) -> Iterator[None]:
    """Hold the lease of a folder or a file within; nothing where the path is no copy.

    flags: that name another one. say: tells that it waits. Raises RuntimeError where another run
    holds it.
    """
    folder = address_of(path)
    if not folder:
        yield
        return
    address = f"{folder}{NAME}" if is_file else f"{folder}/{NAME}"
    mine = _Lease(address)
    mine.take(folder, flags, say)
    _lost.discard(folder)
    over = threading.Event()

    def renew():
        while not over.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may go through
                if not mine.renew():
                    _lost.add(folder)
                    return

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if folder not in _lost:
            buckets.remove(address)


def check(address: str) -> None:
    """Raise RuntimeError where another run has the lease of a folder, or of one in or above it."""
    for folder in _lost:
        is_inside = f"{address}/".startswith(f"{folder}/")
        holds_it = f"{folder}/".startswith(f"{address}/")
        if is_inside or holds_it:
            raise RuntimeError(
                f"another run has taken over {folder} while this one could not renew its lease, so "
                "this one stops and writes nothing more there."
            )


class _Lease:
    """The lease of a folder, as this process writes it."""

    def __init__(self, address: str):
        self._address = address
        self._holder = dict(
            host=socket.gethostname(),
            token=secrets.token_hex(8),
            process=os.getpid(),
            machine=_machine(),
            started=_start_of(os.getpid()),
        )
        self._beat = 0

    def take(self, folder: str, flags: str, say: Callable[[str], None]) -> None:
        """Take the lease, after a wait if need be; RuntimeError where it is another run's."""
        while True:
            try:
                self._write(new=True)
                return
            except FileExistsError:
                found = self._read()
            if found is None:
                continue  # its holder has just ended
            if not _is_dead(found["holder"]):
                self._wait(found, folder, flags, say)
            self._write()
            time.sleep(SETTLE)
            now = self._read()
            if now is not None and now["holder"] == self._holder:
                return

    def _wait(self, found: dict, folder: str, flags: str, say: Callable[[str], None]) -> None:
        """Wait until a lease has not changed for LEASE seconds; RuntimeError where it does."""
        host = found["holder"].get("host", "another host")
        say(
            f"{folder} was in use by a run on {host}: waiting up to {LEASE} s to see whether that "
            "run is still alive."
        )
        deadline = time.monotonic() + LEASE
        while time.monotonic() < deadline:
            time.sleep(min(2, max(0, deadline - time.monotonic())))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise RuntimeError(
                    f"another run, on {host}, is at work in {folder}: wait for it, or give another "
                    f"{flags}."
                )

    def renew(self) -> bool:
        """Write the lease again; return False where it is another run's by now."""
        found = self._read()
        if found is not None and found["holder"] != self._holder:
            return False
        self._write()
        return True

    def _read(self) -> dict | None:
        """Return what the lease says, None where there is none."""
        try:
            data = buckets.read(self._address)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(data)
        except ValueError:
            found = {}
        # What a lease does not say, somebody else has written there.
        return {"holder": {}} | (found if isinstance(found, dict) else {})

    def _write(self, *, new: bool = False) -> None:
        self._beat += 1
        record = dict(holder=self._holder, beat=self._beat)
        buckets.write(self._address, json.dumps(record).encode(), new=new)


def _machine() -> str:
    """Return what tells this machine, and this container, from others until it starts anew."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """Return when a process of this machine was started; "" where there is none."""
    try:
        words = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return words[19]
    except (OSError, IndexError):
        return ""


def _is_dead(holder: dict) -> bool:
    """Return whether a holder was a process of this machine, and has ended."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    return _start_of(holder.get("process", 0)) != holder.get("started")
