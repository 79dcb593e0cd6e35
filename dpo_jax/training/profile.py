"""A profile of a few steps: what the host and the devices did, for TensorBoard or Perfetto."""

import contextlib
import pathlib

import jax

from dpo_jax.console import say

STEPS = 3  # that are traced


class Profile(contextlib.ExitStack):
    """Traces STEPS steps by jax's profiler into a folder, from one step on.

    A context: on leaving it, a trace that has not ended is ended. Process 0 only, which sees the
    devices of its own host. No step's numbers change, but the traced ones take longer.
    """

    def __init__(self, folder: pathlib.Path, first: int):
        """first: the first step that is traced, counted from 1; 0: none."""
        super().__init__()
        self._folder = pathlib.Path(folder)
        self._first = first if jax.process_index() == 0 else 0

    def check(self, name: str, first_step: int, total: int) -> None:
        """Say where none of the steps that are left, first_step to total, begins the trace."""
        if self._first and not first_step <= self._first <= total:
            say(f"{name}: no profile: log.profile is {self._first}, steps are {first_step}-{total}")

    def before(self, step: int, state) -> None:
        """Begin where this step is the first one that is traced."""
        if step != self._first:
            return
        # The step before may still be under way on the devices.
        jax.block_until_ready(state)
        jax.profiler.start_trace(self._folder)
        self.callback(self._stop)

    def after(self, step: int, state) -> None:
        """End where this step is the last one that is traced."""
        if self._first and step == self._first + STEPS - 1:
            jax.block_until_ready(state)
            self.close()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        say(f"profile from step {self._first} on: tensorboard --logdir={self._folder}")
