"""Rows of text to token ids, under one rule for training, evaluation and sampling.

Prompt and responses are tokenised apart: a response is what the model is asked to write after the
prompt's own tokens. BOS comes once, before the prompt, where the tokenizer itself puts one; EOS
once, at the end of each response. A response that is cut loses its EOS, and no false one is put
there. An empty prompt is one BOS (or EOS, where there is no BOS), so that the first response token
is predicted from something. Chat goes through the tokenizer's own template, which places the
special tokens.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpo_jax.data.ledger import Counts, Unusable
from dpo_jax.data.sources import Row, Text

# The version of the rule that makes ids of text. Raise it with every change that gives some row
# other ids, a template's rendering and a cut included: an unfinished stage is then refused, not
# resumed.
TOKENIZATION_VERSION = 1

BATCH = 1000  # rows tokenised in one call
# of a prompt's end, which hold the cue for the answer: what keep_cue leaves beside the start
CUE_TOKENS = 16


@dataclass
class Examples:
    """Tokenised rows, a sequence of (prompt, responses): int32 ids, one response for SFT, two for
    pairs.
    """

    prompts: list[np.ndarray] = field(default_factory=list)
    responses: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index):
        """Return one example, or the Examples of a slice or of a list of indices."""
        if isinstance(index, int | np.integer):
            return self.prompts[index], self.responses[index]
        indices = range(len(self))[index] if isinstance(index, slice) else list(index)
        return Examples(
            [self.prompts[i] for i in indices],
            [self.responses[i] for i in indices],
            [self.where[i] for i in indices],
        )

    def __iter__(self):
        return zip(self.prompts, self.responses, strict=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of all ids and of where each prompt and response ends; rows are whole before
        it is asked for.
        """
        numbers = []
        for prompt, responses in self:
            parts = (prompt, *responses)
            numbers += [[len(parts), *map(len, parts)], *parts]
        return hashlib.sha256(np.concatenate(numbers or [[]]).astype("<i4").tobytes()).hexdigest()


def load(path):
    """The tokenizer in a local folder, in Hugging Face's format.

    Raises FileNotFoundError when there is no such folder, or no tokenizer in it that can be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is not a folder; a tokenizer is loaded from a local folder."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"{str(path)!r} has no tokenizer that transformers can load. Expected tokenizer_config.json with "
            f"tokenizer.json, or with vocab.json and merges.txt. transformers says: {error}"
        ) from error


@dataclass(frozen=True)
class Rule:
    """How the ids of a text become a prompt or a response: special tokens, and room."""

    bos: int | None
    adds_bos: bool  # the tokenizer itself starts a text with BOS
    eos: int | None
    append_eos: bool
    max_length: int
    max_prompt_length: int
    truncate: str  # which part of a too long prompt stays: "keep_start", "keep_end" or "keep_cue"


def encode(rows: list[Row], tokenizer, data, truncate: str, counts: Counts) -> Examples:
    """Tokenises rows and cuts them to data.max_length; rows that cannot be used are dropped and
    counted.

    `truncate` says which part of a too long prompt stays: "keep_start", "keep_end" or "keep_cue".
    Raises ValueError when the settings, the tokenizer or its chat template cannot do what is asked.
    """
    rule = _rule(tokenizer, data, truncate)
    examples = Examples()
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = [_texts(row, tokenizer) for row in batch]
        ids = iter(_ids(itertools.chain.from_iterable(texts), tokenizer))
        parts = [list(itertools.islice(ids, len(text))) for text in texts]  # prompt, then responses
        if start == 0:
            _count_merges(texts, parts, tokenizer, counts)
        for row, (prompt, *responses) in zip(batch, parts, strict=True):
            try:
                _add(examples, row, prompt, responses, rule, counts)
            except Unusable as reason:
                counts.drop(str(reason), row.where)
    counts.kept = len(examples)
    counts.mean_tokens = _mean_tokens(examples)
    return examples


def encode_prompts(prompts: list[Text], tokenizer, data, truncate: str) -> list[np.ndarray]:
    """Prompts to sample from: started as `encode` starts them, and cut to
    data.max_prompt_length.
    """
    rule = _rule(tokenizer, data, truncate)
    ids = _ids([_template(prompt, tokenizer) for prompt in prompts], tokenizer)
    return [
        np.array(_cut_prompt(_started(prompt, tokens, rule), rule), np.int32)
        for prompt, tokens in zip(prompts, ids, strict=True)
    ]


def encode_row_prompts(rows: list[Row], tokenizer, data, truncate: str) -> list[np.ndarray]:
    """The prompts of all rows, to sample from, as `encode` has them: cut where with their responses
    they pass data.max_length.
    """
    rule, found = _rule(tokenizer, data, truncate), []
    texts = [_texts(row, tokenizer) for row in rows]
    ids = iter(_ids(itertools.chain.from_iterable(texts), tokenizer))
    for row, text in zip(rows, texts, strict=True):
        prompt, *responses = itertools.islice(ids, len(text))
        ended = [
            response + [rule.eos] * (rule.append_eos and response[-1:] != [rule.eos])
            for response in responses
        ]
        found.append(np.array(cut(_started(row.prompt, prompt, rule), ended, rule)[0], np.int32))
    return found


def cut(
    prompt: list[int], responses: list[list[int]], rule: Rule
) -> tuple[list[int], list[list[int]]]:
    """(prompt, responses) within max_length: the prompt is cut first, then what is still too long.

    Both responses keep the same prompt, and the prompt its BOS.
    """
    if len(prompt) + max(map(len, responses)) <= rule.max_length:
        return prompt, responses
    prompt = _cut_prompt(prompt, rule)
    return prompt, [response[: rule.max_length - len(prompt)] for response in responses]


def _cut_prompt(prompt: list[int], rule: Rule) -> list[int]:
    excess = max(len(prompt) - rule.max_prompt_length, 0)
    if rule.truncate == "keep_start":
        return prompt[: len(prompt) - excess]
    head = int(prompt[0] == rule.bos)
    if rule.truncate == "keep_cue":
        head = max(head, rule.max_prompt_length - CUE_TOKENS)
    return prompt[:head] + prompt[head + excess :]


def _add(
    examples: Examples, row: Row, prompt: list, responses: list[list], rule: Rule, counts: Counts
):
    """Appends a row with its special tokens, cut to length; Unusable when it cannot be scored."""
    if isinstance(row.prompt, str) and rule.eos in prompt:
        raise Unusable("EOS inside the text")
    if isinstance(row.prompt, str) and rule.adds_bos and rule.bos in prompt[1:]:
        raise Unusable("BOS inside the text")
    full_prompt = _started(row.prompt, prompt, rule)
    full = [_ended(row.prompt, response, rule) for response in responses]
    prompt, responses = cut(full_prompt, full, rule)
    if len(responses) == 2 and responses[0] == responses[1]:
        raise Unusable("chosen and rejected are equal in tokens, or once cut")
    shortened = [
        whole for whole, kept in zip(full, responses, strict=True) if len(kept) < len(whole)
    ]
    counts.prompts_truncated += len(prompt) < len(full_prompt)
    counts.responses_truncated += len(shortened)
    counts.eos_lost += sum(whole[-1] == rule.eos for whole in shortened)
    examples.prompts.append(np.array(prompt, np.int32))
    examples.responses.append(tuple(np.array(response, np.int32) for response in responses))
    examples.where.append(row.where)


def _started(prompt: Text, ids: list[int], rule: Rule) -> list[int]:
    """A prompt's ids behind what the tokenizer starts a text with, once; a chat template has put
    that itself.
    """
    if isinstance(prompt, list) and ids:
        return ids
    if rule.adds_bos:
        return ids if ids[:1] == [rule.bos] else [rule.bos, *ids]
    stand_in = rule.eos if rule.bos is None else rule.bos
    if not ids and stand_in is None:
        raise ValueError(
            "a prompt is empty, and the tokenizer has neither BOS nor EOS to stand for it: give "
            "every row a prompt, or set bos_token in tokenizer_config.json."
        )
    return ids or [stand_in]


def _ended(prompt: Text, ids: list[int], rule: Rule) -> list[int]:
    """A response's ids with one EOS, at the end; Unusable when it is empty or has another EOS
    inside.
    """
    ended = isinstance(prompt, list) and ids[-1:] == [rule.eos]
    body = ids[:-1] if ended else ids
    if not body:
        raise Unusable("response without tokens")
    if rule.adds_bos and rule.bos in body and isinstance(prompt, str):
        raise Unusable("BOS inside the text")
    if rule.eos in body:
        raise Unusable("EOS inside the text")
    return [*body, rule.eos] if ended or rule.append_eos else body


def _texts(row: Row, tokenizer) -> tuple[str, ...]:
    """The prompt and the responses as the texts to tokenise; chat is rendered by the tokenizer's
    template.
    """
    if isinstance(row.prompt, str):
        return row.prompt, *row.responses
    prompt = _template(row.prompt, tokenizer, row.where)
    texts = [prompt]
    for response in row.responses:
        whole = _template([*row.prompt, *response], tokenizer, row.where, answered=True)
        if not whole.startswith(prompt):
            raise ValueError(
                f"{row.where}: the chat template renders the conversation otherwise than its prompt, so the "
                f"response cannot be told apart. Prompt: {prompt!r}; conversation: {whole!r}. Use a template "
                "whose generation prompt is how an answer begins."
            )
        texts.append(_without_tail(whole[len(prompt) :], tokenizer.eos_token))
    return tuple(texts)


def _template(prompt: Text, tokenizer, where: str = "a prompt", answered: bool = False) -> str:
    """A prompt (or an answered conversation) as text; plain text stays as it is."""
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} holds chat messages, but the tokenizer has no chat template. Use a model "
            "with one (chat_template.jinja beside tokenizer_config.json), or plain text."
        )
    try:
        return tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=not answered
        )
    except Exception as error:  # whatever the template raises: it is a program of its own
        raise ValueError(
            f"{where}: the chat template refuses this conversation: {error}"
        ) from error


def _without_tail(text: str, eos: str | None) -> str:
    """The text without the white space that some templates put behind the EOS."""
    stripped = text.rstrip()
    return stripped if eos and stripped.endswith(eos) else text


def _ids(texts: Iterable[str], tokenizer) -> list[list[int]]:
    texts = list(texts)
    return (
        tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
        if texts
        else []
    )


def _count_merges(texts: list[tuple], parts: list[list], tokenizer, counts: Counts):
    """Counts the responses whose first tokens would be others if prompt and response were one
    text.
    """
    apart = [prompt + response for prompt, *responses in parts for response in responses]
    joined = _ids(
        [prompt + response for prompt, *responses in texts for response in responses], tokenizer
    )
    counts.boundaries = len(joined)
    counts.boundary_merges = sum(ids != whole for ids, whole in zip(apart, joined, strict=True))


def _mean_tokens(examples: Examples) -> dict[str, float]:
    """Mean lengths of the prompts and of each kind of response."""
    if not examples:
        return {}
    prompt, *responses = (
        float(np.mean([len(ids) for ids in part]))
        for part in (examples.prompts, *zip(*examples.responses, strict=True))
    )
    if len(responses) == 1:
        return {"prompt": prompt, "completion": responses[0]}
    chosen, rejected = responses
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen minus rejected": chosen - rejected,
    }


def _rule(tokenizer, data, truncate: str) -> Rule:
    """The rule that settings and tokenizer make; ValueError when they do not go together."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if truncate not in ("keep_start", "keep_end", "keep_cue"):
        raise ValueError(
            f"data.truncate={truncate!r} is not one of auto, keep_start, keep_end, keep_cue."
        )
    if not 0 < data.max_prompt_length < data.max_length:
        raise ValueError(
            f"data.max_prompt_length={data.max_prompt_length} must be at least 1 and less than "
            f"data.max_length={data.max_length}, to leave room for a response."
        )
    if data.append_eos and eos is None:
        raise ValueError(
            "the tokenizer has no EOS token, which data.append_eos=True needs: set eos_token in "
            "its tokenizer_config.json, or pass --config.data.append_eos=False."
        )
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return Rule(
        bos, adds_bos, eos, data.append_eos, data.max_length, data.max_prompt_length, truncate
    )
