"""What is refused before the first stage runs."""

import pytest

from configs import imdb_small
from dpo_jax.pipeline.stages import run_stages


def test_run_stages_refuses_unreadable_reward(tmp_path):
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    config = imdb_small.get_config()
    config.reward.update(kind="classifier", path=str(folder))
    with pytest.raises(
        FileNotFoundError, match="pytorch_model.bin would run code(.|\n)*OWNER/NAME@refs/pr/N"
    ):
        run_stages(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "sft").exists()
