"""Output for a person at the terminal: lines, and the progress of long work."""

import contextlib
import contextvars
import functools
import math
import sys
import threading
import time
import warnings

import jax
from tqdm import tqdm

from dpo_jax import surroundings
from dpo_jax.storage.addresses import shown

_QUIET = contextvars.ContextVar("quiet", default=False)

# What jax tells its listeners: a program is lowered, so that XLA begins to compile it, and XLA is
# done. Both come from the thread that asked for the program.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
LONG_COMPILE = 3.0  # seconds that XLA is at work before a terminal shows it
LOGGED_COMPILE = 10.0  # seconds; a program that compiles faster leaves no line behind


@contextlib.contextmanager
def quiet(is_quiet: bool = True):
    """Say nothing within, unless `is_quiet` is False: for calls from Python, not from a command."""
    token = _QUIET.set(is_quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def say(text: str = "") -> None:
    """Print a line for the person at the terminal, from process 0 only."""
    if jax.process_index() == 0 and not _QUIET.get():
        try:
            # Through tqdm, which keeps a bar below the lines.
            tqdm.write(shown(text), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            # Its reader has gone, as in `| head`, or its disk is full: the work goes on.
            surroundings.drop_output(sys.stdout)


@functools.cache
def say_once(text: str) -> None:
    """Print a line as `say` does, once in a process."""
    say(text)


def warn(text: str) -> None:
    """Print a warning; where nothing is to be said, issue it as a Python warning."""
    if _QUIET.get():
        # The place that is shown is the caller's own line, the first outside of this package.
        frame, level = sys._getframe(1), 2
        while frame.f_back and frame.f_globals.get("__name__", "").startswith("dpo_jax."):
            frame, level = frame.f_back, level + 1
        warnings.warn(text, stacklevel=level)
    else:
        say(f"warning: {text}")


@contextlib.contextmanager
def _without_terminal(stream):
    """Go on where a terminal that is written to within has been closed."""
    try:
        yield
    except OSError:
        surroundings.drop_output(stream)


class Progress:
    """Progress of long work: a bar on a terminal, a line now and then elsewhere.

    Both show the time left and a few metrics.
    """

    def __init__(
        self, name: str, start: int, total: int, *, unit: str = "step", seconds: float = 10.0
    ):
        """Begin at `start` of `total`; off a terminal, print a line every `seconds` at most."""
        self._name = name
        self._start = start
        self._total = total
        self._seconds = seconds
        self._began = time.monotonic()
        self._last_line = -math.inf  # a machine's clock may have begun a moment ago
        self._bar = None
        if jax.process_index() == 0 and sys.stderr.isatty() and not _QUIET.get():
            self._bar = tqdm(total=total, initial=start, desc=name, unit=unit, dynamic_ncols=True)

    def update(self, step: int, values: dict[str, float], *, always: bool = False) -> None:
        """Show that `step` is done, with its metrics.

        always: print a line however recent the last one is.
        """
        text = summary(values)
        if self._bar is not None:
            with _without_terminal(sys.stderr):
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if always or step == self._total or now - self._last_line > self._seconds:
            self._last_line = now
            say(f"{self._name} {step}/{self._total}  {text}  {self._time_left(step, now)}")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            with _without_terminal(sys.stderr):
                self._bar.close()

    def _time_left(self, step: int, now: float) -> str:
        if step <= self._start:
            return ""
        seconds_per_step = (now - self._began) / (step - self._start)
        seconds = seconds_per_step * (self._total - step)
        return f"{tqdm.format_interval(seconds)} left"


@contextlib.contextmanager
def compile_times(name: str):
    """Show how long XLA has been compiling within: "dpo: compiling: 12 s".

    On a terminal a line of its own counts the seconds, below the others, and goes away at the end.
    Everywhere a line then says how long the program took: "dpo: compiling train_step took 17 s".
    A program that takes less than LONG_COMPILE is not shown; one of less than LOGGED_COMPILE leaves
    no line.
    """
    if jax.process_index() or _QUIET.get():
        yield
        return
    watch = CompileWatch(name)
    stop = threading.Event()

    def tick_until_stopped():
        while not stop.wait(1.0):
            watch.tick()

    # The compiler holds up the thread that asked for the program, so another one counts.
    ticking = threading.Thread(target=tick_until_stopped, daemon=True)
    jax.monitoring.register_event_duration_secs_listener(watch.hear)
    if sys.stderr.isatty():
        ticking.start()
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(watch.hear)
        stop.set()
        if ticking.ident is not None:
            ticking.join()
        watch.close()


class CompileWatch:
    """The time that XLA takes to compile the programs of one thread, the one that makes this."""

    def __init__(self, name: str):
        self._name = name
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # the thread that ticks reads what the other one writes
        self._began: float | None = None  # when XLA began; None: it is not at work
        self._line: tqdm | None = None

    def hear(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        """Take one of jax's events; they come from every thread that compiles.

        fun_name: the program's, as jax gives it: "jit(train_step)".
        """
        if threading.get_ident() != self._thread:
            return
        if event == LOWERED:
            with self._lock:
                self._began = time.monotonic()
        elif event == COMPILED:
            self.close()
            if seconds >= LOGGED_COMPILE:
                program = _function_of(fun_name)
                say(f"{self._name}: compiling {program} took {seconds:.0f} s")

    def tick(self) -> None:
        """Show the seconds since XLA began, if it is at work for long."""
        with self._lock:
            if self._began is None:
                return
            seconds = time.monotonic() - self._began
            if seconds < LONG_COMPILE:
                return
            if self._line is None:
                # A bar without a bar: tqdm keeps it below other bars and what `say` prints.
                self._line = tqdm(bar_format="{desc}", leave=False)
            self._line.set_description_str(f"{self._name}: compiling: {seconds:.0f} s")

    def close(self) -> None:
        """Take the line away: nothing is compiled any more, or it failed."""
        with self._lock:
            self._began = None
            if self._line is not None:
                self._line.close()
                self._line = None


def _function_of(fun_name: str) -> str:
    """Return the function that a program is of: "jit(_train_step)" -> "train_step"."""
    inner = fun_name.rpartition("(")[2].removesuffix(")").removeprefix("jit_").strip("_")
    return inner or "a program"


# What the progress line shows, in order: metric -> label. training/metric_names.py says what they
# mean.
SHOWN = {
    "loss/train": "loss",
    "loss/eval": "eval loss",
    "nll_per_token/train": "nll/token",
    "nll_per_token/eval": "eval nll/token",
    "rewards_train/accuracies": "accuracy",
    "rewards_train/margins": "margin",
    "rewards_eval/accuracies": "eval accuracy",
    "rewards_eval/margins": "eval margin",
    "ppo_train/reward": "reward",
    "ppo_train/kl": "KL",
    "frontier/reward": "eval reward",
    "frontier/kl": "eval KL",
    "examples_per_second": "rows/s",
    "model_flops_utilization": "MFU",
}


def summary(values: dict[str, float]) -> str:
    """Return the metrics that are shown: "loss 0.6712  accuracy 0.61  margin 0.043"."""
    parts = []
    for name, label in SHOWN.items():
        if name in values:
            parts.append(f"{label} {values[name]:.4g}")
    return "  ".join(parts)
