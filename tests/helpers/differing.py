"""One of two processes that differ in one thing after another; prints what it says of each.

python -m tests.helpers.differing FOLDER ADDRESS NUMBER. It works in FOLDER/NUMBER, so that relative
paths lead to other files in each: `equal/` is the same model in both and `model/` is not, nor are
the rows of `pairs.jsonl`, while those of `same.jsonl` are. What both raise ends none of them.
"""

import contextlib
import io
import json
import os
import pathlib
import sys

import jax

from dpo_jax import config as configs
from dpo_jax import sample, score
from dpo_jax.parallel import agreement, processes, sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.sampling.sampler import Sampling
from tests.helpers.tiny_runs import dpo_config


def config_of(model: str = "equal", data: str = "same.jsonl", **fields):
    return dpo_config(model, data, steps=1, mesh__data=2, **fields)


def cases(folder: pathlib.Path, number: int) -> dict:
    """Name -> a function that raises the same ValueError in both processes."""

    def train(name, config):
        run_stages(config, str(folder / name))

    def read_prompts():
        config = configs.default(("pairs", "dpo"))
        config.model.path, config.data.path = "equal", "pairs.jsonl"
        run = Run(config, folder / "prompts", sharding.make_mesh())
        run.load_prompts(run.initial("dpo").tokenizer)

    def sample_file(model, prompts):
        options = sample.Options(
            model, prompts, str(folder / "sampled.jsonl"), Sampling(max_new_tokens=2, batch_size=64)
        )
        sample.sample_file(options, sharding.make_mesh())

    def score_file(data):
        options = score.Options("equal", data, str(folder / "scored.jsonl"))
        score.score_file(options, sharding.make_mesh())

    return {
        "config": lambda: train(
            "config", config_of(lr=0.1 * (1 + number), mesh__tensor=1 + number)
        ),
        "rows": lambda: train("rows", config_of(data="pairs.jsonl")),
        "weights": lambda: train("weights", config_of(model="model")),
        "prompts": read_prompts,
        "sample": lambda: sample_file("equal", "pairs.jsonl"),
        "score": lambda: score_file("pairs.jsonl"),
        # The last, as they leave files: two copies of one model, and the same rows.
        "copies": lambda: sample_file("equal", "same.jsonl"),
        "scores": lambda: score_file("same.jsonl"),
    }


def said_of_caches(folder: str | None) -> str:
    jax.config.update("jax_compilation_cache_dir", folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        agreement.say_own_caches()
    return output.getvalue()


def main():
    folder, address, number = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.chdir(folder / str(number))
    processes.start()
    processes.join(address, 2, number)
    said = {}
    for name, case in cases(folder, number).items():
        try:
            case()
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    # Each keeps its compiled programs in a folder of its own; both in one; and process 0 nowhere.
    said["caches"] = said_of_caches(os.getcwd())
    said["one cache"] = said_of_caches(str(folder))
    said["no cache"] = said_of_caches(os.getcwd() if number else None)
    (folder / f"{number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
