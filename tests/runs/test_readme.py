"""The README's recipe, run."""

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import command, write_model, write_pairs

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
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


def test_the_recipe_runs_with_the_papers_defaults(trained):
    folder, out = trained
    assert "self-check passed" in out and "all stages done" in out
    assert (folder / "mine" / "dpo" / "hf" / "model.safetensors").exists()


def test_a_run_that_ends_in_its_warm_up_says_so(trained):
    _, out = trained
    assert (
        "dpo: the run is over before its warm-up is (config.dpo.warmup_steps = 150): its learning rate"
        in out
    )


def test_what_was_trained_can_be_scored(trained):
    folder, _ = trained
    done = command(
        "score",
        f"--model={folder / 'mine' / 'dpo' / 'hf'}",
        f"--data={folder / 'PAIRS.jsonl'}",
        f"--out={folder / 'scored.jsonl'}",
    )
    assert done.returncode == 0, done.stderr
    assert len((folder / "scored.jsonl").read_text().splitlines()) == 60
