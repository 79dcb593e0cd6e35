"""A peer's side: Tunix's DPOTrainer in its own training loop, held up by its input while it is not
its turn.

Its rows are padded to the longest prompt and the longest response of all steps (it would take the
longest allowed), so that it compiles once. Its reference runs in each step: it keeps no log-probs.
Run in the Python that has it.
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
    policy, reference = (
        llama_params.create_model_from_safe_tensors(
            str(folder / "model"), config, mesh, dtype=jax.numpy.float32
        )
        for _ in range(2)
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(work.max_grad_norm),
        optax.rmsprop(work.lr, decay=0.99, eps=1e-8, eps_in_sqrt=False),
    )  # torch's, as TRL's
    return DPOTrainer(
        policy,
        reference,
        optimizer,
        DPOTrainingConfig(eval_every_n_steps=work.steps + 1, max_steps=work.steps, beta=work.beta),
    )


def batches(folder: pathlib.Path, work: Work) -> list[TrainingInput]:
    """Of every step, prompts padded on the left and responses on the right."""
    rows = read_rows(folder, work)

    def ids(name, ending):
        return [[int(word[1:]) for word in row[name].split()] + ending for row in rows]

    def padded(sequences, longest, left=False):
        ids_BT, mask_BT = np.zeros((2, len(sequences), longest), np.int32)
        for row, tokens in enumerate(sequences):
            place = slice(longest - len(tokens), None) if left else slice(len(tokens))
            ids_BT[row, place], mask_BT[row, place] = tokens, 1
        return ids_BT, mask_BT

    prompts, chosen, rejected = (
        ids("prompt", []),
        ids("chosen", [END_ID]),
        ids("rejected", [END_ID]),
    )
    longest = max(map(len, chosen + rejected))
    arrays = [
        *padded(prompts, max(map(len, prompts)), left=True),
        *padded(chosen, longest),
        *padded(rejected, longest),
    ]
    return [
        TrainingInput(*(x[start : start + work.pairs] for x in arrays))
        for start in range(0, len(rows), work.pairs)
    ]


def held(trainer: DPOTrainer, given: list[TrainingInput], turns: Turns):
    """The batches, as far as steps are asked for; when these are made, answers with their time and
    losses.
    """
    left = began = None
    losses = []
    for batch in given:
        if left is not None:
            losses.append(
                trainer._prev_buffered_train_metrics.losses[-1]
            )  # of the step before; it has no hook in time
        if not left:
            jax.block_until_ready(nnx.state((trainer.model, trainer.optimizer)))
            if left is not None:
                turns.answer(
                    dict(
                        seconds=time.perf_counter() - began, losses=[float(loss) for loss in losses]
                    )
                )
            left, losses = turns.wait(), []
            began = time.perf_counter()
        left -= 1
        yield batch


def main():
    folder = pathlib.Path(sys.argv[1])
    jax.config.update("jax_default_matmul_precision", "float32")  # as runtime.start says for ours
    work = Work.read(folder)
    turns = Turns(
        about=lambda: dict(
            version=f"Tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}",
            device=jax.devices()[0].device_kind,
        ),
        ceiling=lambda: dict(flops_per_second=device.ceiling(work.dtype)),
        peak=lambda: dict(bytes=device.peak_bytes()),
    )
    trainer, given = make_trainer(folder, work), batches(folder, work)
    trainer.train(
        held(trainer, [*given, given[-1]], turns)
    )  # the last is asked for, to answer, and not trained on


if __name__ == "__main__":
    main()
