"""What a person at the terminal sees: lines, and the progress of long work."""

import contextlib
import contextvars
import sys
import time

import jax
from tqdm import tqdm

_QUIET = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet(is_quiet: bool = True):
    """Say nothing within, unless `is_quiet` is False: for calls from Python, not from a command."""
    token = _QUIET.set(is_quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def say(text: str = "") -> None:
    """A line for the person at the terminal, from process 0 only."""
    if jax.process_index() == 0 and not _QUIET.get():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A bar with rate, time left and a few metrics; plain lines, at most one each `seconds`, off a
    terminal.
    """

    def __init__(
        self, name: str, start: int, total: int, *, unit: str = "step", seconds: float = 10.0
    ):
        self._name, self._total, self._seconds = name, total, seconds
        self._first, self._began, self._last = start, time.monotonic(), 0.0
        self._bar = None
        if jax.process_index() == 0 and sys.stderr.isatty() and not _QUIET.get():
            self._bar = tqdm(total=total, initial=start, desc=name, unit=unit, dynamic_ncols=True)

    def update(self, step: int, values: dict[str, float], *, always: bool = False) -> None:
        """Shows a step's metrics; `always` prints a line however recent the last one is."""
        text = summary(values)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if always or step == self._total or now - self._last > self._seconds:
            self._last = now
            say(f"{self._name} {step}/{self._total}  {text}  {self._time_left(step, now)}")

    def close(self):
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int, now: float) -> str:
        if step <= self._first:
            return ""
        seconds = (now - self._began) / (step - self._first) * (self._total - step)
        return f"{tqdm.format_interval(seconds)} left"


# What the progress line shows, in order: metric -> label
_SHOWN = {
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
    """loss 0.6712  accuracy 0.61  margin 0.043 ..."""
    return "  ".join(
        f"{label} {values[name]:.4g}" for name, label in _SHOWN.items() if name in values
    )
