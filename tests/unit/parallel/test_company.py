"""How processes that work together end: each a real one, which imports no jax."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from dpo_jax import command_line
from dpo_jax.parallel.company import GOODBYE, Company
from dpo_jax.parallel.meeting import Member
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import free_port

MEMBER = """
import os, signal, sys, time
from dpo_jax import stopping
from dpo_jax.parallel import company, meeting

address, number, who, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
stopping.end_by_exception()
if how == "freeze":
    company.ALIVE_EVERY, company.SILENT = 0.2, 2
me = meeting.Member(number, 3, f"host-{number}", {})
others = company.Company(me, meeting.meet(address, me))
stopping.tell(others.stop)
if how == "work":
    time.sleep(0.3 * number)  # they end one after another
elif number == who:
    time.sleep(0.2)
    if how == "fail":
        others.stop("error: row 3 of FILE", 2)
        os._exit(2)
    if how == "blocked":  # in a library, where no exception gets through
        stopping._stop = lambda *_: None
        stopping.end_by_exception()
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
else:
    others.await_end_of_another(60)
others.leave()
"""


def ends_of(who: int, how: str) -> list[tuple[int, str]]:
    """Exit status and stderr of three processes, once one of them has ended in some way."""
    address = f"localhost:{free_port()}"
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, address, str(number), str(who), how],
            cwd=ROOT,
            text=True,
            stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]
    # One that is frozen would not end.
    awaited = [member for member in members if how != "freeze" or member is not members[who]]
    said = {member: member.communicate(timeout=50)[1] for member in awaited}
    for member in set(members) - set(awaited):
        member.kill()
        said[member] = member.communicate()[1]
    return [(member.returncode, said[member]) for member in members]


def test_those_that_did_their_work_end_one_after_another():
    assert ends_of(0, "work") == [(0, "")] * 3


def test_who_leaves_waits_until_the_others_know():
    here, there = socket.socketpair()
    me, other = (Member(number, 2, f"host-{number}", {}) for number in range(2))
    left = Company(me, {1: (other, here)})
    leaving = threading.Thread(target=left.leave)
    leaving.start()
    with there, there.makefile() as heard:
        said = [json.loads(heard.readline()) for _ in range(2)]
        assert dict(done=True) in said
        leaving.join(0.2)
        assert leaving.is_alive()
        there.sendall(b'{"took_leave": true}\n')
        leaving.join(GOODBYE / 2)
        assert not leaving.is_alive()


@pytest.mark.parametrize("who", [0, 2])
def test_one_that_fails_ends_all_with_its_words(who):
    ends = ends_of(who, "fail")
    assert ends.pop(who) == (2, "")  # the command itself has said it
    assert ends == [(2, "error: row 3 of FILE\n")] * 2


@pytest.mark.parametrize("who", [0, 2])
def test_one_that_is_killed_ends_all_by_its_host(who):
    began = time.monotonic()
    ends = ends_of(who, "kill")
    assert time.monotonic() - began < 20
    assert ends.pop(who) == (-9, "")
    for status, said in ends:
        assert status == command_line.TRY_AGAIN
        assert said.startswith(f"error: process {who} of 3 on host-{who} was killed, or its host ")
        assert said.count("\n") == 1


@pytest.mark.parametrize("who", [0, 2])
def test_one_that_freezes_is_named_to_all_others(who):
    began = time.monotonic()
    ends = ends_of(who, "freeze")
    assert time.monotonic() - began < 20
    assert ends.pop(who) == (-9, "")  # the test itself has killed it
    for status, said in ends:
        assert status == command_line.TRY_AGAIN
        assert f"process {who} of 3 on host-{who} has been silent for 2 seconds (frozen, or" in said
        assert said.count("\n") == 1


def test_a_signal_that_ends_one_ends_all_with_its_status():
    assert ends_of(1, "blocked") == [(143, "stopped by SIGTERM\n")] * 3
