"""Tunix's side of the benchmark: its DPOTrainer in its own loop, held by its input between turns.

Rows are padded to the longest prompt and the longest response of all steps, so that it compiles
once; by itself it would pad to the longest that are allowed. Its reference runs in each step, as it
cannot cache log-probs. It runs in the Python that has Tunix.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

from experiments.benchmark import device
from experiments.benchmark.work import Work, read_rows
from experiments.benchmark.worker import Turns

END_ID = 0


def make_trainer(folder: pathlib.Path, work: Work) -> DPOTrainer:
    """Return a trainer on the benchmark's folder, with the settings of our side."""
    fields = json.loads((folder / "model" / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=fields["rope_parameters"]["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        weight_tying=fields["tie_word_embeddings"],
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))

    def load_model():
        return llama_params.create_model_from_safe_tensors(
            str(folder / "model"), config, mesh, dtype=jax.numpy.float32
        )

    policy, reference = load_model(), load_model()
    # RMSprop with torch's defaults, which TRL uses.
    optimizer = optax.chain(
        optax.clip_by_global_norm(work.max_grad_norm),
        optax.rmsprop(work.lr, decay=0.99, eps=1e-8, eps_in_sqrt=False),
    )
    options = DPOTrainingConfig(
        eval_every_n_steps=work.steps + 1, max_steps=work.steps, beta=work.beta
    )
    return DPOTrainer(policy, reference, optimizer, options)


def batches(folder: pathlib.Path, work: Work) -> list[TrainingInput]:
    """Return each step's batch: prompts padded on the left, responses on the right."""
    prompts, chosen, rejected = [], [], []
    for row in read_rows(folder, work):
        prompts.append(_ids(row["prompt"]))
        chosen.append([*_ids(row["chosen"]), END_ID])
        rejected.append([*_ids(row["rejected"]), END_ID])
    longest_prompt = max(map(len, prompts))
    longest_response = max(map(len, chosen + rejected))
    # In the order of TrainingInput's fields: ids and mask of each.
    arrays = [
        *_pad(prompts, longest_prompt, left=True),
        *_pad(chosen, longest_response),
        *_pad(rejected, longest_response),
    ]
    found = []
    for start in range(0, len(prompts), work.pairs):
        found.append(TrainingInput(*(x[start : start + work.pairs] for x in arrays)))
    return found


def _ids(text: str) -> list[int]:
    """Return the ids of a text: its words are "w" and their id."""
    return [int(word[1:]) for word in text.split()]


def _pad(sequences: list[list[int]], longest: int, left: bool = False) -> tuple:
    """Return ids [B, T] and mask [B, T] of sequences padded to one length."""
    shape = (len(sequences), longest)
    ids_BT, mask_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, ids in enumerate(sequences):
        place = slice(longest - len(ids), None) if left else slice(len(ids))
        ids_BT[row, place] = ids
        mask_BT[row, place] = 1
    return ids_BT, mask_BT


def held(trainer: DPOTrainer, given: list[TrainingInput], turns: Turns):
    """Yield batches for the steps that are asked for, and answer with their time and losses.

    The trainer asks for a batch when it has made the step before, which is the only place to hold
    it: it has no callback that comes in time.
    """
    left = None  # steps still to make in this turn; None before the first turn
    began, losses = 0.0, []
    for batch in given:
        if left is not None:
            losses.append(trainer._prev_buffered_train_metrics.losses[-1])  # of the step before
        if not left:
            jax.block_until_ready(nnx.state((trainer.model, trainer.optimizer)))
            if left is not None:
                seconds = time.perf_counter() - began
                turns.answer(dict(seconds=seconds, losses=[float(loss) for loss in losses]))
            left, losses = turns.wait(), []
            began = time.perf_counter()
        left -= 1
        yield batch


def main():
    folder = pathlib.Path(sys.argv[1])
    jax.config.update("jax_default_matmul_precision", "float32")  # as processes.start sets for ours
    work = Work.read(folder)

    def about():
        return dict(
            version=f"Tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}",
            device=jax.devices()[0].device_kind,
        )

    def ceiling():
        return dict(flops_per_second=device.ceiling(work.dtype))

    def peak():
        return dict(bytes=device.peak_bytes())

    turns = Turns(about=about, ceiling=ceiling, peak=peak)
    trainer = make_trainer(folder, work)
    given = batches(folder, work)
    # The last batch is asked for twice: the second time to answer, and not trained on.
    trainer.train(held(trainer, [*given, given[-1]], turns))


if __name__ == "__main__":
    main()
