"""A tiny model and tiny preference data on disk, and runs on them."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax import command_line, sample, score, stage_table
from dpo_jax import config as configs
from dpo_jax.models import export, hf, transformer
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import versions
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.training import metrics
from dpo_jax.training.loop import Interrupted
from dpo_jax.training.metric_names import TIMINGS
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import finish_stage, start_stage
from experiments import commands
from tests.helpers.paths import ROOT, python_path
from tests.helpers.tiny import tiny_config
from tests.helpers.tiny_models import random_params

PROMPT_SETTINGS = dict(
    max_prompt_length=64, truncate="keep_end", columns="", template={}, ignore=()
)
MAKE_MESH = sharding.make_mesh
SCRATCH = dict(
    model_type="llama",
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=64,
)
WORDS = ["<s>", "</s>", "?", *(f"w{i}" for i in range(37))]


def tokenizer():
    """Return a tokenizer of forty words, which puts BOS at the start of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?"
    )


def tiny_hf_config():
    """Return the Hugging Face config of a two-layer Llama of 40 words."""
    return hf.make_config(
        dict(
            model_type="llama",
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def write_model(
    folder, scale: float = 4, *, chat_template: str = "", dtype: str = "float32"
) -> pathlib.Path:
    """Write a random two-layer Llama of 40 words in Hugging Face format; return its folder.

    Its weights are `scale` times as large as those of an initialisation, so that its log-probs are
    far from uniform. chat_template: of its tokenizer, which else has none. dtype: of the stored
    weights.
    """
    hf_config = tiny_hf_config()
    config = tiny_config()
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * scale, transformer.init(config, key)))(
        jax.random.key(0)
    )
    words = tokenizer()
    if chat_template:
        words.chat_template = chat_template
    hf.save(folder, config, hf_config, params, words, options=export.Options(dtype))
    return pathlib.Path(folder)


def write_pairs(path, count=60, seed=0) -> pathlib.Path:
    """Write pairs whose chosen side has the higher word numbers: something to learn."""
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(f"w{i}" for i in rng.integers(low, high, rng.integers(2, 9)))

    rows = [
        dict(prompt=words(0, 37), chosen=words(18, 37), rejected=words(0, 20)) for _ in range(count)
    ]
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pathlib.Path(path)


def write_groups(path, pairs) -> pathlib.Path:
    """Write three pairs of three answers for each prompt of some pairs, far apart in the file."""
    rounds = [[], [], []]
    for line in pathlib.Path(pairs).read_text().splitlines():
        row = json.loads(line)
        prompt, first, last = row["prompt"], row["chosen"], row["rejected"]
        third = f"w20 {prompt}"
        answers = ((first, last), (first, third), (third, last))
        for rows, (chosen, rejected) in zip(rounds, answers, strict=True):
            rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    lines = [json.dumps(row) + "\n" for rows in rounds for row in rows]
    pathlib.Path(path).write_text("".join(lines))
    return pathlib.Path(path)


def dpo_config(model, pairs, **fields):
    """Return the config of a short DPO run.

    fields: of its dpo block; or of another block, written with two underscores (data__shuffle).
    """
    config = configs.default(("dpo",))
    config.model.path, config.data.path = str(model), str(pairs)
    config.data.eval_fraction = 0.2
    # SGD, whose updates follow the gradient: RMSprop makes even a gradient that is rounding noise a
    # real step.
    config.dpo.update(
        batch_size=8, steps=6, optimizer="sgd", lr=0.05, warmup_steps=2, eval_every=3, save_every=2
    )
    for name, value in fields.items():
        block, _, field = name.rpartition("__")
        config[block or "dpo"][field] = value
    return config


def scratch_config(**fields):
    """Return the config of a DPO run from random weights of a small Llama, which need no file."""
    config = dpo_config("", "PAIRS", **fields)
    config.model.scratch.update(SCRATCH)
    config.data.update(max_length=32, max_prompt_length=16)
    return config


@contextlib.contextmanager
def on_devices(count: int):
    """Let the runs inside take the first devices only; one compiles faster than eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, "make_mesh", functools.partial(MAKE_MESH, devices=jax.devices()[:count])
        )
        yield


@contextlib.contextmanager
def sigterm_at(step: int):
    """Ask the run inside to stop, while a step is logged; yield what it raises, once it has."""
    write = metrics.Writer.write

    def stop(self, now, values):
        write(self, now, values)
        if now == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(metrics.Writer, "write", stop)
        yield stopped


def run(config, workdir, **options) -> pathlib.Path:
    """Run all stages in this process; return the folder of the last training stage.

    options: of run_stages.
    """
    run_stages(config, str(workdir), **options)
    trained = stage_table.training_stages(config)
    return pathlib.Path(workdir) / configs.folder_names(config)[trained[-1]]


def plant(run, stage: str, model=None, **changes) -> None:
    """Make a stage of a Run done without training, with a folder's model or a random one.

    changes: of the random model's config.
    """
    folder, _ = start_stage(run.workdir, run.config, stage, versions())
    if model:
        (folder / "hf").symlink_to(model)
    else:
        start = run.initial("sft")
        shape = dataclasses.replace(start.config, **changes)
        params = jax.device_put(random_params(shape))
        hf.save(folder / "hf", shape, start.hf_config, params, start.tokenizer)
    finish_stage(folder)


def command(
    module: str, *flags: str, devices: int = 1, fast: bool = False, **options
) -> subprocess.CompletedProcess:
    """Run python -m dpo_jax.MODULE FLAGS on fake CPU devices; its output is captured.

    fast: compile as a user's run does. It pays off for a long run.
    """
    env = environment(devices) | (dict(XLA_FLAGS="") if fast else {})
    return subprocess.run(
        [sys.executable, "-m", f"dpo_jax.{module}", *map(str, flags)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=env,
        **options,
    )


def experiment_configs(choice: str, arguments=()):
    """Return an experiment's function from a method to its config, as its command line makes it."""
    _, overrides = command_line.split_overrides(list(arguments))
    return commands.config_maker(choice, overrides)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def environment(devices: int = 1) -> dict:
    """Return the environment of a command that is to see so many CPU devices, and no torch."""
    return os.environ | dict(JAX_NUM_CPU_DEVICES=str(devices), PYTHONPATH=python_path())


def weights(folder) -> dict[str, np.ndarray]:
    """Return the exported tensors of a run by name."""
    from safetensors.numpy import load_file

    return load_file(pathlib.Path(folder) / "hf" / "model.safetensors")


def rows_without_timings(folder) -> list[dict]:
    """Return the rows of metrics.jsonl without what depends on the machine's speed."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def score_file(model, data, out, **options):
    """Score a file as the command does, four pairs at a time; options: of score.Options."""
    given = dict(batch_size=4) | options
    score.score_file(score.Options(str(model), str(data), str(out), **given), sharding.make_mesh())


def sample_file(model, prompts, out, settings=None, options=None, **changes):
    """Sample two completions of each prompt, three prompts at a time.

    settings: fields of config.data. options: of sample.Options. changes: of the sampling.
    """
    sampling = Sampling(**dict(max_new_tokens=6, n=2, batch_size=6) | changes)
    asked = sample.Options(
        str(model),
        str(prompts),
        str(out),
        sampling,
        settings=PROMPT_SETTINGS | (settings or {}),
        **options or {},
    )
    sample.sample_file(asked, sharding.make_mesh())
