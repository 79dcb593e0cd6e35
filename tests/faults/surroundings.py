"""Surroundings that a machine may have: full disks, no home, closed streams, jumping clocks."""

import contextlib
import functools
import os
import pathlib
import subprocess
from collections.abc import Callable

from tests.faults import jobs, outcomes
from tests.helpers.paths import ROOT

PART = "surroundings"
JOBS = ("dpo", "toy dpo", "sample", "accents")
PIPE_ENDED = 128 + 13  # the shell's status for SIGPIPE
IN_USE_AT_ONCE = 2  # commands started together in one WORKDIR

# Runs before the command: Python imports a module of this name at its start.
NO_LOCKS = """
import errno, fcntl
def flock(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""
NO_PASSWD = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""
JUMPING_CLOCK = """
import time
began, real, real_ns = time.monotonic(), time.time, time.time_ns
def jump():
    return JUMP if time.monotonic() - began > AFTER else 0
time.time = lambda: real() + jump()
time.time_ns = lambda: real_ns() + jump() * 10**9
"""
DAY = 86_400  # seconds


def plan(wholes: dict[str, jobs.Whole], folder: pathlib.Path):
    """Yield (row of the table, function of a try's folder); folder: for mounts and wrong files."""
    dpo, toy, sample = wholes["dpo"], wholes["toy dpo"], wholes["sample"]
    accents = wholes["accents"]

    def row(what: str, whole: jobs.Whole, function: Callable = attempt, **options):
        return what, functools.partial(function, whole, **options)

    home = {"JAX_COMPILATION_CACHE_DIR": None, "HF_HOME": None, "XDG_CACHE_HOME": None}
    mounts = can_mount(folder / "mounted")
    if mounts:
        for share in (0.1, 0.4, 0.8):
            yield row("full disk", dpo, full_disk, share=share)
            yield row("full disk", toy, full_disk, share=share)
        yield row("full disk", sample, full_disk, share=0.3)
    for kilobytes in (1, 8, 16):
        yield row("limit of a file's size", dpo, wrapped=shell(f"ulimit -f {kilobytes}"))
    yield row("limit of a file's size", sample, wrapped=shell("ulimit -f 4"))
    if mounts or os.geteuid() != 0:
        for whole in (dpo, toy, sample):
            yield row("read-only WORKDIR", whole, read_only_workdir)
            yield row("HOME that cannot be written", whole, unwritable_home, variables=home)
    for whole in (dpo, sample):
        yield row("no HOME", whole, variables=home | {"HOME": None})
        yield row("no entry in passwd", whole, site=NO_PASSWD, variables=home | {"HOME": None})
        yield row("no locks (flock)", whole, site=NO_LOCKS)
    for wrong in ("/proc/none/cache", str(ROOT / "pyproject.toml")):
        cache = {"JAX_COMPILATION_CACHE_DIR": wrong}
        yield row("compile cache that cannot be written", dpo, variables=cache)
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        for whole in (dpo, sample):
            yield row("closed stdout or stderr", whole, wrapped=shell(f"exec {closed}"))
    yield row("stdout on a full disk", dpo, wrapped=shell("exec >/dev/full"))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for variables in (plain, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}):
        yield row("ASCII stdout", accents, variables=variables)
    for whole, days in ((dpo, -10), (dpo, 400), (toy, -10), (sample, 400)):
        site = JUMPING_CLOCK.replace("JUMP ", f"{days * DAY} ")
        # In the middle of the run, on a machine as busy as it was for the uninterrupted one.
        site = site.replace("AFTER", f"{whole.seconds / 2:.1f}")
        yield row("clock that jumps", whole, site=site)
    for whole in (dpo, toy, sample):
        yield row("| head", whole, into_head)
        yield row("two runs at once", whole, two_at_once)


def shell(first: str) -> list[str]:
    """Return a shell that does something first, and then becomes the command."""
    return ["bash", "-c", f'{first}; exec "$@"', "bash"]


def attempt(
    whole: jobs.Whole, folder: pathlib.Path, *, site: str = "", **options
) -> tuple[str, str]:
    """Run a job in such surroundings, and again in the usual ones if it refuses them.

    site: a program that Python runs first. options: of jobs.start.
    """
    jobs.prepare(whole.job, folder, whole.cache)
    if site:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(site)
        path = os.pathsep.join([str(folder / "site"), str(ROOT)])
        options["variables"] = options.get("variables", {}) | {"PYTHONPATH": path}
    return judge(whole, folder, jobs.run(whole.job, folder, **options))


def judge(whole: jobs.Whole, folder: pathlib.Path, ended: jobs.Ended) -> tuple[str, str]:
    """Return the outcome of a job; after a refusal it must go on to the same bits."""
    outcome, wrong = outcomes.judge(ended, jobs.result(folder), whole.result)
    if outcome != outcomes.CLEAR:
        return outcome, f"{whole.job.name}: {wrong}"
    after, still_wrong = repeat(whole, folder)
    if after != outcomes.SAME:
        return after, f"{whole.job.name}: after the refusal ({wrong}): {still_wrong}"
    return outcome, f"{whole.job.name}: {wrong}"


def repeat(whole: jobs.Whole, folder: pathlib.Path) -> tuple[str, str]:
    """Run a job again in the usual surroundings, and judge its end."""
    ended = jobs.run(whole.job, folder, log="again")
    return outcomes.judge(ended, jobs.result(folder), whole.result)


def can_mount(folder: pathlib.Path) -> bool:
    """Return whether this user may mount a small disk in memory."""
    folder.mkdir(parents=True)
    with contextlib.suppress(OSError, subprocess.CalledProcessError), small_disk(folder, 64):
        return True
    return False


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int):
    """Mount a disk of so many kilobytes on a folder."""
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    subprocess.run(options, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def full_disk(whole: jobs.Whole, folder: pathlib.Path, *, share: float) -> tuple[str, str]:
    """Run a job on a disk of a share of the space that it needs; then enlarge the disk."""
    jobs.prepare(whole.job, folder, whole.cache)
    kilobytes = max(8, round(whole.kilobytes * share))
    disk = folder / jobs.RUN
    with small_disk(disk, kilobytes):
        ended = jobs.run(whole.job, folder)
        larger = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(larger, check=True, capture_output=True)
        outcome, wrong = judge(whole, folder, ended)
        return outcome, f"{kilobytes} kB, {wrong}"


def read_only_workdir(whole: jobs.Whole, folder: pathlib.Path) -> tuple[str, str]:
    """Run a job whose WORKDIR may be read only; then let it be written."""
    jobs.prepare(whole.job, folder, whole.cache)
    with read_only(folder / jobs.RUN):
        ended = jobs.run(whole.job, folder)
    return judge(whole, folder, ended)


def unwritable_home(whole: jobs.Whole, folder: pathlib.Path, *, variables: dict) -> tuple[str, str]:
    """Run a job whose HOME cannot be written to."""
    jobs.prepare(whole.job, folder, whole.cache)
    home = folder / "home"
    home.mkdir()
    with read_only(home):
        ended = jobs.run(whole.job, folder, variables=variables | {"HOME": str(home)})
    return judge(whole, folder, ended)


@contextlib.contextmanager
def read_only(folder: pathlib.Path):
    """Let nobody write to a folder."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    # Permissions do not hold root back.
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def into_head(whole: jobs.Whole, folder: pathlib.Path) -> tuple[str, str]:
    """Run a job whose reader goes after the first line; then run it again."""
    jobs.prepare(whole.job, folder, whole.cache)
    wrapped = ["bash", "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash"]
    ended = jobs.run(whole.job, folder, wrapped=wrapped)
    quiet = not outcomes.has_traceback(ended.text)
    if ended.statuses == (PIPE_ENDED,) and quiet:
        outcome, wrong = repeat(whole, folder)
        return outcome, f"{whole.job.name}: ended with {PIPE_ENDED}, then again; {wrong}"
    return judge(whole, folder, ended)


def two_at_once(whole: jobs.Whole, folder: pathlib.Path) -> tuple[str, str]:
    """Start a job twice in one WORKDIR: one of them does the work, the other waits or refuses."""
    jobs.prepare(whole.job, folder, whole.cache)
    logs = [f"run{number}" for number in range(IN_USE_AT_ONCE)]
    started = [jobs.start(whole.job, folder, log=log) for log in logs]
    ends = [jobs.wait(processes, folder, log) for processes, log in zip(started, logs, strict=True)]
    found = jobs.result(folder)
    judged = [outcomes.judge(ended, found, whole.result) for ended in ends]
    for outcome, wrong in judged:
        if outcome in outcomes.BAD:
            return outcome, f"{whole.job.name}: {wrong}"
    if all(outcome == outcomes.CLEAR for outcome, _ in judged):
        return judge(whole, folder, ends[0])
    words = next((wrong for outcome, wrong in judged if outcome == outcomes.CLEAR), "both ended")
    return outcomes.SAME, f"{whole.job.name}: {words}"
