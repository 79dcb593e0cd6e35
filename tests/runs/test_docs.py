"""What the pages show, run: the recipe on a tiny model, and the metrics that runs write."""

import pytest

from configs import toy
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.training.metrics import read_rows
from tests.helpers.documented import documented_metrics
from tests.helpers.tiny_runs import command, on_devices, write_model, write_pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_model(folder / "MODEL")
    write_pairs(folder / "PAIRS.jsonl")
    done = command(
        "train",
        "--config=configs/dpo.py",
        f"--config.model.path={folder / 'MODEL'}",
        "--config.data.source=local",
        f"--config.data.path={folder / 'PAIRS.jsonl'}",
        f"--workdir={folder / 'mine'}",
        "--config.dpo.batch_size=16",
        "--config.data.eval_fraction=0.2",
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_recipe_runs_with_the_papers_defaults(trained):
    folder, out = trained
    assert "self-check passed" in out and "all stages done" in out
    assert (folder / "mine" / "dpo-batch_size16" / "hf" / "model.safetensors").exists()


def test_run_tells_if_warm_up_is_longer(trained):
    _, out = trained
    assert "config.dpo.warmup_steps = 150" in out


def test_trained_model_can_score(trained):
    folder, _ = trained
    done = command(
        "score",
        f"--model={folder / 'mine' / 'dpo-batch_size16' / 'hf'}",
        f"--data={folder / 'PAIRS.jsonl'}",
        f"--out={folder / 'scored.jsonl'}",
    )
    assert done.returncode == 0, done.stderr
    assert len((folder / "scored.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_every_metric_is_explained(method, tmp_path):
    config = toy.get_config(method)
    config.sampling.batch_size = 64
    config.pairs.prompts = 40
    for stage in {"sft", "rm", "dpo", "ppo"} & set(config.stages):
        config[stage].update(steps=2, batch_size=16, eval_every=1, save_every=2)
    if method == "ppo":
        config.ppo.minibatch_size = 8
    with on_devices(1):
        run_stages(config, str(tmp_path))
    explained = documented_metrics()
    files = list(tmp_path.glob("*/metrics.jsonl"))
    assert method in {file.parent.name for file in files}
    for file in files:
        for row in read_rows(file):
            assert not row.keys() - explained, file
