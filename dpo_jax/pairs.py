"""The `pairs` stage: completions of a model, labelled by a reward, as preference pairs."""

import json
import os
import pathlib

import jax

from dpo_jax import stages
from dpo_jax.data import toy
from dpo_jax.evaluation import exact
from dpo_jax.metrics import say

EVAL_PROMPTS = 100  # prompts of the held-out pairs


def make_toy_pairs(model, params, block, seed: int, folder: pathlib.Path) -> dict:
    """Pairs of the toy's completions, drawn from the model's exact distribution: pairs.jsonl and pairs_eval.jsonl.

    block: the stage's config. The ledger counts the pairs that were left out, by reason.
    """
    logps_PC = exact.enumerate_logps(model.config, params, toy.PROMPTS)
    ledger = {}
    for offset, (name, prompts) in enumerate({"pairs": block.prompts, "pairs_eval": EVAL_PROMPTS}.items()):
        pairs, left_out = toy.sample_pairs(logps_PC, 2 * seed + offset, prompts=prompts,
                                           completions=block.completions, labels=block.labels)
        _write(folder / f"{name}.jsonl", pairs)
        agreeing = sum(pair["reward_chosen"] > pair["reward_rejected"] for pair in pairs)
        ledger[name] = dict(prompts=prompts, completions=prompts * block.completions, pairs=len(pairs),
                            left_out=left_out, chosen_has_higher_reward=agreeing)
        say(f"pairs: {len(pairs)} pairs from {prompts} prompts in {name}.jsonl, "
            f"{agreeing / len(pairs):.0%} of them with the higher reward chosen; left out: {left_out}")
    stages.write_json(folder / "ledger.json", ledger)
    return dict(pairs=ledger["pairs"]["pairs"])


def _write(path: pathlib.Path, rows: list[dict]) -> None:
    if jax.process_index() == 0:
        draft = path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(draft, path)
