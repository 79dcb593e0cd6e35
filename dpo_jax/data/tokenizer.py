"""Text examples to token ids, under one rule for training, evaluation and sampling.

The ids of a prompt and of the answer after it are those of the two as one text, wherever the
tokenizer allows a cut between them; where a token would reach across, each has its own ids. BOS
comes once, before the prompt, where the tokenizer itself puts one. EOS comes once, at the end of
each response; a response that is cut loses it, and gets no false one. An empty prompt is one BOS
(or EOS, where there is no BOS), so that the first response token is predicted from something.
Chat goes through the tokenizer's own template (`chat.py`), which places the special tokens.
"""

import datetime
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_jax.data.chat import Chat, Rendered, Response, without_tail
from dpo_jax.data.examples import Examples, Masks
from dpo_jax.data.ledger import NOT_DISTINCT, Counts, Malformed, Unusable
from dpo_jax.data.rows import TextExample, shared_length

# The version of the rule that makes ids of text. Raise it with every change that gives some row
# other ids, a template's rendering and a cut included: an unfinished stage is then refused, not
# resumed.
TOKENIZATION_VERSION = 2

BATCH = 1000  # examples tokenised in one call

# How many tokens of the prompt's end, which hold the cue for the answer, keep_cue leaves.
CUE_TOKENS = 16

# What a text is put behind, to see its tokens inside of a text.
TEXT_STARTS = ("\n", "a", "(")

# A warning is due where more than this share of so many boundaries or more lies within a token.
MERGED_SHARE = 0.9
MERGED_BOUNDARIES = 10

# What a chat prompt loses where it is cut.
CHAT_LOSES = {
    "keep_start": "the end: the last turns, and the cue for the answer",
    "keep_end": "the start: system text and tool definitions",
    "keep_cue": "the middle: turns, or tool definitions",
}
# Lengths are recommended that leave this share of the chat prompts whole, in steps of so many.
LEFT_WHOLE = 0.99
LENGTH_STEP = 64

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
        # By default transformers would ask at the terminal whether to run a folder's own code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a wrong file makes transformers raise
        raise FileNotFoundError(
            f"{str(path)!r} has no tokenizer that transformers can load. Expected "
            "tokenizer_config.json with tokenizer.json, or with vocab.json and merges.txt; code "
            f"that a folder brings along is never run. transformers says: {error}"
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


def encode(
    texts: Iterable[TextExample],
    tokenizer,
    data,
    truncate: str,
    *,
    date: datetime.date | None = None,
    keep_all: bool = False,
) -> tuple[Examples, Counts]:
    """Tokenise examples and cut them to data.max_length.

    Returns those that can be used, and what became of all: kept, cut, and dropped by reason.
    truncate: which part of a too long prompt stays, "keep_start", "keep_end" or "keep_cue". date:
    what chat templates take for today; None: today. keep_all: keep what cannot be trained on too,
    such as equal or empty responses, to score it. Raises ValueError where the settings, the
    tokenizer or its chat template cannot do what is asked, and for the first row that the template
    refuses, unless data.on_bad_row is "drop".
    """
    encoder = Encoder(tokenizer, data, truncate, date=date, keep_all=keep_all)
    for text in texts:
        encoder.add(text)
    return encoder.finish()


class Encoder:
    """`encode` for examples that come one by one, of which few are in memory as text."""

    def __init__(
        self,
        tokenizer,
        data,
        truncate: str,
        *,
        into: Examples | None = None,
        date: datetime.date | None = None,
        keep_all: bool = False,
    ):
        """Make an encoder; into: examples to append to, if not to new ones."""
        self._tokenizer = tokenizer
        self._rule = _rule(tokenizer, data, truncate)
        self._chat = chat_of(tokenizer, data, date)
        self._stops_at_bad_row = data.on_bad_row == "error"
        self._keep_all = keep_all
        self._examples = Examples() if into is None else into
        self._first = len(self._examples)  # the index of the first that is added here
        self._counts = Counts()
        self.chat_lengths = ChatLengths()  # of what was added, before the cut
        # Enough to tokenise in one call, which is fast.
        self._waiting: list[tuple[TextExample, Rendered]] = []

    def add(self, text: TextExample) -> None:
        """Add an example."""
        try:
            if not self._keep_all:
                _check_specials(text, self._chat)
            rendered = _render(text, self._chat)
        except Unusable as reason:
            self._counts.drop(str(reason), text.where)
            return
        except Malformed as error:
            if self._stops_at_bad_row:
                raise _refusal(text, error) from error
            self._counts.drop(error.reason, text.where)
            return
        self._waiting.append((text, rendered))
        if len(self._waiting) == BATCH:
            self._encode_waiting()

    def finish(self) -> tuple[Examples, Counts]:
        """Return all examples that can be used, and what became of those that were added."""
        self._encode_waiting()
        _warn_of_merges(self._counts)
        _warn_of_thinking(self._counts)
        self._counts.warnings += self._chat.misspelt_ignore()
        cut_chats = self.chat_lengths.warning(self._rule, self._rule.truncate)
        if cut_chats:
            self._counts.warnings.append(cut_chats)
        self._counts.kept = len(self._examples) - self._first
        added = self._examples[self._first :]
        self._counts.mean_tokens = _mean_tokens(added)
        self._counts.labels = _label_counts(added)
        self._counts.count_prompts(added.question_hashes)
        self._counts.count_numbers(added.weights, added.target_margins)
        return self._examples, self._counts

    def _encode_waiting(self) -> None:
        waiting = self._waiting
        self._waiting = []
        batch = _tokenise([rendered for _, rendered in waiting], self._tokenizer, self._counts)
        for (text, rendered), tokens in zip(waiting, batch, strict=True):
            try:
                self._append(tokens, text)
                _count_turns(rendered, self._counts)
            except Unusable as reason:
                self._counts.drop(str(reason), text.where)

    def _append(self, tokens: "_Tokens", text: TextExample) -> None:
        """Append an example with its special tokens, cut to length.

        Raises Unusable where it cannot be trained on, unless all are to be kept.
        """
        if not text.responses:
            self._append_prompt(tokens, text)
            return
        whole = _with_ends(tokens, self._rule, self._keep_all)
        counts = self._counts
        of_row = dict(
            where=text.where,
            label=text.label,
            numbers=text.numbers,
            subset=text.subset,
            question_hash=text.question_hash,
        )
        _append_cut(self._examples, whole, of_row, self._rule, counts, self._keep_all)
        if tokens.is_chat:
            prompt, responses, _ = whole
            self.chat_lengths.add(len(prompt), max(map(len, responses)))

    def _append_prompt(self, tokens: "_Tokens", text: TextExample) -> None:
        """Append a prompt alone, with one response of no tokens."""
        whole = _started(tokens.prompt, self._rule, tokens.is_chat)
        # As for `encode_prompts`: the rest of max_length is its answer's.
        prompt = _cut_prompt(whole, self._rule)
        self._counts.prompts_truncated += len(prompt) < len(whole)
        self._examples.append(
            prompt, ((),), text.where, subset=text.subset, question_hash=text.question_hash
        )
        if tokens.is_chat:
            room = self._rule.max_length - self._rule.max_prompt_length
            self.chat_lengths.add(len(whole), room)


class ChatLengths:
    """The lengths of chat prompts before a cut, which may take what their answers need."""

    def __init__(self):
        self._prompts = array("q")
        self._totals = array("q")  # of each prompt and its longer response

    def add(self, prompt: int, response: int) -> None:
        """Add the tokens of a prompt and of its longer response."""
        self._prompts.append(prompt)
        self._totals.append(prompt + response)

    def extend(self, others: "ChatLengths") -> None:
        """Add all lengths of others."""
        self._prompts.extend(others._prompts)
        self._totals.extend(others._totals)

    def count_cut(self, limits) -> int:
        """Return how many prompts are cut to limits.max_length and max_prompt_length."""
        is_long_P = np.array(self._totals) > limits.max_length
        is_cut_P = is_long_P & (np.array(self._prompts) > limits.max_prompt_length)
        return int(is_cut_P.sum())

    def are_nearly_whole(self, limits) -> bool:
        """Return whether no more prompts are cut than `enough` allows for."""
        return self.count_cut(limits) <= (1 - LEFT_WHOLE) * len(self._prompts)

    def warning(self, limits, truncate: str) -> str:
        """Return a warning that says how many prompts are cut, and what helps; "" if none is."""
        cut_prompts = self.count_cut(limits)
        if not cut_prompts:
            return ""
        max_length, max_prompt_length = self.enough(limits)
        return (
            f"{cut_prompts:,} of {len(self._prompts):,} chat prompts are cut to "
            f"{limits.max_prompt_length} tokens, and lose {CHAT_LOSES[truncate]}. Pass "
            f"--config.data.max_length={max_length} "
            f"--config.data.max_prompt_length={max_prompt_length}."
        )

    def enough(self, limits) -> tuple[int, int]:
        """Return (max_length, max_prompt_length) that leave nearly all prompts whole.

        limits: those that cut too many; where nearly all prompts are whole already, all are meant.
        """
        for share in (LEFT_WHOLE, 1.0):
            max_prompt_length = _rounded_up(np.quantile(self._prompts, share, method="higher"))
            max_length = _rounded_up(np.quantile(self._totals, share, method="higher"))
            if max_length > limits.max_length or max_prompt_length > limits.max_prompt_length:
                break
        # A prompt that is as long as allowed leaves room for a response.
        max_prompt_length = max(max_prompt_length, limits.max_prompt_length)
        return max(max_length, max_prompt_length + LENGTH_STEP), max_prompt_length


def _rounded_up(length: float) -> int:
    return int(-(-length // LENGTH_STEP)) * LENGTH_STEP


def cut_examples(whole: Examples, tokenizer, data, truncate: str, *, into: Examples) -> Counts:
    """Cut examples that were encoded at no limit to data.max_length, and append them to others.

    Returns what the cut does to them, in the counts that `encode` has of it.
    """
    rule = _rule(tokenizer, data, truncate)
    first = len(into)
    counts = Counts()
    for index, (example, where) in enumerate(zip(whole, whole.where, strict=True)):
        responses = [ids.tolist() for ids in example.responses]
        masks = list(example.completion_masks or [None] * len(responses))
        try:
            parts = (example.prompt.tolist(), responses, masks)
            of_row = dict(
                where=where,
                label=example.label,
                numbers=whole.numbers(index),
                subset=whole.subset(index),
                question_hash=whole.question_hash(index),
            )
            _append_cut(into, parts, of_row, rule, counts, keep_all=False)
        except Unusable as reason:
            counts.drop(str(reason), where)
    counts.kept = len(into) - first
    added = into[first:]
    counts.mean_tokens = _mean_tokens(added)
    counts.labels = _label_counts(added)
    counts.count_prompts(added.question_hashes)
    counts.count_numbers(added.weights, added.target_margins)
    return counts


def _append_cut(
    examples: Examples,
    whole: tuple[Prompt, Responses, list],
    of_row: dict,
    rule: Rule,
    counts: Counts,
    keep_all: bool,
) -> None:
    """Append a (prompt, responses, masks), cut to length; raise Unusable as `Encoder` does.

    of_row: what `Examples.append` takes beside them.
    """
    whole_prompt, whole_responses, whole_masks = whole
    prompt, responses = cut(whole_prompt, whole_responses, rule)
    masks = _cut_masks(whole_masks, responses)
    if not keep_all:
        # They may differ only after the cut. Equal responses have no gradient.
        if len(responses) == 2 and responses[0] == responses[1]:
            raise Unusable("chosen and rejected are equal in tokens, or once cut")
        if masks and not all(mask.any() for mask in masks):
            raise Unusable("no assistant turn is left, once cut")

    if not examples.append(prompt, responses, completion_masks=masks, **of_row):
        counts.filter(NOT_DISTINCT)
        return
    counts.prompts_truncated += len(prompt) < len(whole_prompt)
    for before, response in zip(whole_responses, responses, strict=True):
        if len(response) < len(before):
            counts.responses_truncated += 1
            # A cut response does not end here, so it gets no EOS that would teach the policy to
            # stop.
            counts.eos_lost += before[-1] == rule.eos


def encode_prompts(
    texts: Sequence[TextExample],
    tokenizer,
    data,
    truncate: str,
    *,
    date: datetime.date | None = None,
    counts: Counts | None = None,
) -> list[np.ndarray]:
    """Return prompts to sample from, which start as `encode` starts them.

    texts: examples whose responses are ignored. Prompts are cut to data.max_prompt_length. counts:
    counts those that are cut. Raises ValueError for one that the chat template refuses.
    """
    rule = _rule(tokenizer, data, truncate)
    chat = chat_of(tokenizer, data, date)
    rendered = [_render_prompt(text, chat) for text in texts]
    found = []
    for text, ids in zip(texts, _ids(rendered, tokenizer), strict=True):
        whole = _started(ids, rule, isinstance(text.prompt, list))
        prompt = _cut_prompt(whole, rule)
        if counts is not None:
            counts.prompts_truncated += len(prompt) < len(whole)
        found.append(np.array(prompt, np.int32))
    return found


def encode_example_prompts(
    texts: Sequence[TextExample],
    tokenizer,
    data,
    truncate: str,
    *,
    date: datetime.date | None = None,
) -> list[np.ndarray]:
    """Return the prompts of all examples, to sample from, exactly as `encode` has them.

    That is, cut where they pass data.max_length together with their responses.
    """
    rule = _rule(tokenizer, data, truncate)
    chat = chat_of(tokenizer, data, date)
    found = []
    for start in range(0, len(texts), BATCH):
        rendered = []
        for text in texts[start : start + BATCH]:
            try:
                rendered.append(_render(text, chat))
            except Malformed as error:
                raise _refusal(text, error) from error
        for tokens in _tokenise(rendered, tokenizer, Counts()):
            # EOS counts in the length by which a prompt is cut, so it is added first. No example is
            # dropped: each prompt here is wanted.
            prompt, responses, _ = _with_ends(tokens, rule, keep_all=True)
            prompt, _ = cut(prompt, responses, rule)
            found.append(np.array(prompt, np.int32))
    return found


def chat_of(tokenizer, data, date: datetime.date | None = None) -> Chat:
    """Return how conversations become text under the settings of `data`."""
    return Chat(
        tokenizer,
        options=data.template.to_dict(),
        ignore=tuple(data.ignore),
        date=date or datetime.date.today(),
    )


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


@dataclass(frozen=True)
class _Tokens:
    """The ids of a prompt and its responses, as far as the text holds them."""

    prompt: Prompt
    responses: Responses
    masks: list[list[bool] | None]  # for each response which tokens are trained on; None: all
    is_chat: bool


def _cut_masks(masks: list[list[bool] | None], responses: Responses) -> Masks | None:
    """Return the masks of responses that are cut; None where all tokens are trained on."""
    if all(mask is None for mask in masks):
        return None
    found = []
    for mask, response in zip(masks, responses, strict=True):
        mask = np.ones(len(response), bool) if mask is None else np.array(mask, bool)
        found.append(mask[: len(response)])
    return None if all(mask.all() for mask in found) else tuple(found)


def _with_ends(
    tokens: _Tokens, rule: Rule, keep_all: bool
) -> tuple[Prompt, Responses, list[list[bool] | None]]:
    """Return (prompt, responses, masks) with BOS before and EOS behind.

    Raises Unusable for a response without tokens, unless all are to be kept.
    """
    prompt = _started(tokens.prompt, rule, tokens.is_chat)
    responses = []
    masks = []
    for response, mask in zip(tokens.responses, tokens.masks, strict=True):
        # The text may have its own BOS, as "<s>[INST] ..." has.
        if not tokens.prompt and response[:1] == prompt:
            response = response[1:]
        has_eos = bool(response) and response[-1] == rule.eos
        is_empty = len(response) == has_eos
        if is_empty and not keep_all:
            raise Unusable("response without tokens")
        if not has_eos and rule.eos is not None and (rule.append_eos or is_empty):
            response = [*response, rule.eos]
            mask = None if mask is None else [*mask, True]
        responses.append(response)
        masks.append(mask)
    return prompt, responses, masks


def _started(ids: Prompt, rule: Rule, is_chat: bool) -> Prompt:
    """Return a prompt's ids after what the tokenizer starts a text with, once."""
    if ids and is_chat:
        return ids  # the chat template has put it
    if ids and rule.adds_bos:
        return ids if ids[0] == rule.bos else [rule.bos, *ids]
    # GPT-2's kind of tokenizer adds no BOS, so only an empty prompt gets one.
    stand_in = rule.eos if rule.bos is None else rule.bos
    if not ids and stand_in is None:
        raise ValueError(
            "a prompt is empty, and the tokenizer has neither BOS nor EOS to stand for it: give "
            "every row a prompt, or set bos_token in tokenizer_config.json."
        )
    return ids or [stand_in]


# text


def _render(text: TextExample, chat: Chat) -> Rendered:
    """Return an example as text; the chat template writes messages.

    Raises Malformed where the template cannot, ValueError where there is none.
    """
    if isinstance(text.prompt, list):
        chat.check(text.where)
        if not text.responses:
            return Rendered(chat.prompt(text.prompt, text.tools), (), is_chat=True)
        return chat.example(text.prompt, text.responses, text.tools)
    _check_no_tools(text, chat)
    eos = chat.tokenizer.eos_token
    # A text may end in its own EOS, and in white space after it.
    responses = [Response(without_tail(response, eos)) for response in text.responses]
    return Rendered(text.prompt, tuple(responses))


def _render_prompt(text: TextExample, chat: Chat) -> str:
    """Return a prompt as text; ValueError where the chat template refuses it."""
    try:
        if isinstance(text.prompt, str):
            _check_no_tools(text, chat)
            return text.prompt
        chat.check(text.where)
        return chat.prompt(text.prompt, text.tools)
    except Malformed as error:
        raise ValueError(f"{text.where}: {error}.") from error


def _check_no_tools(text: TextExample, chat: Chat) -> None:
    """Check that plain text has no tools beside it, which nothing would write; raise Malformed."""
    if text.tools and "tools" not in chat.ignore:
        raise Malformed(
            "the row has tools, which a chat template writes, but its prompt is text",
            advice="give the prompt as messages, or leave the tools out with "
            "--config.data.ignore=tools",
        )


def _check_specials(text: TextExample, chat: Chat) -> None:
    """Check that no chat message spells a special token, which would end a turn or start one.

    Raises Unusable. Plain text may hold them: its format is the user's own.
    """
    if isinstance(text.prompt, list):
        for messages in (text.prompt, *text.responses):
            if chat.spells_special(messages):
                raise Unusable("special token inside a message")


def _refusal(text: TextExample, error: Malformed) -> ValueError:
    """Return the error for a row that the chat template cannot write, for a person."""
    return ValueError(
        f"{text.where}: {error}.\n"
        "Fix the row, or drop and count such rows with --config.data.on_bad_row=drop."
    )


def _count_turns(rendered: Rendered, counts: Counts) -> None:
    """Count what is not trained on as it stands in the row."""
    counts.reasoning_left_out += rendered.reasoning_left_out
    counts.without_cue += rendered.is_without_cue
    counts.developer_is_system += rendered.is_developer_system
    for response in rendered.responses:
        counts.laid_behind += response.is_laid_behind
        counts.inside_thinking += response.is_inside_thinking
        counts.other_turns += response.other_turns
        counts.reasoning_left_out += response.reasoning_left_out


# ids


@dataclass
class _Answer:
    """A response after its prompt, as text and as ids."""

    prompt: str
    prompt_ids: Prompt
    response: Response
    joint_ids: list[int]  # of prompt and response as one text
    ids: list[int]

    @property
    def is_merged(self) -> bool:
        """Whether a token of the joint text reaches from the prompt into the response."""
        return self.joint_ids[: len(self.prompt_ids)] != self.prompt_ids


def _tokenise(batch: list[Rendered], tokenizer, counts: Counts) -> list[_Tokens]:
    """Return the ids of rendered examples; all are tokenised in a few calls, which is fast.

    Counts the boundaries that lie within a token of the joint text.
    """
    prompts_ids = _ids([example.prompt for example in batch], tokenizer)
    joined = []
    for example in batch:
        joined += [example.prompt + response.text for response in example.responses]
    joint_ids = iter(_ids(joined, tokenizer))

    answers = []
    for example, prompt_ids in zip(batch, prompts_ids, strict=True):
        for response in example.responses:
            ids = next(joint_ids)
            rest = ids[len(prompt_ids) :]
            answers.append(_Answer(example.prompt, prompt_ids, response, ids, rest))
    # A token across the boundary is one that a sampled response never has.
    merged = [answer for answer in answers if answer.is_merged]
    alone = _ids_inside([answer.response.text for answer in merged], tokenizer)
    for answer, ids in zip(merged, alone, strict=True):
        answer.ids = ids
    counts.boundaries += len(answers)
    counts.boundary_merges += len(merged)
    if merged and not counts.merge_example:
        counts.merge_example = _merge_example(merged[0], tokenizer)

    masks = iter(_masks(answers, tokenizer))
    left = iter(answers)
    found = []
    for example, prompt_ids in zip(batch, prompts_ids, strict=True):
        count = len(example.responses)
        ids = [answer.ids for answer in itertools.islice(left, count)]
        found.append(
            _Tokens(prompt_ids, ids, list(itertools.islice(masks, count)), example.is_chat)
        )
    return found


def _masks(answers: list[_Answer], tokenizer) -> list[list[bool] | None]:
    """Return for each answer which of its tokens are trained on; None: all of them."""
    several = [answer for answer in answers if answer.response.spans is not None]
    pieces = [_pieces(answer.response) for answer in several]
    pieces_ids = iter(_ids_inside(itertools.chain.from_iterable(pieces), tokenizer))
    masks = {}
    for answer, texts in zip(several, pieces, strict=True):
        # Where the ids of the pieces are those of the whole, their counts say where each starts.
        positions = {0: 0}
        end = 0
        together = []
        for text in texts:
            end += len(text)
            together += next(pieces_ids)
            positions[end] = len(together)
        if together != answer.ids:
            positions = _positions(answer, positions, tokenizer)
        mask = [False] * len(answer.ids)
        for start, end in answer.response.spans:
            for index in range(positions[start], positions[end]):
                mask[index] = True
        masks[id(answer)] = mask
    return [masks.get(id(answer)) for answer in answers]


def _pieces(response: Response) -> list[str]:
    """Return a response's text, cut where a part that is trained on starts or ends."""
    edges = {0, len(response.text)}
    for span in response.spans:
        edges.update(span)
    return [response.text[start:end] for start, end in itertools.pairwise(sorted(edges))]


def _positions(answer: _Answer, edges: Iterable[int], tokenizer) -> dict[int, int]:
    """Return for each edge in an answer's text how many of its tokens come before it.

    A token that reaches across an edge counts as after it.
    """
    edges = list(edges)
    text = answer.response.text
    if answer.is_merged:
        before = _ids_inside([text[:edge] for edge in edges], tokenizer)
        skipped = 0
    else:
        before = _ids([answer.prompt + text[:edge] for edge in edges], tokenizer)
        skipped = len(answer.prompt_ids)
    positions = {}
    for edge, ids in zip(edges, before, strict=True):
        positions[edge] = shared_length(ids[skipped:], answer.ids)
    return positions


def _ids(texts: Iterable[str], tokenizer) -> list[list[int]]:
    """Return the ids of texts, without special tokens."""
    texts = list(texts)
    if not texts:
        return []  # tokenizers refuse an empty list
    encoded = tokenizer(
        texts,
        # The rule above places BOS and EOS. What the texts spell themselves, as those of a chat
        # template do, the tokenizer still finds.
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded.input_ids


def _ids_inside(texts: Iterable[str], tokenizer) -> list[list[int]]:
    """Return the ids of texts that continue others.

    That is without the space that SentencePiece's kind of tokenizer puts before every text.
    """
    texts = list(texts)
    if not texts:
        return []  # not every tokenizer has ids for what is asked below: the toy's has 8 words
    newline, letter, both = _ids(["\n", "a", "\na"], tokenizer)
    alone = _ids(texts, tokenizer)
    if both == [*newline, *letter]:
        return alone
    found = dict(enumerate(alone))
    left = range(len(texts))
    for start in TEXT_STARTS:
        (start_ids,) = _ids([start], tokenizer)
        merged = []
        for index, ids in zip(left, _ids([start + texts[i] for i in left], tokenizer), strict=True):
            # A token may reach from this start into the text; from another one it does not.
            if ids[: len(start_ids)] == start_ids:
                found[index] = ids[len(start_ids) :]
            else:
                merged.append(index)
        left = merged
    return list(found.values())


def _merge_example(answer: _Answer, tokenizer) -> str:
    """Return how the tokens differ at a boundary that lies within a token."""
    start = max(shared_length(answer.prompt_ids, answer.joint_ids) - 1, 0)
    joint = tokenizer.convert_ids_to_tokens(answer.joint_ids[start : start + 4])
    prompt_end = tokenizer.convert_ids_to_tokens(answer.prompt_ids[start:])
    response_start = tokenizer.convert_ids_to_tokens(answer.ids[:3])
    return (
        f"{answer.prompt[-20:]!r} and then {answer.response.text[:20]!r} is tokenised as "
        f"{prompt_end} and {response_start}, but as one text as {joint}"
    )


def _warn_of_merges(counts: Counts) -> None:
    """Add a warning where nearly all boundaries lie within a token."""
    merges, boundaries = counts.boundary_merges, counts.boundaries
    if boundaries >= MERGED_BOUNDARIES and merges > MERGED_SHARE * boundaries:
        counts.warnings.append(
            f"{merges} of {boundaries} responses would merge with the end of their prompt into "
            f"other tokens: {counts.merge_example}. Text usually continues with a space at the "
            "start of the response, not at the end of the prompt."
        )


def _warn_of_thinking(counts: Counts) -> None:
    """Add a warning where responses are trained on as thinking."""
    if counts.inside_thinking:
        counts.warnings.append(
            f"{counts.inside_thinking} response(s) follow a prompt in which the chat template "
            "opens the thinking, and do not close it: the model learns to write them as thinking. "
            "Give the rows reasoning that the template writes, use a template that closes the "
            "thinking, or turn thinking off, as many templates do with "
            "data.template.enable_thinking=False."
        )


def _label_counts(examples: Examples) -> dict[str, int]:
    """Return how many unpaired rows are desirable and undesirable; nothing of others."""
    labels_P = examples.labels
    if labels_P is None:
        return {}
    return {"desirable": int(labels_P.sum()), "undesirable": int((~labels_P).sum())}


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
