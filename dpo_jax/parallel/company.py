"""The processes that run a command together, from their meeting to their end: if one ends, all do.

Alone, a process would wait in the next sum over all devices for one that is no longer there: for
good, or until jax aborts it after a minute. So the connections of the meeting are kept. On them a
process that fails, or that is told to stop, says so to the others before it ends; the system closes
them for one that is killed; and one that is silent is frozen, or its host is lost. Process 0 is
connected with every other one, and passes on what it hears.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

from dpo_jax.parallel.meeting import Member, send

# Exit status of a process whose partner was killed or cannot be reached: EX_TEMPFAIL, as the same
# command may go through later (command_line.TRY_AGAIN).
LOST = 75
# Seconds between the signs of life of a process, and how long one may be silent before it is lost:
# the others are told well before jax would abort them (processes.SILENCE).
ALIVE_EVERY = 10
SILENT = 40
GOODBYE = 2  # seconds in which the others take what a process says at its end


class Company:
    """The other processes, seen from one of them."""

    def __init__(self, me: Member, connections: dict[int, tuple[Member, socket.socket]]):
        """Watch the connections, by the number of the process at the other end."""
        self._me = me
        self._members = {number: member for number, (member, _) in connections.items()}
        self._connections = {number: connection for number, (_, connection) in connections.items()}
        self._heard = dict.fromkeys(connections, b"")  # less than a line
        self._heard_at = dict.fromkeys(connections, time.monotonic())
        self._left: set[int] = set()  # those that have ended as they should
        self._took_leave: set[int] = set()  # those that know that this one ends as it should
        self._is_leaving = False
        self._another_ends = threading.Event()
        self._lock = threading.RLock()  # threads may speak at once, and a signal's handler
        self._selector = selectors.DefaultSelector()
        for number, connection in self._connections.items():
            connection.settimeout(None)
            self._selector.register(connection, selectors.EVENT_READ, number)
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self, text: str, status: int) -> None:
        """Tell the others that this process ends, and that they must: what to say, and the status.

        Does nothing once this process has left.
        """
        if self._is_leaving:
            return
        self._is_leaving = True
        self._tell(dict(stop=text, status=status))
        if self._me.number == 0:
            # jax's own service ends with this process, and aborts who has not ended by then.
            self._wait_until(lambda: not self._connections)

    def leave(self) -> None:
        """Tell the others that this process has done its work, and may end before they do."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self._tell(dict(done=True))
        # A sign of life that reaches a closed connection resets it, and the reset may overtake
        # these words: the other would take this process for killed.
        self._wait_until(lambda: self._took_leave.issuperset(list(self._connections)))

    def has_left(self) -> bool:
        """Return whether this process has told the others how it ends."""
        return self._is_leaving

    def name_here(self) -> str:
        """Return this process as an error names it."""
        return f"process {self._me.number} of {self._me.count} on {self._me.host}"

    def await_end_of_another(self, seconds: float) -> None:
        """Return after some seconds, unless another process ends: this one then ends with it."""
        if self._another_ends.wait(seconds):
            threading.Event().wait()  # the other thread ends the process

    def _wait_until(self, is_over: Callable[[], bool]) -> None:
        """Give the others time to take what was said, but no more than GOODBYE."""
        deadline = time.monotonic() + GOODBYE
        while not is_over() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _tell(self, message: dict, but: int | None = None) -> None:
        with self._lock:
            for number, connection in list(self._connections.items()):
                if number != but:
                    send(connection, message)

    def _watch(self) -> None:
        next_sign = time.monotonic()
        while self._selector.get_map():
            # Taken before the selection: where this process itself was frozen meanwhile, what the
            # others have sent is read before their silence is measured.
            now = time.monotonic()
            if now >= next_sign:
                next_sign = now + ALIVE_EVERY
                self._tell(dict(alive=True))
            for key, _ in self._selector.select(next_sign - now):
                self._read(key.data, key.fileobj)
            self._lose_silent(now)

    def _read(self, number: int, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(65_536)
        self._heard_at[number] = time.monotonic()
        *lines, self._heard[number] = (self._heard[number] + data).split(b"\n")
        for line in lines:
            self._hear(number, json.loads(line))
        if not data:
            self._lose(number)

    def _hear(self, number: int, message: dict) -> None:
        if "done" in message:
            self._left.add(number)
            with self._lock:
                send(self._connections[number], dict(took_leave=True))
        elif "took_leave" in message:
            self._took_leave.add(number)
        elif "stop" in message and not self._is_leaving:
            self._end(message["stop"], message["status"], number)

    def _lose_silent(self, now: float) -> None:
        for number in list(self._connections):
            if now - self._heard_at[number] > SILENT:
                self._lose(number, is_silent=True)

    def _lose(self, number: int, is_silent: bool = False) -> None:
        connection = self._connections.pop(number)
        self._selector.unregister(connection)
        connection.close()
        if number not in self._left and not self._is_leaving:
            count, host = self._me.count, self._members[number].host
            text = (
                f"error: process {number} of {count} on {host} was killed, or its host is lost, so "
                "all processes end here."
            )
            if is_silent:
                text = (
                    f"error: process {number} of {count} on {host} has been silent for {SILENT} "
                    "seconds (frozen, or its host is lost), so all processes end here."
                )
            text += " See the log of that host. The same command resumes the run."
            self._end(text, LOST, number)

    def _end(self, text: str, status: int, number: int) -> None:
        """End this process with the words of another one, or about it."""
        self._is_leaving = True
        self._another_ends.set()
        self._tell(dict(stop=text, status=status), but=number)
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
        # The main thread may be waiting for the other process, in a library.
        os._exit(status)
