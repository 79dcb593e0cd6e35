"""Steps on the examples of a data set: each is one update on one batch."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.console import say
from dpo_jax.data.batches import (
    Batches,
    evaluation_order,
    is_sharing_lost,
    microbatch_size_of,
    microbatches_of,
    prefetch,
    sizes_for_whole_groups,
    steps_of,
    training_order,
)
from dpo_jax.data.dataset import Dataset
from dpo_jax.models import flops
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import hardware, sharding
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training.loop import Job
from dpo_jax.training.self_check import FirstBatch, self_check
from dpo_jax.training.step import Frozen, Programs, TrainState

# Tokens x layers x width of a microbatch from which huge pages make a CPU's steps faster: a step
# then takes blocks of more than 32 MB, which glibc gives back to Linux after every step.
GAINS_BY_HUGE_PAGES = 500_000


class DataFeed:
    """The `loop.Feed` of a data set."""

    def __init__(
        self,
        job: Job,
        data: Dataset,
        *,
        seed: int | None,
        group_pairs: int,
        eos_id: int | None,
        reference_is_init: bool,
        show_example: Callable[[int], str],
        reference_log_probs: Callable | None = None,
    ):
        """Lay out the batches of the whole stage.

        seed: of the data order; None keeps the data's own. group_pairs: most examples of a prompt
        that stay together; 0 shuffles each alone. eos_id: the token that responses end in, or None.
        reference_is_init: whether the reference is the initial policy. show_example: index of a
        training example -> its text, with what is trained on marked. reference_log_probs: (split,
        examples, order) -> the reference's kept log-probs [examples, responses].
        """
        self._job = job
        self._data = data
        self._eos_id = eos_id
        self._reference_is_init = reference_is_init
        self._show_example = show_example
        self._reference_log_probs = reference_log_probs
        self._batches = self._training_batches(seed, group_pairs)
        self.reading = self._batches.reading()
        is_pairs = len(data.train.responses[0]) == 2
        say(f"{job.name}: {self.reading.told('pair' if is_pairs else 'row')}")
        self._held_out = self._evaluation_batches()
        self._ahead = None  # batches that a thread prepares
        self.total = len(self._batches)
        self.updates = self.total
        self.controls: dict[str, float] = {}

    def start(self, frozen: Frozen, first_step: int) -> None:
        self._frozen = frozen
        # The thread starts with the first step: a check or an evaluation comes before it.
        self._ahead = prefetch(self._load, range(first_step, self.total))

    def check(self, params: dict) -> str:
        # The metrics of its first microbatch, which is as large as a batch of the evaluation.
        first = jax.tree.map(lambda x: x[:1], self._batches[0])
        batch = sharding.shard_batch(self._job.mesh, first, axis=1)
        measured = self._job.programs.measure(params, self._frozen, batch)
        first_batch = FirstBatch(
            examples=self._data.train,
            indices=self._batches.order[0],
            metrics=metrics_lib.named(measured, "train"),
            eos_id=self._eos_id,
            reference_is_init=self._reference_is_init,
            reference_log_probs=self._batches.reference_log_probs,
            show=self._show_example,
        )
        return self_check(
            self._job.model,
            self._job.block,
            self._job.mesh,
            self._frozen.full(params),
            self._frozen.full(self._frozen.reference),
            first_batch,
        )

    def run(self, state: TrainState, step: int) -> tuple[TrainState, dict]:
        loaded, batch = next(self._ahead)
        assert loaded == step, f"step {step} was asked for, and step {loaded} is next"
        return self._job.programs.update(state, self._frozen, batch)

    def evaluate(self, params: dict) -> dict[str, float]:
        if self._held_out is None:
            return {}
        return evaluate(self._job.programs, self._job.mesh, params, self._frozen, self._held_out)

    def tokens(self, step: int) -> int:
        return self._batches.tokens(step)

    def flops(self, step: int) -> int:
        # A kept reference costs nothing here, and under adapters no gradient of the base is made.
        return flops.of_step(
            self._job.model,
            self._batches.contents(step),
            reference=self._frozen.reference is not None,
            frozen=self._job.lora is not None,
        )

    def examples(self, step: int) -> list[str]:
        return [self._data.train.where[index] for index in self._batches.order[step]]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _load(self, step: int):
        """Return the batch of a step, on the mesh; called in a thread of its own."""
        return sharding.shard_batch(self._job.mesh, self._batches[step], axis=1)

    def _training_batches(self, seed: int | None, group_pairs: int) -> Batches:
        name = self._job.name
        block = self._job.block
        size = len(self._data.train)
        steps = steps_of(size, block.batch_size, steps=block.steps, epochs=block.epochs)
        if not steps or not size:
            raise ValueError(
                f"{name}: {size} training rows make no step of config.{name}.batch_size = "
                f"{block.batch_size} in {block.epochs} epochs. Lower it, or set "
                f"config.{name}.steps."
            )
        groups = self._data.train.groups(group_pairs) if group_pairs else None
        order = training_order(size, block.batch_size, steps, seed, groups)
        batches = Batches(
            self._data.train,
            order,
            microbatches=microbatches_of(block),
            shards=sharding.batch_shards(self._job.mesh),
            window=self._job.model.window,
            reference_log_probs=self._kept_log_probs("train", self._data.train, order),
        )
        # Every shape is a program to compile, and padding is work for nothing: both are shown.
        padding = batches.padding()
        count = len(batches.shapes)
        shapes = f"{count} shape" if count == 1 else f"{count} shapes"
        say(
            f"{name}: {steps} steps of {block.batch_size} from {size} rows, {shapes}, "
            f"padding {padding['dense']:.1%} of tokens, {padding['attention']:.1%} of "
            "attention"
        )
        if groups is not None:
            _say_what_cells_lose(name, block, batches, groups)
        most_tokens = max(shape.tokens for shape in batches.shapes)
        if gains_by_huge_pages(self._job.model, self._job.mesh, most_tokens):
            say_how_to_get_huge_pages()
        if block.warmup_steps >= steps:
            reached = steps / (block.warmup_steps + 1)
            say(
                f"{name}: the run ends before its warm-up (config.{name}.warmup_steps = "
                f"{block.warmup_steps}), so the learning rate only reaches {reached:.0%} of "
                f"{block.lr:g}. Lower warmup_steps, unless this is intended."
            )
        return batches

    def _evaluation_batches(self) -> Batches | None:
        """Return batches of the held-out examples, as large as a microbatch; None without any."""
        block = self._job.block
        size = len(self._data.eval)
        if not size:
            return None
        # What fits in memory with a gradient fits without one.
        batch_size = microbatch_size_of(block)
        prompt_ids, _ = self._data.eval.identities()
        order = evaluation_order(size, batch_size, prompt_ids)
        return Batches(
            self._data.eval,
            order,
            shards=sharding.batch_shards(self._job.mesh),
            window=self._job.model.window,
            reference_log_probs=self._kept_log_probs("eval", self._data.eval, order),
        )

    def _kept_log_probs(self, split: str, examples, order: np.ndarray) -> np.ndarray | None:
        if self._reference_log_probs is None:
            return None
        return self._reference_log_probs(split, examples, order)


def _say_what_cells_lose(name: str, block, batches: Batches, groups: np.ndarray) -> None:
    """Say where cells are too small for the rows of a prompt, and at which sizes they are not.

    block: the stage's. groups: the number of each example's group.
    """
    cells = batches.microbatches * batches.shards
    rows_of_groups = np.bincount(groups)
    if cells == 1 or rows_of_groups.max() == 1:
        return
    reading = batches.reading()
    whole = batches.tokens_in_one_cell()
    if not is_sharing_lost(reading.tokens, reading.tokens_one_at_a_time, whole):
        return
    steps = len(batches)
    rows = round(rows_of_groups.mean())
    message = (
        f"{name}: the {cells} cells of a step (microbatches x data shards) have "
        f"{block.batch_size / cells:g} rows each, and a prompt has about {rows}, so much is read "
        f"again: {reading.tokens / steps:,.0f} tokens a step instead of {whole / steps:,.0f}"
    )
    sizes = sizes_for_whole_groups(block, batches.shards, rows)
    if sizes:
        flags = " ".join(f"--config.{name}.{field}={size}" for field, size in sizes.items())
        message += f". Whole prompts would fit with {flags}"
    say(message)


def gains_by_huge_pages(model: TransformerConfig, mesh: jax.sharding.Mesh, tokens: int) -> bool:
    """Return whether steps on `tokens` tokens would be faster with huge pages, and could have them.

    They do nothing for an accelerator, and for steps whose memory glibc keeps anyway.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    is_large = tokens * model.layers * model.width >= GAINS_BY_HUGE_PAGES
    return is_cpu and is_large and hardware.lacks_huge_pages()


@functools.cache  # once in a process, whatever it trains
def say_how_to_get_huge_pages() -> None:
    """Say what huge pages bring, and the line to type."""
    say(
        "huge pages would shorten steps on this CPU by a fifth to a quarter: type "
        f"`export {hardware.HUGE_PAGES}` and start again"
    )


def evaluate(
    programs: Programs, mesh, params: dict, frozen: Frozen, batches: Batches
) -> dict[str, float]:
    """Return metrics over all batches, each example weighted alike.

    batches: of one microbatch each; examples that only fill up the last one count for nothing.
    """
    # Adapters are laid over their base once, not for each batch.
    full = frozen.full(params)
    reference = frozen.full(frozen.reference)
    total = None
    for step in range(len(batches)):
        batch = sharding.shard_batch(mesh, batches[step], axis=1)
        measured = programs.eval_step(full, reference, frozen.hyper, batch)
        total = metrics_lib.add(total, measured)
    return metrics_lib.named(total, "eval")
