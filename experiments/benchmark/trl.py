"""TRL's side of the benchmark: its DPOTrainer in its own loop, held by a callback between turns.

It has TRL's best settings: scaled-dot-product attention (flash-attn where installed), autocast
where it computes in bfloat16, with `cached` its precomputed reference, and with `compiled`
torch.compile. It runs in the Python that has TRL and imports nothing of dpo_jax.
"""

import importlib.util
import pathlib
import sys
import time

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from experiments.benchmark.work import Work, read_rows
from experiments.benchmark.worker import Turns, peak_resident_bytes

GPU = torch.cuda.is_available()


class Held(TrainerCallback):
    """Let the trainer make the steps that are asked for; answer with their time and losses.

    A step's time lasts from its beginning to the beginning of the next, so it includes the input.
    """

    def __init__(self, turns: Turns):
        self._turns = turns
        self._left = None  # steps still to make in this turn; None before the first turn
        self._began = 0.0
        self._losses = []

    def on_step_begin(self, args, state, control, **_):
        if not self._left:
            self._change_turns()
        self._left -= 1

    def _change_turns(self):
        """Answer for the steps that were made, if any, and wait for the next."""
        self._synchronise()
        if self._left is not None:
            seconds = time.perf_counter() - self._began
            self._turns.answer(dict(seconds=seconds, losses=self._losses))
        self._left, self._losses = self._turns.wait(), []
        self._began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self._losses.append(logs["loss"])

    def _synchronise(self):
        if GPU:
            torch.cuda.synchronize()


def make_trainer(folder: pathlib.Path, work: Work, callback) -> trl.DPOTrainer:
    """Return a trainer on the benchmark's folder, with the settings of our side."""
    options = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=work.pairs,
        max_steps=work.steps + 1,  # the last one begins, to answer for the one before
        learning_rate=work.lr,
        beta=work.beta,
        optim="rmsprop",
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=work.max_grad_norm,
        logging_steps=1,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        bf16=work.dtype == "bfloat16",
        fp16=False,
        torch_compile=work.compiled,
        gradient_checkpointing=False,
        max_length=None,
        precompute_ref_log_probs=work.cached,
        use_cpu=not GPU,
        disable_tqdm=True,
    )
    flash = GPU and work.dtype == "bfloat16" and importlib.util.find_spec("flash_attn")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        attn_implementation="flash_attention_2" if flash else "sdpa",
    )
    return trl.DPOTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list(read_rows(folder, work)),
        callbacks=[callback],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


def ceiling(dtype: str) -> float:
    """Return the FLOP/s of the fastest of five square matrix products."""
    size, device = (8192, "cuda") if GPU else (2048, "cpu")
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(6):  # the first warms up
        began = time.perf_counter()
        a @ b
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def main():
    folder = pathlib.Path(sys.argv[1])
    work = Work.read(folder)

    def about():
        return dict(
            version=f"TRL {trl.__version__}, torch {torch.__version__}",
            threads=torch.get_num_threads(),
        )

    def flops_per_second():
        return dict(flops_per_second=ceiling(work.dtype))

    def peak():
        return dict(bytes=torch.cuda.max_memory_allocated() if GPU else peak_resident_bytes())

    turns = Turns(about=about, ceiling=flops_per_second, peak=peak)
    make_trainer(folder, work, Held(turns)).train()


if __name__ == "__main__":
    main()
