"""What the pages show, run: the recipe on a tiny model."""

import pytest

from tests.helpers.tiny_runs import command, write_model, write_pairs


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
