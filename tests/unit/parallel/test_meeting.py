"""How processes meet before they work together, each in a thread."""

import concurrent.futures
import dataclasses
import json
import signal
import socket
import threading
import time

import pytest

from dpo_jax import stopping
from dpo_jax.parallel import meeting, processes
from tests.helpers.tiny_runs import free_port

FACTS = {"jax": "1.0"}


@pytest.fixture
def address():
    return f"localhost:{free_port()}"


def member(number, count=3, **changes):
    return dataclasses.replace(meeting.Member(number, count, f"host-{number}", FACTS), **changes)


def errors_of(address, *members, patience=20.0, delay=0.0):
    """How the meeting ends for each member: its error, or None."""

    def attend(me):
        time.sleep(delay * (me.number == 0))
        for _, connection in meeting.meet(address, me, patience).values():
            connection.close()

    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        attending = [pool.submit(attend, me) for me in members]
        return [future.exception() for future in attending]


def come_and_go(address, me):
    """A process that comes, and is killed before all have met."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(meeting.split(address)) as connection:
                connection.sendall(json.dumps(dataclasses.asdict(me)).encode() + b"\n")
                connection.recv(100)
                return
        except ConnectionRefusedError:
            time.sleep(0.05)


@pytest.mark.parametrize("delay", [0.0, 1.0])  # of process 0
def test_all_go_on_once_the_last_has_come(address, delay):
    assert errors_of(address, *map(member, range(3)), delay=delay) == [None] * 3
    # The address is free for jax.
    socket.create_server(meeting.split(address)).close()


def test_who_does_not_come_is_named_to_all_that_are_there(address, capfd):
    first, second = errors_of(address, member(0, 4), member(2, 4), patience=2.0)
    assert isinstance(first, TimeoutError) and isinstance(second, TimeoutError)
    for error in (first, second):
        assert f"processes 1, 3 did not come to {address} within 2 seconds" in str(error)
        assert "2 of 4 are here" in str(error)
    assert f"waiting for processes 1, 3 at {address}" in capfd.readouterr().err


def test_who_has_gone_again_is_named_with_its_host(address, capfd):
    killed = threading.Thread(target=come_and_go, args=(address, member(1, 4)))
    killed.start()
    first, second = errors_of(address, member(0, 4), member(2, 4), patience=2.0)
    killed.join()
    for error in (first, second):
        assert "processes 1 (was on host-1, and has gone), 3 did not come" in str(error)
    assert "process 1 on host-1 has gone again" in capfd.readouterr().err


def test_who_has_gone_may_come_again(address):
    killed = threading.Thread(target=come_and_go, args=(address, member(1)))
    killed.start()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        host = pool.submit(meeting.meet, address, member(0, 3), 20.0)
        killed.join()
        assert errors_of(address, member(1), member(2)) == [None, None]
        assert host.result().keys() == {1, 2}


@pytest.mark.parametrize(
    "error, said",
    [
        (stopping.Stopped(signal.SIGTERM), "process 0 was stopped by SIGTERM while it waited"),
        (stopping.Stopped(signal.SIGINT), "process 0 was interrupted while it waited"),
        (OSError("too many open files"), "process 0 failed while it waited for others (too many "),
    ],
)
def test_the_end_of_process_0_is_no_mistake_of_the_others(address, monkeypatch, error, said):
    def end(*_):
        raise error

    # As a signal would, once process 1 has come.
    monkeypatch.setattr(meeting._Host, "_who_did_not_come", end)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        attending = pool.submit(meeting.meet, address, member(1), 20.0)
        with pytest.raises(type(error)):
            meeting.meet(address, member(0), 1.0)
        its = attending.exception()
    assert isinstance(its, TimeoutError) and said in str(its)


def test_names_of_hosts_are_told_where_they_are_known(address, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    (error,) = errors_of(address, member(0), patience=0.5)
    assert str(error).startswith("processes 1 (b), 2 (c) did not come")


def test_process_0_that_does_not_come_is_named(address, capfd):
    (error,) = errors_of(address, member(2), patience=1.5)
    assert f"process 2 on host-2 did not find process 0 at {address}" in str(error)
    assert "Connection refused" in str(error)
    assert "process 2 waits for process 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(facts={"jax": "1.1"}), "process 1 on host-1 has jax 1.1, and process 0 on host-0 "),
        (dict(facts={}), "process 1 on host-1 has jax (unknown), and process 0 on host-0 has 1.0"),
        (dict(count=2), "process 1 on host-1 was started as one of 2 processes"),
    ],
)
def test_processes_that_cannot_work_together_are_refused(address, other, said):
    for error in errors_of(address, member(0), member(1, **other)):
        assert isinstance(error, ValueError) and said in str(error)


def test_two_processes_of_one_number_are_refused(address):
    again = member(1, host="host-x")
    found = errors_of(address, member(0), member(1), again)
    for error in found:
        assert "two processes are number 1" in str(error)
        assert "host-1" in str(error) and "host-x" in str(error)


def test_strangers_are_let_go(address):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        host = pool.submit(meeting.meet, address, member(0, 2), 20.0)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\0" * 100_000):
            stranger = None
            while stranger is None:
                try:
                    stranger = socket.create_connection(meeting.split(address), timeout=10)
                except ConnectionRefusedError:
                    time.sleep(0.05)
            with stranger:
                try:
                    stranger.sendall(words)
                    assert stranger.recv(100) == b""
                except ConnectionError:
                    pass
        assert errors_of(address, member(1, 2)) == [None]
        assert host.result().keys() == {1}


def test_a_port_that_is_taken_is_named(address):
    with socket.create_server(meeting.split(address)):
        (error,) = errors_of(address, member(0), patience=1.0)
    assert isinstance(error, OSError) and "process 0 cannot listen at port" in str(error)


@pytest.mark.parametrize("wrong", ["localhost", "localhost:", ":80", "host:port", "host:70000"])
def test_an_address_is_host_and_port(wrong):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        processes.join(wrong, 2, 0)


def test_a_number_is_below_the_count():
    with pytest.raises(ValueError, match="--process_id=2: expected a number from 0 to"):
        processes.join("localhost:80", 2, 2)


def test_a_lone_process_waits_for_nobody():
    assert meeting.meet("nowhere:1", member(0, 1)) == {}


def test_code_is_told_by_versions_and_sources():
    assert processes.code().keys() == {"jax", "jaxlib", "dpo_jax of sha256"}
