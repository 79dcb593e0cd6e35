"""The Python of README.md and of docs/python.md runs as it stands there."""

import json
import re

import pytest

import dpo_jax
from tests.helpers.paths import ROOT, STORIES
from tests.helpers.tiny_runs import on_devices


def blocks(page: str) -> list[str]:
    """Return the Python of a page, a text for each block."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def run_blocks(code: list[str], folder, monkeypatch) -> dict:
    """Run blocks one after the other in one namespace, in a folder; return the namespace."""
    monkeypatch.chdir(folder)
    namespace = {"__name__": "__main__"}
    with on_devices(1):
        for block in code:
            exec(
                compile(block.replace("PATH_OR_HUB_NAME", str(STORIES)), "page", "exec"), namespace
            )
    return namespace


def shortened(run):
    """Return dpo_jax.run with runs of two steps in each stage."""

    def short_run(config, workdir, **options):
        for stage, fields in (
            ("sft", dict(steps=2, eval_every=2)),
            ("pairs", dict(prompts=8)),
            ("dpo", dict(steps=2, batch_size=8, eval_every=2)),
            ("evaluate", dict(prompts=2)),
        ):
            if stage in config:
                if config.data.source != "toy":  # the page's own numbers must suit its small file
                    fields.pop("prompts", None)
                config[stage].update(fields)
        config.sampling.max_new_tokens = min(config.sampling.max_new_tokens, 12)
        return run(config, workdir, **options)

    return short_run


def test_readme_python_runs(tmp_path, monkeypatch):
    """The ten lines, with words in place of the dots."""
    (code,) = [block for block in blocks("README.md") if "import dpo_jax" in block]
    words = dict(prompt="Once upon a time", chosen=" there was a dog.", rejected=" a a a")
    for field, text in words.items():
        code = code.replace(f'"{field}": "..."', f'"{field}": "{text}"')
    code = code.replace('["..."]', '["Once upon a time"]')
    assert "..." not in re.sub(r"#.*", "", code)
    assert 7 <= len(code.strip().splitlines()) <= 12
    found = run_blocks([code], tmp_path, monkeypatch)
    assert found["metrics"]["loss/train"] == pytest.approx(0.6931, abs=1e-4)
    assert found["chosen"] > found["rejected"]
    assert found["texts"][0].startswith(", there was a")
    assert (tmp_path / "OUT" / "model.safetensors").exists()


def test_python_page_examples_run(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"Once upon a time {i}", "completion": " there was."} for i in range(200)]
    (tmp_path / "PROMPTS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("dpo_jax.api.run", shortened(dpo_jax.run))
    found = run_blocks(blocks("docs/python.md"), tmp_path, monkeypatch)
    assert "0.6931" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"OUT", "ADAPTER", "MERGED", "WORKDIR"}
    pairs = (tmp_path / "RUN" / "pairs" / "pairs.jsonl").read_text().splitlines()
    for pair in map(json.loads, pairs):
        for side in ("chosen", "rejected"):
            reward = found["short_and_happy"]([pair["prompt"]], [pair[side]])
            assert pair[f"reward_{side}"] == pytest.approx(reward[0])
