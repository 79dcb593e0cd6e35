"""The examples that a plan makes up, and what they share on a mesh.

A prompt with several pairs is read once, and so is each of its responses, but only within a cell: a
microbatch on one shard. Where a cell holds fewer pairs than a prompt has, sharing is lost.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from dpo_jax import stage_table
from dpo_jax.data.batches import (
    Batches,
    microbatch_size_of,
    microbatches_of,
    sizes_for_whole_groups,
    unpaired,
    update_size_of,
)
from dpo_jax.data.examples import Examples
from dpo_jax.data.packing import ANY_ROWS, RolloutTargets, RowLimits
from dpo_jax.data.rows import Numbers
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.planning.report import Sharing, Suggestion
from dpo_jax.stage_table import STAGES

# A made-up run has no more steps than this. Its batches are cut from groups at the same places over
# and over, and so few steps never pay for a second shape.
MOST_STEPS = 8
MOST_TENSOR = 8  # tensor parallelism stays within a machine
# A suggestion must save this share of what the cells compute.
WORTH_SAYING = 0.1


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and its pairs, all of the same lengths."""

    prompt_tokens: int
    response_tokens: int
    pairs: int = 1
    responses: int = 2

    def __post_init__(self):
        if self.pairs < 1 or self.responses < 2:
            raise ValueError(
                f"{self.pairs} pairs of {self.responses} responses a prompt: expected at least 1 "
                "pair (--pairs_per_prompt) and 2 responses (--responses_per_prompt)."
            )
        most = math.comb(self.responses, 2)
        if not self.responses <= 2 * self.pairs <= 2 * most:
            raise ValueError(
                f"{self.pairs} pairs a prompt cannot be made of {self.responses} responses, which "
                f"make {-(-self.responses // 2)} to {most}. Change --pairs_per_prompt or "
                "--responses_per_prompt."
            )

    def index_pairs(self) -> list[tuple[int, int]]:
        """Return the pairs as indices of responses; every response is in one of them."""
        candidates = list(itertools.combinations(range(self.responses), 2))
        chosen = []
        used = set()
        for _ in range(self.pairs):
            # The first of those that bring in most responses.
            best = max(candidates, key=lambda pair: len(set(pair) - used))
            candidates.remove(best)
            chosen.append(best)
            used |= set(best)
        return sorted(chosen)


def group_of(config: ConfigDict, stage: str, assumed) -> Group:
    """Return the prompts and pairs that a stage trains on: as assumed, or as the config says.

    assumed: `planner.Assumptions`. Lengths that neither tells are the longest that are allowed. A
    run that samples its own pairs makes them as config.pairs says; other data is taken to have one
    pair a prompt.

    Raises ValueError if prompt and response are longer than config.data.max_length, or if pairs are
    assumed of a stage whose examples stand alone.
    """
    data = config.data
    longest_prompt = data.max_prompt_length
    longest_response = data.max_length - data.max_prompt_length
    pairs = assumed.pairs_per_prompt
    responses = assumed.responses_per_prompt
    is_sampled = STAGES[stage].samples or stage_table.trains_on_samples(config, stage)
    if is_sampled:
        longest_prompt = config.sampling.max_prefix or data.max_prompt_length
        longest_response = config.sampling.max_new_tokens
    if stage_table.trains_on_samples(config, stage) and not pairs:
        responses = responses or stage_table.completions_in_pairs(config)
    prompt = assumed.prompt_tokens or longest_prompt
    response = assumed.response_tokens or longest_response
    # What is sampled is as long as config.sampling says, and is not cut.
    if prompt + response > data.max_length and not STAGES[stage].samples:
        raise ValueError(
            f"a prompt of {prompt} tokens and a response of {response} make {prompt + response}, "
            f"but examples are cut to config.data.max_length = {data.max_length}. Lower "
            "--prompt_tokens or --response_tokens, or raise config.data.max_length."
        )
    if not stage_table.trains_in_groups(config, stage):
        if pairs or responses:
            raise ValueError(
                f"--pairs_per_prompt and --responses_per_prompt say nothing about the stage {stage}"
                ", which trains on single responses, each with its own prompt. Leave them out."
            )
        return Group(prompt, response)
    if not pairs:
        pairs = math.comb(responses, 2) if responses else 1
    if not responses:
        responses = _fewest_responses(pairs)
    return Group(prompt, response, pairs, responses)


def _fewest_responses(pairs: int) -> int:
    """Return of how many responses so many pairs can be made."""
    responses = 2
    while math.comb(responses, 2) < pairs:
        responses += 1
    return responses


def examples_of(config: ConfigDict, stage: str, group: Group) -> list[tuple[int, ...]]:
    """Return the examples that a stage makes of a prompt's pairs, each as indices of responses."""
    if _splits_pairs(config, stage):
        return [(response,) for pair in group.index_pairs() for response in pair]
    responses = STAGES[stage].responses  # 1: the chosen one of each pair
    examples = [pair[:responses] for pair in group.index_pairs()]
    if config[stage].get("distinct", False):
        examples = list(dict.fromkeys(examples))
    return examples


def _splits_pairs(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage trains on both responses of the run's own pairs, one by one."""
    is_unpaired = STAGES[stage].kind == "unpaired"
    return is_unpaired and stage_table.trains_on_samples(config, stage)


def pairs_together(config: ConfigDict, stage: str, group: Group) -> int:
    """Return how many examples of a prompt follow each other in the run's order of the data."""
    pairs = len(examples_of(config, stage, group))
    if not config.data.shuffle:
        return pairs  # as in the file, which is taken to have them together
    if config.data.order == "prompts":
        return min(pairs, config.data.group_pairs)
    return 1


def lay_out(
    config: ConfigDict, stage: str, group: Group, shards: int, limits: RowLimits = ANY_ROWS
) -> Batches:
    """Return batches of made-up examples, laid out as the run lays out its own.

    shards: that split a batch. limits: of attention's rows.
    """
    block = config[stage]
    batch_size = update_size_of(block)
    together = pairs_together(config, stage, group)
    # After so many steps a batch begins with a prompt again.
    steps = min(together // math.gcd(batch_size, together), MOST_STEPS)
    size = steps * batch_size
    reference_log_probs = None
    if stage_table.keeps_reference(config, stage):
        reference_log_probs = np.zeros((size, 2), np.float32)
    # Target margins are an input of the program, where the run has them.
    has_margins = bool(config.data.margin) and stage_table.reads_pairs(config, stage)
    numbers = Numbers(target_margin=0.0 if has_margins else None)
    is_unpaired = STAGES[stage].kind == "unpaired"
    # Whatever their labels are: the program is the same.
    of_row = dict(where="made up", numbers=numbers, label=True if is_unpaired else None)
    of_prompt = examples_of(config, stage, group)
    examples = _made_up_examples(group, of_prompt, together, size, of_row)
    order = np.arange(size).reshape(steps, batch_size)
    layout = dict(microbatches=microbatches_of(block, shards), shards=shards, limits=limits)
    if is_unpaired:
        return unpaired(examples, order, config.data.max_length, **layout)
    if STAGES[stage].samples:
        # As in PPO, whose updates learn from numbers of each token of a completion.
        of_tokens = [np.zeros(group.response_tokens, np.float32)] * size
        rollout = RolloutTargets(*[of_tokens] * len(dataclasses.fields(RolloutTargets)))
        return Batches(examples, order, **layout, share=False, rollout=rollout)
    return Batches(examples, order, **layout, reference_log_probs=reference_log_probs)


def _made_up_examples(
    group: Group,
    of_prompt: list[tuple[int, ...]],
    together: int,
    size: int,
    of_row: dict,
) -> Examples:
    """Return so many examples of whole groups, one after the other.

    of_prompt: those of each prompt, as indices of its responses. together: how many of them follow
    each other; a prompt's others are so far away that they count as another prompt's. of_row: what
    `Examples.append` takes beside the tokens.
    """
    examples = Examples()
    # Texts are told apart by their tokens: each consists of its own number.
    tokens = itertools.count()
    while True:
        for first in range(0, len(of_prompt), together):
            prompt = np.full(group.prompt_tokens, next(tokens))
            for responses in of_prompt[first : first + together]:
                if len(examples) == size:
                    return examples
                texts = [np.full(group.response_tokens, index) for index in responses]
                examples.append(prompt, texts, **of_row)


def sharing(
    config: ConfigDict, stage: str, model: TransformerConfig, group: Group, batches: Batches
) -> Sharing:
    """Return what the made-up examples share in a layout, and what would let them share more."""
    steps = len(batches)
    reading = batches.reading()
    whole = batches.tokens_in_one_cell()
    return Sharing(
        tokens=reading.tokens / steps,
        apart=reading.tokens_one_at_a_time / steps,
        whole=whole / steps,
        computed=_computed(batches),
        pairs_together=pairs_together(config, stage, group),
        cells=batches.microbatches * batches.shards,
        suggestions=_suggestions(config, stage, model, group, batches),
    )


def _computed(batches: Batches) -> int:
    """Return the tokens of all cells of a step, with their padding: the work of a step."""
    return batches.microbatches * batches.shards * batches.shapes[-1].tokens


def _suggestions(
    config: ConfigDict, stage: str, model: TransformerConfig, group: Group, batches: Batches
) -> list[Suggestion]:
    """Return other sizes and meshes at which a pair is less work; each is tried out.

    There is at most one of each kind: the order of the data; microbatches alone, which change no
    update; the batch; and the mesh. Where the order is of pairs, the others come on top of it.
    """
    here = _computed(batches) / update_size_of(config[stage])
    grouped = config
    by_order = {}
    kinds = []  # of changes, and the tokens a pair that they must beat
    start = here
    if config.data.shuffle and config.data.order == "pairs":
        by_order = {"data.order": "prompts"}
        grouped = copy.deepcopy(config)
        grouped.update_from_flattened_dict(by_order)
        kinds.append(([({}, batches.shards)], here))
        in_groups = lay_out(grouped, stage, group, batches.shards, batches.limits)
        start = _computed(in_groups) / config[stage].batch_size
    if pairs_together(grouped, stage, group) == 1:
        return []
    kinds += [
        (_larger_microbatches(grouped, stage, batches.shards), start),
        (_whole_groups(grouped, stage, group, batches.shards), start),
        (_fewer_shards(grouped, model, batches.shards), start),
    ]
    suggestions = []
    for changes, best in kinds:
        suggestion = None
        for change, shards in changes:
            changed = copy.deepcopy(grouped)
            changed.update_from_flattened_dict(change)
            other = lay_out(changed, stage, group, shards, batches.limits)
            per_pair = _computed(other) / changed[stage].batch_size
            # The smallest change comes first; a larger one must be worth it.
            if per_pair < (1 - WORTH_SAYING) * best:
                best = per_pair
                fields = by_order | change
                flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
                tokens = other.reading().tokens / len(other)
                suggestion = Suggestion(flags, here, per_pair, tokens)
        if suggestion:
            suggestions.append(suggestion)
    return suggestions


def _larger_microbatches(config: ConfigDict, stage: str, shards: int) -> Iterator[tuple]:
    """Yield (change, shards) of the same batch in fewer microbatches, the smallest change first."""
    batch_size = config[stage].batch_size
    for size in range(microbatch_size_of(config[stage]) + 1, batch_size + 1):
        if batch_size % size == 0 and size % shards == 0:
            yield {f"{stage}.microbatch_size": size}, shards


def _whole_groups(config: ConfigDict, stage: str, group: Group, shards: int) -> Iterator[tuple]:
    """Yield (change, shards) of the batch that gives each cell whole groups."""
    sizes = sizes_for_whole_groups(config[stage], shards, pairs_together(config, stage, group))
    if "batch_size" in sizes:  # microbatches alone are another kind
        yield {f"{stage}.{name}": size for name, size in sizes.items()}, shards


def _fewer_shards(config: ConfigDict, model: TransformerConfig, shards: int) -> Iterator[tuple]:
    """Yield (change, shards) of meshes whose tensor axis takes chips from the batch's axes."""
    tensor = 2 * config.mesh.tensor
    experts = config.mesh.expert
    while tensor <= MOST_TENSOR and shards // experts % 2 == 0 and model.heads % tensor == 0:
        shards //= 2
        yield {"mesh.data": 1, "mesh.fsdp": shards // experts, "mesh.tensor": tensor}, shards
        tensor *= 2
