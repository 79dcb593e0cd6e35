"""Text examples to token ids, under one rule for training, evaluation and sampling.

Prompt and responses are tokenised apart: a response is what the model is asked to write after the
prompt's own tokens. BOS comes once, before the prompt, where the tokenizer itself puts one. EOS
comes once, at the end of each response; a response that is cut loses it, and gets no false one. An
empty prompt is one BOS (or EOS, where there is no BOS), so that the first response token is
predicted from something. Chat goes through the tokenizer's own template, which places the special
tokens.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import Counts, Unusable
from dpo_jax.data.rows import Text, TextExample

# The version of the rule that makes ids of text. Raise it with every change that gives some row
# other ids, a template's rendering and a cut included: an unfinished stage is then refused, not
# resumed.
TOKENIZATION_VERSION = 1

BATCH = 1000  # examples tokenised in one call

# How many tokens of the prompt's end, which hold the cue for the answer, keep_cue leaves.
CUE_TOKENS = 16

Prompt = list[int]
Responses = list[list[int]]


def load(path):
    """Load the tokenizer in a local folder, in Hugging Face's format.

    Raises FileNotFoundError where there is no such folder, or no tokenizer in it that can be read.
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
            f"{str(path)!r} has no tokenizer that transformers can load. Expected "
            "tokenizer_config.json with tokenizer.json, or with vocab.json and merges.txt. "
            f"transformers says: {error}"
        ) from error


@dataclass(frozen=True)
class Rule:
    """The rule by which ids become a prompt or a response: special tokens and lengths."""

    bos: int | None
    adds_bos: bool  # the tokenizer itself starts a text with BOS
    eos: int | None
    append_eos: bool
    max_length: int  # of a prompt and one response
    max_prompt_length: int  # of a prompt, where the two are longer
    truncate: str  # which part of a too long prompt stays: "keep_start", "keep_end" or "keep_cue"


def encode(texts: Iterable[TextExample], tokenizer, data, truncate: str) -> tuple[Examples, Counts]:
    """Tokenise examples and cut them to data.max_length.

    Returns those that can be used, and what became of all: kept, cut, and dropped by reason.
    truncate: which part of a too long prompt stays, "keep_start", "keep_end" or "keep_cue". Raises
    ValueError where the settings, the tokenizer or its chat template cannot do what is asked.
    """
    encoder = Encoder(tokenizer, data, truncate)
    for text in texts:
        encoder.add(text)
    return encoder.finish()


class Encoder:
    """`encode` for examples that come one by one, of which few are in memory as text."""

    def __init__(self, tokenizer, data, truncate: str):
        self._tokenizer = tokenizer
        self._rule = _rule(tokenizer, data, truncate)
        self._examples = Examples()
        self._counts = Counts()
        self._waiting: list[TextExample] = []  # for enough to tokenise in one call, which is fast

    def add(self, text: TextExample) -> None:
        """Add an example."""
        self._waiting.append(text)
        if len(self._waiting) == BATCH:
            self._encode_waiting()

    def finish(self) -> tuple[Examples, Counts]:
        """Return all examples that can be used, and what became of those that were added."""
        self._encode_waiting()
        self._counts.kept = len(self._examples)
        self._counts.mean_tokens = _mean_tokens(self._examples)
        return self._examples, self._counts

    def _encode_waiting(self) -> None:
        batch = self._waiting
        self._waiting = []
        parts = [_parts(text, self._tokenizer) for text in batch]
        ids = _ids_of_parts(parts, self._tokenizer)
        # The first batch is sample enough for a warning, and the merges cost as much as tokenising.
        if not self._counts.boundaries:
            _count_merges(parts, ids, self._tokenizer, self._counts)
        for text, (prompt, *responses) in zip(batch, ids, strict=True):
            try:
                _append(self._examples, text, prompt, responses, self._rule, self._counts)
            except Unusable as reason:
                self._counts.drop(str(reason), text.where)


def encode_prompts(prompts: Sequence[Text], tokenizer, data, truncate: str) -> list[np.ndarray]:
    """Return prompts to sample from, which start as `encode` starts them.

    They are cut to data.max_prompt_length.
    """
    rule = _rule(tokenizer, data, truncate)
    ids = _ids([_template(prompt, tokenizer) for prompt in prompts], tokenizer)
    found = []
    for prompt, tokens in zip(prompts, ids, strict=True):
        found.append(np.array(_cut_prompt(_started(prompt, tokens, rule), rule), np.int32))
    return found


def encode_example_prompts(
    texts: Sequence[TextExample], tokenizer, data, truncate: str
) -> list[np.ndarray]:
    """Return the prompts of all examples, to sample from, exactly as `encode` has them.

    That is, cut where they pass data.max_length together with their responses.
    """
    rule = _rule(tokenizer, data, truncate)
    parts = [_parts(text, tokenizer) for text in texts]
    found = []
    for text, (prompt, *responses) in zip(texts, _ids_of_parts(parts, tokenizer), strict=True):
        # EOS counts in the length by which a prompt is cut, so it is added first. Unlike `_ended`,
        # this drops no example: each prompt here is wanted.
        ended = []
        for response in responses:
            adds_eos = rule.append_eos and response[-1:] != [rule.eos]
            ended.append([*response, rule.eos] if adds_eos else response)
        prompt, _ = cut(_started(text.prompt, prompt, rule), ended, rule)
        found.append(np.array(prompt, np.int32))
    return found


def cut(prompt: Prompt, responses: Responses, rule: Rule) -> tuple[Prompt, Responses]:
    """Return (prompt, responses) within max_length.

    The prompt is cut first, then what is still too long. Both responses keep the same prompt, and
    the prompt keeps its BOS.
    """
    # By the longer response, so that both answer the same prompt.
    if len(prompt) + max(map(len, responses)) <= rule.max_length:
        return prompt, responses
    prompt = _cut_prompt(prompt, rule)
    room = rule.max_length - len(prompt)
    return prompt, [response[:room] for response in responses]


def _cut_prompt(prompt: Prompt, rule: Rule) -> Prompt:
    """Return a prompt within max_prompt_length."""
    excess = max(len(prompt) - rule.max_prompt_length, 0)
    if rule.truncate == "keep_start":
        return prompt[: len(prompt) - excess]
    # The end is kept, and BOS, which says that a text starts here.
    kept_at_start = int(prompt[0] == rule.bos)
    if rule.truncate == "keep_cue":
        # The start and the cue are kept, and the middle is cut: an article's lead says most.
        kept_at_start = max(kept_at_start, rule.max_prompt_length - CUE_TOKENS)
    return prompt[:kept_at_start] + prompt[kept_at_start + excess :]


def _append(
    examples: Examples,
    text: TextExample,
    prompt: Prompt,
    responses: Responses,
    rule: Rule,
    counts: Counts,
) -> None:
    """Append an example with its special tokens, cut to length.

    Raises Unusable where it cannot be trained on.
    """
    # In plain text a special token would end or start a text that goes on. In chat the template
    # places them, between turns too.
    is_plain = isinstance(text.prompt, str)
    if is_plain and rule.eos in prompt:
        raise Unusable("EOS inside the text")
    if is_plain and rule.adds_bos and rule.bos in prompt[1:]:
        raise Unusable("BOS inside the text")
    whole_prompt = _started(text.prompt, prompt, rule)
    whole_responses = [_ended(text.prompt, response, rule) for response in responses]
    prompt, responses = cut(whole_prompt, whole_responses, rule)
    # They may differ only after the cut. Equal responses have no gradient.
    if len(responses) == 2 and responses[0] == responses[1]:
        raise Unusable("chosen and rejected are equal in tokens, or once cut")

    counts.prompts_truncated += len(prompt) < len(whole_prompt)
    for whole, response in zip(whole_responses, responses, strict=True):
        if len(response) < len(whole):
            counts.responses_truncated += 1
            # A cut response does not end here, so it gets no EOS that would teach the policy to
            # stop.
            counts.eos_lost += whole[-1] == rule.eos
    examples.append(prompt, responses, text.where)


def _started(prompt: Text, ids: Prompt, rule: Rule) -> Prompt:
    """Return a prompt's ids after what the tokenizer starts a text with, once."""
    if isinstance(prompt, list) and ids:
        return ids  # the chat template has put it
    if rule.adds_bos:
        return ids if ids[:1] == [rule.bos] else [rule.bos, *ids]
    # GPT-2's kind of tokenizer adds no BOS, so only an empty prompt gets one.
    stand_in = rule.eos if rule.bos is None else rule.bos
    if not ids and stand_in is None:
        raise ValueError(
            "a prompt is empty, and the tokenizer has neither BOS nor EOS to stand for it: give "
            "every row a prompt, or set bos_token in tokenizer_config.json."
        )
    return ids or [stand_in]


def _ended(prompt: Text, ids: list[int], rule: Rule) -> list[int]:
    """Return a response's ids with one EOS, at the end.

    Raises Unusable where the response is empty, or has special tokens inside.
    """
    is_chat = isinstance(prompt, list)
    has_eos = is_chat and ids[-1:] == [rule.eos]  # put by the template
    body = ids[:-1] if has_eos else ids
    if not body:
        raise Unusable("response without tokens")
    if rule.adds_bos and rule.bos in body and not is_chat:
        raise Unusable("BOS inside the text")
    if rule.eos in body:
        raise Unusable("EOS inside the text")
    return [*body, rule.eos] if has_eos or rule.append_eos else body


def _parts(text: TextExample, tokenizer) -> tuple[str, ...]:
    """Return the prompt and the responses as plain text; the template renders chat."""
    if isinstance(text.prompt, str):
        return text.prompt, *text.responses
    prompt = _template(text.prompt, tokenizer, text.where)
    parts = [prompt]
    for response in text.responses:
        whole = _template([*text.prompt, *response], tokenizer, text.where, answered=True)
        if not whole.startswith(prompt):
            raise ValueError(
                f"{text.where}: the chat template renders the conversation otherwise than its "
                f"prompt, so the response cannot be told apart. Prompt: {prompt!r}; conversation: "
                f"{whole!r}. Use a template whose generation prompt is how an answer begins."
            )
        # What the template adds after the prompt is the response, with the tokens that end its
        # turn.
        parts.append(_without_tail(whole[len(prompt) :], tokenizer.eos_token))
    return tuple(parts)


def _template(prompt: Text, tokenizer, where: str = "a prompt", answered: bool = False) -> str:
    """Return a prompt (or an answered conversation) as text; plain text stays as it is."""
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
    """Return the text without the white space that some templates put after the EOS."""
    stripped = text.rstrip()
    return stripped if eos and stripped.endswith(eos) else text


def _ids_of_parts(parts: list[tuple[str, ...]], tokenizer) -> list[list[list[int]]]:
    """Return the ids of each part of each example; all are tokenised in one call, which is fast."""
    flat = iter(_ids(itertools.chain.from_iterable(parts), tokenizer))
    return [list(itertools.islice(flat, len(of_example))) for of_example in parts]


def _ids(texts: Iterable[str], tokenizer) -> list[list[int]]:
    """Return the ids of texts, without special tokens."""
    texts = list(texts)
    if not texts:
        return []  # tokenizers refuse an empty list
    encoded = tokenizer(
        texts,
        # The rule above places BOS and EOS. A chat template has put its own into the text, where
        # the tokenizer still finds them.
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded.input_ids


def _count_merges(
    parts: list[tuple[str, ...]], ids: list[list[list[int]]], tokenizer, counts: Counts
) -> None:
    """Count the responses whose tokens would be others in one text with the prompt."""
    joined, apart = [], []
    for (prompt, *responses), (prompt_ids, *responses_ids) in zip(parts, ids, strict=True):
        joined += [prompt + response for response in responses]
        apart += [prompt_ids + response_ids for response_ids in responses_ids]
    counts.boundaries = len(joined)
    # A merge across the boundary makes tokens that a sampled response never has; it is counted, to
    # warn.
    for together, separate in zip(_ids(joined, tokenizer), apart, strict=True):
        counts.boundary_merges += together != separate


def _mean_tokens(examples: Examples) -> dict[str, float]:
    """Return the mean lengths of the prompts and of each kind of response."""
    if not examples:
        return {}
    prompt_P, response_PK, _ = examples.lengths()
    means = [float(prompt_P.mean()), *response_PK.mean(axis=0).tolist()]
    if len(means) == 2:
        prompt, completion = means
        return {"prompt": prompt, "completion": completion}
    prompt, chosen, rejected = means
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen minus rejected": chosen - rejected,
    }


def _rule(tokenizer, data, truncate: str) -> Rule:
    """Return the rule that settings and tokenizer make; ValueError where they do not fit."""
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
    return Rule(
        bos=bos,
        # Asked of the tokenizer itself: the settings by which one adds BOS differ from class to
        # class.
        adds_bos=bos is not None and tokenizer("").input_ids[:1] == [bos],
        eos=eos,
        append_eos=data.append_eos,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        truncate=truncate,
    )
