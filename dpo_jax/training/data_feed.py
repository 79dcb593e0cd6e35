"""Steps on the examples of a data set: each is one update on one batch."""

import copy
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dpo_jax import costs, stage_table, stopping
from dpo_jax.console import say, say_once
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
    unpaired,
    unpaired_evaluation,
    update_size_of,
)
from dpo_jax.data.dataset import Dataset
from dpo_jax.data.examples import FILLER, Examples
from dpo_jax.data.packing import RowLimits
from dpo_jax.models import attention, flops
from dpo_jax.models.inference import limits_of
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import hardware, sharding
from dpo_jax.stage_table import STAGES
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.training.loop import Job
from dpo_jax.training.self_check import FirstBatch, self_check
from dpo_jax.training.step import Frozen, Programs, TrainState, means

# Tokens x layers x width of a microbatch from which huge pages make a CPU's steps faster: a step
# then takes blocks of more than 32 MB, which glibc gives back to Linux after every step.
GAINS_BY_HUGE_PAGES = 500_000
# Other sizes, or another order, must save this share of the tokens to be mentioned. They are tried
# on the first steps of a run.
WORTH_SAYING = 0.1
TRIED_STEPS = 100


class DataFeed:
    """The `loop.Feed` of a data set."""

    def __init__(
        self,
        job: Job,
        data: Dataset,
        *,
        seed: int | None,
        shuffled: str,
        group_pairs: int,
        eos_id: int | None,
        reference_is_init: bool,
        show_example: Callable[[int], str],
        reference_dtype: str = "float32",
        reference_log_probs: Callable | None = None,
        longest_mismatched: int = 0,
    ):
        """Lay out the batches of the whole stage.

        seed: of the data order; None keeps the data's own. shuffled: "prompts" shuffles groups, and
        "pairs" each example alone. group_pairs: most examples of a group. eos_id: the token that
        responses end in, or None. reference_is_init: whether the reference is the initial policy.
        reference_dtype: that it holds the policy's kernels and embeddings in.
        show_example: index of a training example -> its text, with what is trained on marked.
        reference_log_probs: (split, examples, order) -> the reference's kept log-probs [examples,
        responses]. longest_mismatched: tokens of a prompt and the completion of another row
        together, where rows are unpaired.
        """
        self._job = job
        self._data = data
        self._eos_id = eos_id
        self._reference_is_init = reference_is_init
        self._reference_dtype = reference_dtype
        self._show_example = show_example
        self._reference_log_probs = reference_log_probs
        self._longest_mismatched = longest_mismatched
        self._batches = self._training_batches(seed, shuffled, group_pairs)
        self.reading = self._batches.reading()
        is_pairs = len(data.train.responses[0]) == 2
        say(f"{job.name}: {self.reading.told('pair' if is_pairs else 'row')}")
        self._held_out = self._evaluation_batches()
        self._ahead = None  # batches that a thread prepares
        self.total = len(self._batches)
        self.updates_per_step = 1
        self.waits = False
        self.controls: dict[str, float] = {}

    def start(self, frozen: Frozen, first_step: int) -> None:
        self._frozen = frozen
        # The thread starts with the first step: a check or an evaluation comes before it.
        self._ahead = prefetch(self._load, range(first_step, self.total))

    def check(self, state: TrainState) -> str:
        frozen = self._frozen.beside(state)
        # The metrics of its first microbatch, which is as large as a batch of the evaluation.
        first = jax.tree.map(lambda x: x[:1], self._batches[0])
        batch = sharding.shard_batch(self._job.mesh, first, axis=1)
        measured = self._job.programs.measure(state.params, frozen, batch)
        first_batch = FirstBatch(
            examples=self._data.train,
            indices=self._batches.order[0],
            metrics=metrics_lib.named(measured, "train"),
            eos_id=self._eos_id,
            reference_is_init=self._reference_is_init,
            reference_dtype=self._reference_dtype,
            reference_log_probs=self._batches.reference_log_probs,
            show=self._show_example,
        )
        return self_check(
            self._job.model,
            self._job.block,
            self._job.mesh,
            frozen.full(state.params),
            frozen.full(frozen.reference),
            first_batch,
        )

    def run(self, state: TrainState, step: int) -> tuple[TrainState, dict]:
        loaded, batch = next(self._ahead)
        assert loaded == step, f"step {step} was asked for, and step {loaded} is next"
        programs = self._job.programs
        state, metrics = programs.update(state, self._frozen, batch)
        block = self._job.block
        if stage_table.moves_reference(block) and (step + 1) % block.reference_every == 0:
            state = programs.move_reference(state, block.reference_mix)
        return state, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        if self._held_out is None:
            return {}
        frozen = self._frozen.beside(state)
        return evaluate(self._job.programs, self._job.mesh, state.params, frozen, self._held_out)

    def tokens(self, step: int) -> int:
        tokens = self._batches.tokens(step)
        mismatched = self._batches.mismatched
        return tokens if mismatched is None else tokens + mismatched.tokens(step)

    def flops(self, step: int) -> int:
        # A kept reference costs nothing here.
        return self._flops(step, self._frozen.reference is not None)

    def _flops(self, step: int, reference: bool) -> int:
        """Return the FLOPs of a step, with or without the forward pass of a fixed reference."""
        mismatched = self._batches.mismatched
        return flops.of_step(
            self._job.model,
            self._batches.contents(step),
            mismatched=None if mismatched is None else mismatched.contents(step),
            reference=reference or stage_table.moves_reference(self._job.block),
            # Under adapters no gradient of the base is made.
            frozen=self._job.lora is not None,
        )

    def work(self, step: int) -> costs.Work:
        # Kept log-probs count too: another run may have computed them, but this one needed them.
        is_kept = self._reference_log_probs is not None
        return costs.Work(
            examples=self._job.block.batch_size,
            read_tokens=self.tokens(step),
            flops=self._flops(step, is_kept or self._frozen.reference is not None),
        )

    def examples(self, step: int) -> list[str]:
        return [self._data.train.where[index] for index in self._batches.order[step]]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _load(self, step: int):
        """Return the batch of a step, on the mesh; called in a thread of its own."""
        return sharding.shard_batch(self._job.mesh, self._batches[step], axis=1)

    def _training_batches(self, seed: int | None, shuffled: str, group_pairs: int) -> Batches:
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
        groups = self._data.train.groups(group_pairs)
        is_grouped = shuffled == "prompts"
        order = training_order(size, block.batch_size, steps, seed, groups if is_grouped else None)
        shards = sharding.batch_shards(self._job.mesh)
        layout = dict(
            microbatches=microbatches_of(block, shards), shards=shards, limits=self._row_limits()
        )
        if STAGES[name].data == "unpaired":
            batches = unpaired(self._data.train, order, self._longest_mismatched, **layout)
            say_own_prompts(name, batches)
        else:
            kept = self._kept_log_probs("train", self._data.train, order)
            batches = Batches(self._data.train, order, **layout, reference_log_probs=kept)
        # Every shape is a program to compile, and padding is work for nothing: both are shown.
        padding = batches.padding()
        count = len(batches.shapes)
        shapes = f"{count} shape" if count == 1 else f"{count} shapes"
        say(
            f"{name}: {steps} steps of {block.batch_size} from {size} rows, {shapes}, "
            f"padding {padding['dense']:.1%} of tokens, {padding['attention']:.1%} of "
            "attention"
        )
        if is_grouped:
            say_what_cells_lose(name, block, batches, self._data.train, groups)
        elif seed is not None and groups.max() + 1 < size:
            say_what_groups_save(name, batches, self._data.train, groups, seed)
        say_uneven_shards(name, block, shards)
        say_plain_attention(name, self._job.model, self._job.mesh)
        most_tokens = max(shape.tokens for shape in batches.shapes)
        if gains_by_huge_pages(self._job.model, self._job.mesh, most_tokens):
            say_how_to_get_huge_pages()
        say_unfinished_warmup(name, block, steps)
        if stage_table.moves_reference(block):
            say_moves_in_vain(name, block, steps)
        return batches

    def _evaluation_batches(self) -> Batches | None:
        """Return batches of the held-out examples, as large as a microbatch; None without any."""
        block = self._job.block
        size = len(self._data.eval)
        if not size:
            return None
        # What fits in memory with a gradient fits without one.
        batch_size = sharding.whole_shards(microbatch_size_of(block), self._job.mesh)
        layout = dict(shards=sharding.batch_shards(self._job.mesh), limits=self._row_limits())
        if STAGES[self._job.name].data == "unpaired":
            longest = self._longest_mismatched
            return unpaired_evaluation(self._data.eval, batch_size, longest, **layout)
        prompt_ids, _ = self._data.eval.identities()
        order = evaluation_order(size, batch_size, prompt_ids)
        kept = self._kept_log_probs("eval", self._data.eval, order)
        return Batches(self._data.eval, order, **layout, reference_log_probs=kept)

    def _row_limits(self) -> RowLimits:
        return limits_of(self._job.model, self._job.mesh)

    def _kept_log_probs(self, split: str, examples, order: np.ndarray) -> np.ndarray | None:
        if self._reference_log_probs is None:
            return None
        return self._reference_log_probs(split, examples, order)


def say_own_prompts(name: str, batches: Batches) -> None:
    """Say where the batches have too few prompts for completions of other prompts."""
    own, rows = batches.mismatched.examples.own_prompts, batches.order.size
    if own > WORTH_SAYING * rows:
        say(
            f"{name}: {own:,} of {rows:,} rows are in batches of too few prompts, so the KL is "
            f"also measured on completions of their own. A larger config.{name}.batch_size, or "
            "--config.data.order=pairs, mixes more prompts."
        )


def say_moves_in_vain(name: str, block, steps: int) -> None:
    """Say where no step sees a moved reference, and where the last evaluation says nothing."""
    every = block.reference_every
    if every >= steps:
        say(
            f"{name}: the run ends before a step sees a moved reference "
            f"(config.{name}.reference_every = {every}, and {steps} steps), so the reference is "
            "fixed. Lower reference_every, unless this is intended."
        )
    if block.reference_mix == 1 and steps % every == 0:
        say(
            f"{name}: the reference becomes the policy after the last step too, so the last "
            "evaluation compares the policy with itself: its rewards are 0, and its loss is the "
            "same whatever was learned (log 2 for sigmoid)."
        )


def say_unfinished_warmup(name: str, block, steps: int) -> None:
    """Say where the run ends before its warm-up, so that it never has its learning rate."""
    if block.warmup_steps < steps:
        return
    reached = steps / (block.warmup_steps + 1)
    say(
        f"{name}: the run ends before its warm-up (config.{name}.warmup_steps = "
        f"{block.warmup_steps}), so the learning rate only reaches {reached:.0%} of "
        f"{block.lr:g}. Lower warmup_steps, unless this is intended."
    )


def say_uneven_shards(name: str, block, shards: int) -> None:
    """Say where an update has no equal part for each device that splits it: some would wait."""
    size, microbatches = update_size_of(block), microbatches_of(block, shards)
    cells = microbatches * shards
    if size % cells == 0:
        return
    uneven = f"{cells - size} have none" if size < cells else "some have one row less than others"
    field, multiple = "minibatch_size" if "minibatch_size" in block else "batch_size", cells
    # More rows would make more microbatches, each as uneven.
    if block.microbatch_size % shards and size > cells:
        field, multiple = "microbatch_size", shards
    say(
        f"{name}: the {size} rows of an update go to {cells} cells ({microbatches} x {shards}, "
        f"microbatches x data shards), so {uneven} and are padded. A multiple of {multiple} as "
        f"config.{name}.{field} uses all devices alike."
    )


def say_plain_attention(name: str, model, mesh) -> None:
    """Say why attention has no fused kernel on a GPU, where it has none."""
    if sharding.platform_of(mesh) != "gpu" or model.attention != "auto":
        return
    with jax.set_mesh(mesh):
        reason = attention.why_not_cudnn(
            model.dtype, model.head_width, model.attention_softcap, mesh.shape["context"]
        )
    if reason:
        say(f"{name}: attention runs by plain XLA, which takes more time and memory: {reason}.")


def say_what_cells_lose(name: str, block, batches: Batches, examples, groups: np.ndarray) -> None:
    """Say where cells are too small for the rows of a prompt, and at which sizes they are not.

    block: the stage's. examples: those of the batches. groups: the number of each one's group.
    """
    cells = batches.microbatches * batches.shards
    most_rows = int(np.bincount(groups).max())
    if cells == 1 or most_rows == 1 or not _is_lost(batches):
        return
    steps = len(batches)
    room = block.batch_size / cells
    rows = "1 row" if room == 1 else f"{room:g} rows"
    message = f"{name}: the {cells} cells of a step (microbatches x data shards) have {rows}"
    if room < most_rows:
        message += f" each, and prompts have up to {most_rows}"
    else:
        # Cells get about as many tokens each, which cuts a prompt that has many of a step's.
        message += " on average, as they are filled evenly"
    message += (
        f", so prompts are read more than once: {batches.reading().tokens / steps:,.0f} tokens a "
        f"step instead of {batches.tokens_in_one_cell() / steps:,.0f}"
    )
    say(message)

    here = _tried(examples, batches, block)
    found = {}  # the smallest change comes first; a larger one must be worth it
    best = here
    for size in range(microbatch_size_of(block) + 1, block.batch_size + 1):
        if block.batch_size % size or size % batches.shards:
            continue
        sizes = {"microbatch_size": size}
        other = _tried(examples, batches, block, sizes)
        if _tokens_per_row(other) < (1 - WORTH_SAYING) * _tokens_per_row(best):
            best = other
            found = sizes
    if found:
        effect = "changes no update, takes more memory"
        say(f"{name}: {_flags(name, found)} {effect}, and {_told(best, here)}")
    sizes = sizes_for_whole_groups(block, batches.shards, most_rows)
    if "batch_size" not in sizes or sizes["batch_size"] > batches.order.size:
        return
    if found and not _is_lost(best):
        return
    other = _tried(examples, batches, block, sizes)
    if _tokens_per_row(other) < (1 - WORTH_SAYING) * _tokens_per_row(best):
        say(f"{name}: {_flags(name, sizes)} makes fewer updates an epoch, and {_told(other, here)}")


def say_what_groups_save(name: str, batches: Batches, examples, groups, seed: int) -> None:
    """Say what the other order of the data would read, where that is notably less.

    batches: whose examples are shuffled one by one. groups: the number of each example's group.
    """
    steps = min(len(batches), TRIED_STEPS)
    grouped = Batches(
        examples,
        training_order(len(examples), batches.order.shape[1], steps, seed, groups),
        microbatches=batches.microbatches,
        shards=batches.shards,
    )
    reading = batches.reading()
    # The first steps of the other order have other examples, perhaps longer ones.
    share = grouped.reading().tokens / grouped.reading().tokens_one_at_a_time
    tokens = share * reading.tokens_one_at_a_time
    if tokens <= (1 - WORTH_SAYING) * reading.tokens:
        say(
            f"{name}: --config.data.order=prompts would keep the rows of a prompt together, and "
            f"read about {tokens / len(batches):,.0f} tokens a step instead of "
            f"{reading.tokens / len(batches):,.0f}"
        )


def _tried(examples, batches: Batches, block, sizes: dict[str, int] | None = None) -> Batches:
    """Return the first of some batches as they would be with other sizes of a stage's block."""
    changed = copy.deepcopy(block)
    changed.update(sizes or {})
    batch_size = changed.batch_size
    # Batches are cut from one stream of examples, whatever their size.
    stream = batches.order.ravel()
    steps = min(len(stream) // batch_size, TRIED_STEPS)
    return Batches(
        examples,
        stream[: steps * batch_size].reshape(steps, batch_size),
        microbatches=microbatches_of(changed, batches.shards),
        shards=batches.shards,
    )


def _is_lost(batches: Batches) -> bool:
    reading = batches.reading()
    whole = batches.tokens_in_one_cell()
    return is_sharing_lost(reading.tokens, reading.tokens_one_at_a_time, whole)


def _tokens_per_row(batches: Batches) -> float:
    return batches.reading().tokens / batches.order.size


def _flags(name: str, sizes: dict[str, int]) -> str:
    return " ".join(f"--config.{name}.{field}={size}" for field, size in sizes.items())


def _told(other: Batches, here: Batches) -> str:
    return (
        f"reads about {_tokens_per_row(other):,.0f} tokens a row instead of "
        f"{_tokens_per_row(here):,.0f}"
    )


def gains_by_huge_pages(model: TransformerConfig, mesh: jax.sharding.Mesh, tokens: int) -> bool:
    """Return whether steps on `tokens` tokens would be faster with huge pages, and could have them.

    They do nothing for an accelerator, and for steps whose memory glibc keeps anyway.
    """
    is_cpu = sharding.platform_of(mesh) == "cpu"
    is_large = tokens * model.layers * model.width >= GAINS_BY_HUGE_PAGES
    return is_cpu and is_large and hardware.lacks_huge_pages()


def say_how_to_get_huge_pages() -> None:
    """Say what huge pages bring, and the line to type: once in a process, whatever it trains."""
    say_once(
        "huge pages would shorten steps on this CPU by a fifth to a quarter: type "
        f"`export {hardware.HUGE_PAGES}` and start again"
    )


def evaluate(
    programs: Programs, mesh, params: dict, frozen: Frozen, batches: Batches
) -> dict[str, float]:
    """Return metrics over all batches, each example weighted alike, and by subset too.

    batches: of one microbatch each; examples that only fill up the last one count for nothing.
    """
    # Adapters are laid over their base once, not for each batch.
    full = frozen.full(params)
    reference = frozen.full(frozen.reference)
    hyper = frozen.hyper
    if batches.mismatched is not None:
        first_pass = functools.partial(programs.first_pass, full, reference, hyper)
        total = None
        for sums in _measured(first_pass, mesh, batches.mismatched):
            total = metrics_lib.add(total, sums)
        hyper = hyper | means(total)
    measure = functools.partial(programs.eval_step, full, reference, hyper)
    total = None
    found = []
    for sums, of_each in _measured(measure, mesh, batches):
        total = metrics_lib.add(total, sums)
        found.append(of_each)
    values = metrics_lib.named(total, "eval")
    if isinstance(batches.examples, Examples):
        prompts_P, _ = batches.examples.identities()
        of_each = _by_example(found, batches)
        values |= metrics_lib.detailed(of_each, batches.examples.subsets, prompts_P)
    return values


def _measured(measure: Callable, mesh, batches: Batches) -> Iterator:
    """Yield what is measured of each batch; measure: a batch on the mesh -> arrays there."""
    before, last = None, None
    for step in range(len(batches)):
        if jax.process_count() > 1:
            # A signal is asked for here, so the host must not be far ahead of the devices. One
            # batch is left to them meanwhile.
            jax.block_until_ready(before)
            before = last
        stopping.may_stop()
        batch = sharding.shard_batch(mesh, batches.without_mismatched(step), axis=1)
        last = measure(batch)
        yield last


def _by_example(found: list[dict], batches: Batches) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {name: (value, count)} of each example, [P], from those of all batches, [S, P]."""
    of_each = {}
    for step, of_batch in enumerate(jax.device_get(found)):
        cells_SP = batches.indices(step).reshape(batches.shards, -1)
        for name, parts in of_batch.items():
            if name not in of_each:
                of_each[name] = tuple(np.zeros(len(batches.examples)) for _ in parts)
            for into, part_SP in zip(of_each[name], parts, strict=True):
                for cell, values in zip(cells_SP, part_SP, strict=True):
                    index = cell[cell != FILLER]  # they come first in their cell
                    into[index] = values[: len(index)]
    return of_each
