"""What is shown while XLA compiles."""

import io
import threading

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import console
from tests.helpers.clock import Seconds


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self):
        return True


def compile_something():
    # A new function, so that no earlier program of it is at hand.
    def sine(x):
        return jnp.sin(x) * 3

    jax.jit(sine)(jnp.ones(3))


def test_compiling_ticks_on_a_terminal_and_goes_away(monkeypatch, capsys):
    clock = Seconds(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    watch = console.CompileWatch("dpo")
    watch.tick()
    watch.hear(console.LOWERED, 0.1)
    clock.pass_by(console.LONG_COMPILE - 1)
    watch.tick()
    assert terminal.getvalue() == ""  # too short to be mentioned
    clock.pass_by(10)
    watch.tick()
    clock.pass_by(1)
    watch.tick()
    assert "dpo: compiling: 12 s" in terminal.getvalue()
    assert "dpo: compiling: 13 s" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    watch.hear(console.COMPILED, 13.4, fun_name="jit(train_step)", other="kept")
    assert terminal.getvalue().rpartition("13 s")[2].strip() == ""
    assert capsys.readouterr().out == "dpo: compiling train_step took 13 s\n"
    shown = terminal.getvalue()
    clock.pass_by(60)
    watch.tick()  # nothing is compiled
    assert terminal.getvalue() == shown


@pytest.mark.parametrize(
    ("fun_name", "function"),
    [("jit(_sample)", "sample"), ("jit_eval_step", "eval_step"), ("", "a program")],
)
def test_line_names_the_program_if_it_took_long(capsys, fun_name, function):
    watch = console.CompileWatch("dpo")
    for seconds in (console.LOGGED_COMPILE - 0.1, 17.0):
        watch.hear(console.LOWERED, 0.1)
        watch.hear(console.COMPILED, seconds, fun_name=fun_name)
    assert capsys.readouterr().out == f"dpo: compiling {function} took 17 s\n"


def test_short_programs_and_other_threads_are_not_mentioned(monkeypatch, capsys):
    clock = Seconds(monkeypatch)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    watch = console.CompileWatch("dpo")
    watch.hear(console.LOWERED, 0.1)
    watch.hear(console.COMPILED, console.LONG_COMPILE - 0.1)

    def hear_long():
        watch.hear(console.LOWERED, 0.1)
        watch.hear(console.COMPILED, 100.0)
        watch.hear(console.LOWERED, 0.1)

    other = threading.Thread(target=hear_long)
    other.start()
    other.join()
    clock.pass_by(60)
    watch.tick()
    assert (terminal.getvalue(), capsys.readouterr().out) == ("", "")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_compile_times_hears_of_jax_and_leaves_nothing_behind(monkeypatch, capsys, stream):
    monkeypatch.setattr(console, "LOGGED_COMPILE", 0.0)
    monkeypatch.setattr("sys.stderr", stream())
    threads = threading.active_count()
    with pytest.raises(KeyError), console.compile_times("sft"):
        # Off a terminal there is nothing to count.
        assert threading.active_count() == threads + (stream is Terminal)
        compile_something()
        raise KeyError
    assert threading.active_count() == threads
    assert "sft: compiling sine took 0 s\n" in capsys.readouterr().out
    compile_something()
    assert capsys.readouterr().out == ""


def test_compile_times_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOGGED_COMPILE", 0.0)
    with console.quiet(), console.compile_times("sft"):
        compile_something()
    assert capsys.readouterr().out == ""
