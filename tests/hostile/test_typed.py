"""Configs and flags of every type with values that nobody means."""

import math
import signal

import pytest

from dpo_jax import config as configs
from dpo_jax import stopping
from dpo_jax.data import batches
from dpo_jax.models.lora import Lora
from tests.helpers.tiny import tiny_config
from tests.hostile import typed
from tests.hostile.judging import refusal_of


@pytest.mark.parametrize("field", typed.NUMERIC)
def test_numbers_that_are_none_are_refused_by_field(field):
    for text in (*typed.NUMBERS, *typed.HUGE):
        verdict = typed.judge_number(field, text)
        assert verdict.is_right, (text, verdict)


@pytest.mark.parametrize("field", [field for field, _ in typed.FIELDS])
def test_any_text_is_taken_or_refused(field):
    for text in typed.TEXTS:
        refusal_of(lambda text=text: typed.set_field(field, text))


def test_every_number_has_a_range():
    for field, default in typed.FIELDS:
        known = configs.field_of(field)
        numbers = default if isinstance(default, tuple) else (default,)
        if not numbers or type(numbers[0]) not in (int, float):
            continue
        assert math.isfinite(known.least) and math.isfinite(known.most), field
        for number in numbers:
            assert known.least <= number <= known.most, field


@pytest.mark.parametrize("name", typed.CONFIG_FILES)
def test_config_files_are_refused_by_name(name, tmp_path):
    verdict = typed.judge_config_file(name, tmp_path)
    assert verdict.verdict == "refused", verdict


@pytest.mark.parametrize(("command", "arguments", "words"), typed.FLAGS)
def test_what_is_typed_is_refused_with_the_flag_that_was_meant(command, arguments, words):
    verdict = typed.judge_flags(command, arguments, words)
    assert verdict.verdict == "refused", verdict


def test_usual_commands_are_taken():
    for command in typed.COMMANDS:
        if command is not typed.data_report:
            verdict = typed.judge_flags(command, ())
            assert verdict.verdict == "taken", verdict


def test_a_command_leaves_signals_as_they_were():
    handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
    typed.judge_flags(typed.train, ("--seed=1",), "--seed=1")
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
    assert not stopping._State.may_leave  # two seconds after a signal it would end the tests


def test_a_rank_above_the_models_width_is_refused():
    with pytest.raises(ValueError, match="model.lora.rank = 17: expected at most 16, the width"):
        Lora(17).kernels(tiny_config())
    assert Lora(16).kernels(tiny_config())


@pytest.mark.parametrize(
    ("size", "steps", "epochs"), [(12, 10**6, 0.0), (10**7, 10**7, 0.0), (12, 0, 1e6)]
)
def test_steps_beyond_what_could_be_meant_are_refused(size, steps, epochs):
    with pytest.raises(ValueError, match="steps of 64 examples, .* Lower steps"):
        batches.steps_of(size, 64, steps=steps, epochs=epochs)
    assert batches.steps_of(10**6, 64, steps=10**6, epochs=0.0) == 10**6
