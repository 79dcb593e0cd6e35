"""KTO's loss against TRL's own code, and twenty steps beside its KTOTrainer."""

import collections
import json
import types

import jax
import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.training import losses
from dpo_jax.training.metrics import read_rows
from experiments.real_model import TRL_SETTINGS
from tests.helpers import trl_runs
from tests.helpers.tiny_runs import on_devices, run, write_pairs

torch = pytest.importorskip("torch", reason="TRL runs on torch")
trl = pytest.importorskip("trl", reason="the independent reference is TRL's KTOTrainer")

ROWS, BETA, WEIGHTS = 12, 0.3, (1.5, 0.7)
STEPS, BATCH, LR, CLIP = 20, 4, 1e-3, 10.0


class Stand:
    """All that TRL's loss asks of its trainer, beside numbers: what it logs goes nowhere."""

    device = "cpu"
    training = precompute_ref_logps = calculate_KL = True
    aux_loss_enabled = False
    loss_type = "kto"
    beta = BETA
    desirable_weight, undesirable_weight = WEIGHTS
    _total_train_tokens, _tp_size = 0, 1

    def __init__(self, mismatched):
        self.accelerator = self.model = self
        self._metrics = {"train": collections.defaultdict(list)}
        self._mismatched = mismatched

    def _compute_kl_logps(self, _model, _batch):
        return self._mismatched

    def gather_for_metrics(self, value):
        return value


def trl_loss(log_probs, mismatched, labels):
    """The loss of a batch by TRL's KTOTrainer, of a model with these sums of log-probs."""
    mask = torch.tensor([[0, 1]]).repeat(ROWS, 1)  # a prompt and a completion of a token each
    rest = torch.zeros(ROWS, 1)
    outputs = types.SimpleNamespace(log_probs=log_probs[:, None], entropy=rest, mean_logits=rest)
    inputs = dict(
        input_ids=torch.zeros_like(mask),
        attention_mask=torch.ones_like(mask),
        completion_mask=mask,
        label=torch.tensor(labels),
        ref_logps=torch.zeros(ROWS),
        ref_KL_logps=torch.zeros(ROWS),
    )
    return trl.KTOTrainer._compute_loss(Stand(mismatched), lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("labels", ["both", "desirable", "undesirable"])
@pytest.mark.parametrize("shift", [0.4, -2.0])  # of the KL: above 0, and below, where it is 0
def test_kto_equals_trl(labels, shift):
    rng = np.random.default_rng(0)
    log_probs = rng.normal(0, 3, ROWS)
    mismatched = rng.normal(0, 0.5, ROWS) + shift
    desirable = dict(
        both=rng.random(ROWS) < 0.5, desirable=np.ones(ROWS, bool), undesirable=np.zeros(ROWS, bool)
    )[labels]
    given = torch.tensor(log_probs, requires_grad=True)
    theirs = trl_loss(given, torch.tensor(mismatched), desirable)
    theirs.backward()

    def ours(log_ratios):
        kl = max(mismatched.mean(), 0.0)
        return losses.kto(log_ratios, desirable, kl, BETA, *WEIGHTS).mean()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(ours)(log_probs)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-9)
    np.testing.assert_allclose(gradient, given.grad, rtol=1e-9)


def trl_run(model_path, rows, workdir):
    """Return the losses and KLs of each step, and the trained torch model."""
    settings = trl.KTOConfig(
        output_dir=str(workdir),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LR,
        beta=BETA,
        desirable_weight=WEIGHTS[0],
        undesirable_weight=WEIGHTS[1],
        max_grad_norm=CLIP,
        **TRL_SETTINGS,
    )
    history, trained = trl_runs.train(trl.KTOTrainer, settings, model_path, rows)
    return [entry["loss"] for entry in history], [entry["kl"] for entry in history], trained


@pytest.mark.slow
def test_kto_follows_trl(tmp_path):
    """Same model, data order, optimiser and settings, twenty steps."""
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    trl_runs.write_torch_model("gpt2", model)
    pairs = write_pairs(tmp_path / "pairs.jsonl", count=STEPS * BATCH)
    rows = []
    for number, line in enumerate(pairs.read_text().splitlines()):
        pair = json.loads(line)
        # Runs of one kind, so that some batches have no row of the other.
        label = number % 7 < 4
        completion = pair["chosen"] if label else pair["rejected"]
        rows.append(dict(prompt=pair["prompt"], completion=completion, label=label))
    for split, some in (("train", rows), ("test", rows[:4])):
        lines = [json.dumps(row) + "\n" for row in some]
        (data / f"{split}.jsonl").write_text("".join(lines))
    spaced = [row | dict(completion=" " + row["completion"]) for row in rows]
    theirs, their_kls, trained = trl_run(model, spaced, tmp_path / "trl")

    config = configs.default(("kto",))
    config.model.path, config.data.path, config.data.shuffle = str(model), str(data), False
    config.kto.update(
        batch_size=BATCH,
        steps=STEPS,
        lr=LR,
        beta=BETA,
        desirable_weight=WEIGHTS[0],
        undesirable_weight=WEIGHTS[1],
        max_grad_norm=CLIP,
        warmup_steps=0,
        eval_every=100,
    )
    with on_devices(1):
        folder = run(config, tmp_path / "ours")
    found = [row for row in read_rows(folder / "metrics.jsonl") if row["step"]]
    ours = [row["loss/train"] for row in found]
    our_kls = [row["kto_train/kl"] for row in found]

    print("\nstep, TRL's loss, ours, difference, KLs")
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True), 1):
        kls = f"{their_kls[step - 1]:.5f} {our_kls[step - 1]:.5f}"
        print(f"{step:4d}  {a:.6f}  {b:.6f}  {b - a:+.1e}  {kls}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(our_kls, their_kls, rtol=0, atol=1e-4)
    assert max(their_kls) > 0.1  # the term is at work
    difference = trl_runs.logits_difference(folder / "hf", trained)
    print(f"largest difference of the final logits {difference:.1e}")
    assert difference < 1e-3
