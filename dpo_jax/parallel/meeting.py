"""The meeting of the processes that run a command together, before jax connects them.

jax aborts a process whose partners do not come, after minutes of silence, and names nobody. Here
process 0 waits for the others at the coordinator's address, says now and then who is missing, and
compares what they say of themselves; then all go on, or all end with the same error. Only lines of
JSON are exchanged: a stranger who connects is let go again.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import time

from dpo_jax import stopping

PATIENCE = 300  # seconds to wait for the last process: hosts of a pod may start minutes apart
FIRST_LINE = 10  # seconds after which it is said who is missing
NEXT_LINES = 30  # seconds between further lines
RETRY = 0.5  # seconds between attempts to reach process 0
ANSWER = 10  # seconds in which process 0 answers a greeting
LONGEST = 65_536  # bytes of a line; strangers may send more
NAMED = 8  # missing processes that a line names


@dataclasses.dataclass(frozen=True)
class Member:
    """What a process says of itself."""

    number: int
    count: int  # how many processes there are, as it was told
    host: str
    facts: dict[str, str]  # what must be the same on all hosts, such as versions


def meet(
    address: str, me: Member, patience: float = PATIENCE
) -> dict[int, tuple[Member, socket.socket]]:
    """Wait until all processes have come to process 0, which listens at an address HOST:PORT.

    Returns what process 0 is connected with, by number: every other process; and each of these:
    process 0. Raises ValueError where two processes cannot work together, and TimeoutError where
    some have not come, which it names, or where process 0 was stopped. The error is raised by all
    that are there.
    """
    if me.count == 1:
        return {}
    if me.number == 0:
        return _Host(address, me, patience).gather()
    return _attend(address, me, patience)


class _Host:
    """Process 0, which waits for the others."""

    def __init__(self, address: str, me: Member, patience: float):
        self._address = address
        self._me = me
        self._patience = patience
        self._came: dict[int, tuple[Member, socket.socket]] = {}
        self._left: dict[int, str] = {}  # number -> the host of a process that came, and went
        self._selector = selectors.DefaultSelector()

    def gather(self) -> dict[int, tuple[Member, socket.socket]]:
        """Return those that have come when all have, and have been told to go on."""
        clock = _Clock(self._patience)
        with self._selector, _listen(self._address) as listener:
            self._selector.register(listener, selectors.EVENT_READ)
            try:
                while True:
                    all_came = len(self._came) == self._me.count - 1
                    events = self._selector.select(0 if all_came else clock.until_next())
                    # One that came may have gone while another came.
                    if all_came and not events:
                        break
                    for key, _ in events:
                        if key.fileobj is listener:
                            self._welcome(listener)
                        else:
                            self._hear(key.fileobj, key.data)
                    if clock.is_over():
                        raise TimeoutError(self._who_did_not_come())
                    if clock.is_time_to_speak():
                        missing = _listed(self._missing())
                        _say(f"waiting for {missing} at {self._address}", clock)
                self._send_to_all(dict(go=True, host=self._me.host))
                return self._came
            except BaseException as error:
                self._send_to_all(_message_of(error))
                for _, connection in self._came.values():
                    connection.close()
                raise

    def _welcome(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        # What it has sent so far is kept with it.
        self._selector.register(connection, selectors.EVENT_READ, bytearray())

    def _hear(self, connection: socket.socket, sent: bytearray) -> None:
        """Take what a connection sends: a member's greeting, its end, or a stranger's words."""
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(4096)
        sent += data
        member = _member_in(sent)
        is_stranger = member is None and (b"\n" in sent or len(sent) > LONGEST)
        if not data or is_stranger:
            self._forget(connection)
        elif member is not None:
            sent.clear()
            self._take(member, connection)

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        for number, (member, its_connection) in list(self._came.items()):
            if its_connection is connection:
                del self._came[number]
                self._left[number] = member.host
                _say(f"process {number} on {member.host} has gone again")

    def _take(self, member: Member, connection: socket.socket) -> None:
        """Note that a process has come; ValueError where it cannot work with those that have."""
        try:
            self._check(member)
        except ValueError as error:
            send(connection, _message_of(error))
            raise
        self._came[member.number] = (member, connection)
        self._left.pop(member.number, None)
        send(connection, dict(welcome=True))

    def _check(self, member: Member) -> None:
        me = self._me
        who = f"process {member.number} on {member.host}"
        if member.count != me.count:
            raise ValueError(
                f"{who} was started as one of {member.count} processes (--num_processes), process "
                f"0 on {me.host} as one of {me.count}. Start all with the same number."
            )
        if member.number in self._came:
            earlier, _ = self._came[member.number]
            raise ValueError(
                f"two processes are number {member.number}: one on {earlier.host}, and one on "
                f"{member.host}. Give each its own --process_id."
            )
        for name, mine in me.facts.items():
            its = member.facts.get(name, "(unknown)")
            if its != mine:
                raise ValueError(
                    f"{who} has {name} {its}, and process 0 on {me.host} has {mine}: results would "
                    "be mixed. Install the same on all hosts, and start all of them again."
                )

    def _missing(self) -> list[str]:
        """Return the processes that are not here, each with its host where that is known."""
        hosts = _hosts_by_number(self._me.count)
        found = []
        for number in range(1, self._me.count):
            if number in self._came:
                continue
            if number in self._left:
                found.append(f"{number} (was on {self._left[number]}, and has gone)")
            elif hosts:
                found.append(f"{number} ({hosts[number]})")
            else:
                found.append(f"{number}")
        return found

    def _who_did_not_come(self) -> str:
        missing = self._missing()
        here = self._me.count - len(missing)
        return (
            f"{_listed(missing)} did not come to {self._address} within {self._patience:.0f} "
            f"seconds, and {here} of {self._me.count} are here. See the log of the missing host: "
            "its command may have failed, not been started, or not reach this address (a "
            "firewall). Then start all of them again."
        )

    def _send_to_all(self, message: dict) -> None:
        for _, connection in self._came.values():
            send(connection, message)


def _attend(address: str, me: Member, patience: float) -> dict[int, tuple[Member, socket.socket]]:
    """Come to process 0, and wait there until it says how it goes on."""
    clock = _Clock(patience)
    problem = "it has not been tried"
    while not clock.is_over():
        if clock.is_time_to_speak():
            _say(f"process {me.number} waits for process 0 at {address} ({problem})", clock)
        connection = None
        try:
            connection = socket.create_connection(split(address), timeout=ANSWER)
            answer = _ask_to_go(connection, me, patience)
        except OSError as error:
            problem = error.strerror or str(error)
            answer = {}
        if "go" in answer:
            host = Member(0, me.count, str(answer.get("host")), me.facts)
            return {0: (host, connection)}
        if connection is not None:
            connection.close()
            if answer:
                problem = "who answers there is not waiting for processes"
        if "error" in answer:
            # All but a mistake may go well the next time, which TimeoutError lets launchers know.
            kind = ValueError if answer.get("kind") == "ValueError" else TimeoutError
            raise kind(str(answer["error"]))
        time.sleep(RETRY)
    raise TimeoutError(
        f"process {me.number} on {me.host} did not find process 0 at {address} within "
        f"{patience:.0f} seconds ({problem}). See the log of that host: its command may have "
        "failed or not been started, and its port must be open to the other hosts. Then start all "
        "of them again."
    )


def _ask_to_go(connection: socket.socket, me: Member, patience: float) -> dict:
    """Return process 0's last word in the meeting."""
    send(connection, dataclasses.asdict(me))
    answer = _read(connection)
    if answer == dict(welcome=True):
        # Process 0 has a clock of its own, and tells when it is over.
        connection.settimeout(patience + ANSWER)
        answer = _read(connection)
    return answer


class _Clock:
    """How long there is left to wait, and when it is time for a line about it."""

    def __init__(self, patience: float):
        self.began = time.monotonic()
        self.patience = patience
        self._next_line = self.began + min(FIRST_LINE, patience / 2)

    def until_next(self) -> float:
        """Return the seconds until there is something to do."""
        next_event = min(self._next_line, self.began + self.patience)
        return max(next_event - time.monotonic(), 0)

    def is_over(self) -> bool:
        """Return whether all of the time has passed."""
        return time.monotonic() >= self.began + self.patience

    def is_time_to_speak(self) -> bool:
        """Return whether a line is due, which is then said."""
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + NEXT_LINES
        return True


def split(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; ValueError where it is none."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(
            f"--coordinator={address}: expected HOST:PORT, the host of process 0 and a free port "
            "there, such as 10.0.0.1:8476."
        )
    return host.strip("[]"), int(port)


def _listen(address: str) -> socket.socket:
    """Return a socket at which process 0 can be reached, on all of its host's addresses."""
    # Where jax will listen next; the variable is jax's own.
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, port = split(bound or address)
    is_dual = socket.has_dualstack_ipv6()
    if not bound:
        host = "::" if is_dual else "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=1024, dualstack_ipv6=is_dual and host == "::"
        )
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at port {port} ({error.strerror}). Another run may still be "
            "at work on this host: wait for its end, or give another port in --coordinator."
        ) from error


def _hosts_by_number(count: int) -> list[str]:
    """Return the hosts of all processes where the surroundings name them, as on GKE; or none."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return hosts if len(hosts) == count else []


def _member_in(sent: bytes) -> Member | None:
    """Return the member whose greeting was sent; None where it is none, or not yet all of it."""
    line, newline, _ = bytes(sent).partition(b"\n")
    if not newline:
        return None
    try:
        return Member(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _message_of(error: BaseException) -> dict:
    """Return what the others are told of an error that ends the meeting."""
    text = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        how = stopping.words(getattr(error, "signum", signal.SIGINT))
        text = f"process 0 was {how} while it waited for others."
    elif not isinstance(error, TimeoutError | ValueError):
        text = f"process 0 failed while it waited for others ({text})."
    return dict(error=text, kind=type(error).__name__)


def send(connection: socket.socket, message: dict) -> None:
    # Who has gone meanwhile is noticed where its answer is read.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict:
    """Return the next message, and nothing after it; a strange one where what is sent is none."""
    line = b""
    # One by one, as what follows is for whoever watches the connection next.
    while not line.endswith(b"\n") and len(line) < LONGEST:
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("it has closed the connection")
        line += byte
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else dict(strange=True)


def _listed(numbers: list[str]) -> str:
    """Return missing processes for a person: "process 1", "processes 1, 3 and 40 more"."""
    shown = ", ".join(numbers[:NAMED])
    if len(numbers) > NAMED:
        shown += f" and {len(numbers) - NAMED} more"
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def _say(text: str, clock: _Clock | None = None) -> None:
    # Not through the console, which asks jax for the process: too early, before they have joined.
    if clock:
        waited = time.monotonic() - clock.began
        text += f": {waited:.0f} s so far, {clock.patience:.0f} s at most"
    print(text, file=sys.stderr, flush=True)
