"""Twenty steps beside TRL's DPOTrainer: same model, data order, optimiser and settings."""

import json

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import loss_table
from dpo_jax.training.metrics import read_rows
from experiments.real_model import TRL_SETTINGS
from tests.helpers import trl_runs
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import run, write_pairs

pytest.importorskip("torch", reason="TRL runs on torch")
trl = pytest.importorskip("trl", reason="the independent reference is TRL's DPOTrainer")

STEPS, BATCH, LR, BETA, CLIP = 20, 4, 1e-3, 0.1, 10.0

# Family, config.dpo.loss, and other fields of config.dpo. All but the paper's are slow together.
RUNS = [
    ("gpt2", "sigmoid", {}),
    ("llama", "sigmoid", {}),
    *(
        pytest.param("gpt2", *given, marks=pytest.mark.slow)
        for given in (
            ("apo_zero", {}),
            ("exo", dict(label_smoothing=0.1)),
            ("nca", {}),
            ("sppo_hard", {}),
            ("ipo", {}),
            ("hinge", {}),
            ("robust", dict(label_smoothing=0.1)),
            ("sigmoid=0.8,bco_pair=0.2,nll=1", {}),
            ("sigmoid", dict(weighting="wpo")),
            ("sigmoid", dict(ld_alpha=0.5)),
            # The reference moves every 4 steps, by 0.6 of the way to the policy.
            ("sigmoid", dict(reference_every=4, reference_mix=0.6)),
        )
    ),
]
THEIR_NAMES = dict(exo="exo_pair", nca="nca_pair", nll="sft")  # where TRL has another name


def trl_options(label_smoothing=0.0, weighting="none", ld_alpha=1.0, **moved) -> dict:
    """Return fields of config.dpo as TRL has them; moved: those of a moving reference."""
    options = dict(label_smoothing=label_smoothing, use_weighting=weighting == "wpo")
    if ld_alpha < 1:
        options |= dict(ld_alpha=ld_alpha)
    if moved:
        steps, share = moved["reference_every"], moved["reference_mix"]
        options |= dict(
            sync_ref_model=True, ref_model_sync_steps=steps, ref_model_mixup_alpha=share
        )
    return options


def trl_run(model_path, rows, workdir, loss, **options):
    """Return the losses of each step, and the trained torch model."""
    weights = loss_table.weights(loss)
    settings = trl.DPOConfig(
        output_dir=str(workdir),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LR,
        beta=BETA,
        loss_type=[THEIR_NAMES.get(name, name) for name in weights],
        loss_weights=list(weights.values()),
        max_grad_norm=CLIP,
        **TRL_SETTINGS,
        **options,
    )
    history, trained = trl_runs.train(trl.DPOTrainer, settings, model_path, rows)
    return [entry["loss"] for entry in history], trained


@pytest.mark.parametrize("family, loss, fields", RUNS)
def test_dpo_follows_trl(family, loss, fields, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    trl_runs.write_torch_model(family, model)
    train = write_pairs(data / "train.jsonl", count=STEPS * BATCH)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    if "nll" in loss:
        # TRL means the likelihood over the tokens of a batch: the same where all are equally long.
        rows = [row | dict(chosen=" ".join(row["chosen"].split()[:2])) for row in rows]
        write_jsonl(train, rows)
    write_pairs(data / "test.jsonl", count=4, seed=1)
    rows = [row | {side: " " + row[side] for side in ("chosen", "rejected")} for row in rows]
    theirs, trained = trl_run(model, rows, tmp_path / "trl", loss, **trl_options(**fields))

    config = configs.default(("dpo",))
    config.model.path, config.data.path, config.data.shuffle = str(model), str(data), False
    config.dpo.update(
        batch_size=BATCH,
        steps=STEPS,
        lr=LR,
        beta=BETA,
        loss=loss,
        max_grad_norm=CLIP,
        warmup_steps=0,
        eval_every=100,
        **fields,
    )
    folder = run(config, tmp_path / "ours")
    ours = [row["loss/train"] for row in read_rows(folder / "metrics.jsonl") if row["step"]]

    print(f"\n{family}, {loss}, {fields}: step, TRL's loss, ours, difference")
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True), 1):
        print(f"{step:4d}  {a:.6f}  {b:.6f}  {b - a:+.1e}")
    # SPPO's squares are up to 50, of which float32 has no four decimals after twenty steps.
    tolerance = max(1e-4, 1e-5 * max(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    assert theirs[-1] < theirs[0] - 0.02  # it has learned: a run that stands still would agree too
    difference = trl_runs.logits_difference(folder / "hf", trained)
    print(f"{family}: largest difference of the final logits {difference:.1e}")
    assert difference < 1e-3
