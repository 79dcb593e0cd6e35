"""Text examples from files and hub data sets: a prompt with one response, or a pair of them.

A source is a function from the fields of one record to (prompt, responses): one response for SFT,
chosen and rejected for pairs. To add a data set, write such a function and its line in SOURCES.
Where the records are (a file, a folder, the hub) is said by `data.path`, so any source reads from
anywhere.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dpo_jax.data import toy
from dpo_jax.data.ledger import Counts, Filtered, Ledger, Malformed, Unusable
from dpo_jax.data.readers import fields_of, find_splits

Text = str | list  # plain text, or chat messages: [{"role": ..., "content": ...}, ...]

ASSISTANT = "\n\nAssistant:"
CUE = "TL;DR:"
NEWS = "news article, not a Reddit post"
# Where data.eval_split is empty, the first of these that the data set has.
EVAL_SPLITS = ("test", "validation", "valid", "valid1")


@dataclass(frozen=True)
class TextExample:
    """A prompt and its responses: (completion,) for SFT, (chosen, rejected) for pairs."""

    prompt: Text
    responses: tuple[Text, ...]
    where: str  # the file or data set, and the row in it counted from 1


def local(fields: dict) -> tuple[Text, tuple[Text, ...]]:
    """The user's own rows: prompt, chosen and rejected; or prompt and completion, for SFT.

    Instead of the last two also `text`, or `messages`. Each may be text or chat messages; `chosen`
    and `rejected` may hold the whole conversation.
    """
    # Tables have a null where a row lacks a field.
    given = {name for name, value in fields.items() if value is not None}
    if given & {"chosen", "rejected"}:
        names = ("chosen", "rejected") if "rejected" in given else ("chosen",)
    else:
        names = tuple(name for name in ("completion", "messages", "text") if name in given)[:1]
    if not names:
        raise Malformed("none of the fields 'chosen', 'completion', 'messages', 'text' is there")
    responses = tuple(_content(fields, name) for name in names)
    # The whole text is the completion, of an empty prompt.
    if names == ("text",):
        return "", responses
    prompt = _content(fields, "prompt") if "prompt" in given else None
    if any(isinstance(part, list) for part in (prompt, *responses)):
        return _chat(prompt, responses)
    return _text(fields, "prompt"), responses


def hh(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Anthropic's transcripts, split after the last assistant cue that both sides share."""
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    # Transcripts differ in their last turn, so the last cue they share starts it.
    prompt = ""
    for cue in re.finditer(ASSISTANT, chosen):
        beginning = chosen[: cue.end()]
        if rejected.startswith(beginning):
            prompt = beginning
    if not prompt:
        raise Unusable("no shared assistant turn")
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def shp(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Stanford Human Preferences: pairs of Reddit answers whose scores differ twofold or more."""
    history = _text(fields, "history")
    answer_a, answer_b = _text(fields, "human_ref_A"), _text(fields, "human_ref_B")
    label = _number(fields, "labels")
    ratio = _number(fields, "score_ratio")
    if label not in (0, 1):
        raise Malformed("field 'labels' is neither 1 (A is preferred) nor 0 (B is)", repr(label))
    if ratio < 2:
        raise Filtered("score ratio below 2")
    chosen, rejected = (answer_a, answer_b) if label == 1 else (answer_b, answer_a)
    return f"\n\nHuman: {history}{ASSISTANT}", (_spaced(chosen), _spaced(rejected))


def imdb(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Film reviews, without a prompt; HTML line breaks become newlines."""
    text = re.sub(r"\s*<br\s*/?>[ \t]*", "\n", _text(fields, "text"))
    return "", (text.strip(),)


def tldr(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Reddit posts and summaries.

    The prompt ends in one "TL;DR:", and each summary starts with one space. Some sets of
    comparisons have news articles among the posts; these are left out.
    """
    if "summaries" in fields:
        fields = _compared(fields)
    prompt = _text(fields, "prompt").rstrip()
    if re.match(r"\s*(Article|TITLE):", prompt):  # a post starts with its subreddit
        raise Filtered(NEWS)
    # The blank space before the cue is kept as it was; several cues become one.
    end = re.search(r"(\s*)(?:TL;DR:\s*)+$", prompt)
    prompt = prompt[: end.start()] + end[1] + CUE if end else f"{prompt}\n{CUE}"

    given = {name for name, value in fields.items() if value is not None}
    # Three layouts of the data set are about: pairs, completions, and the reference summaries
    # ("label").
    best = next((name for name in ("chosen", "completion") if name in given), "label")
    names = (best, "rejected") if "rejected" in given else (best,)
    summaries = []
    for name in names:
        without_cue = re.sub(r"^(\s*TL;DR:)+", "", _text(fields, name))
        summaries.append(_spaced(without_cue))
    if len(summaries) == 2 and summaries[0] == summaries[1]:
        raise Filtered("summaries are equal")
    if len(summaries) == 2 and min(len(summary.split()) for summary in summaries) < 5:
        raise Filtered("a summary has fewer than 5 words")
    return prompt, tuple(summaries)


def _compared(fields: dict) -> dict:
    """Return a record of OpenAI's comparisons as prompt, chosen and rejected.

    It has a post, two summaries, and which is better.
    """
    match fields:
        case {
            "info": dict(info),
            "summaries": [dict(), dict()] as summaries,
            "choice": 0 | 1 as choice,
        }:
            pass  # the names of what matched are used below
        case _:
            raise Malformed("a comparison has 'info', two 'summaries', and 'choice', 0 or 1")
    if "cnndm" in str(fields.get("batch")):
        raise Filtered(NEWS)
    subreddit, title, post = (_text(info, name) for name in ("subreddit", "title", "post"))
    return dict(
        prompt=f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\n{CUE}",
        chosen=_text(summaries[choice], "text"),
        rejected=_text(summaries[1 - choice], "text"),
    )


def cnn_dailymail(fields: dict) -> tuple[str, tuple[str, ...]]:
    """News articles and their highlights, as one text.

    Highlights are a sentence a line, some with a blank before the full stop.
    """
    # The summary is to be one line, as TL;DR's are.
    one_line = " ".join(_text(fields, "highlights").split())
    highlights = re.sub(r" (?=[.,;:?!]( |$))", "", one_line)
    return f"Article:\n\n{_text(fields, 'article').strip()}\n\n{CUE}", (_spaced(highlights),)


def _toy(data, kind: str) -> dict[str, list[TextExample]]:
    splits = {}
    for split, examples in toy.examples(data, kind).items():
        splits[split] = [TextExample(*example) for example in examples]
    return splits


@dataclass(frozen=True)
class Source:
    """A data set's parser, from a record to (prompt, responses), and its peculiarities."""

    parse: Callable[[dict], tuple] | None
    example: str = ""  # a right record, shown beside a wrong one
    cue: str = ""  # what its prompts end in, which asks for the answer and must not be cut off
    truncate: str = "keep_start"  # which part of a too long prompt stays, for data.truncate="auto"
    pairs: bool = True  # it has pairs; every source has responses for SFT
    sorted: bool = False  # rows come sorted (by label, say): they are read in a hashed order
    make: Callable | None = None  # (data, kind) -> both splits, for a source without records


SOURCES = {
    "local": Source(
        local,
        '{"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}; for SFT '
        '"completion" instead of the last two; for chat, lists of messages',
    ),
    "hh": Source(
        hh,
        r'{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", '
        r'"rejected": "\n\nHuman: Hi\n\nAssistant: No."}',
        cue=ASSISTANT,
        truncate="keep_end",
    ),
    "shp": Source(
        shp,
        '{"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No idea.", '
        '"labels": 1, "score_ratio": 3.0}',
        cue=ASSISTANT,
        truncate="keep_end",
    ),
    "imdb": Source(imdb, '{"text": "A fine film."}', pairs=False, sorted=True),
    "tldr": Source(
        tldr,
        r'{"prompt": "POST: ...\n\nTL;DR:", "chosen": " A good summary.", '
        r'"rejected": " A bad one."}; for SFT "completion" or "label" instead',
        cue=CUE,
        truncate="keep_end",
    ),
    "cnn_dailymail": Source(
        cnn_dailymail,
        '{"article": "LONDON, England -- ...", "highlights": "It rained ."}',
        cue=CUE,
        truncate="keep_cue",
        pairs=False,
    ),
    "toy": Source(None, make=_toy),
}


def read(data, kind: str) -> tuple[dict[str, list[TextExample]], Ledger]:
    """Read the examples of both splits, and what became of all rows.

    Returns {"train": [...], "eval": [...]} and a ledger. kind: "sft" or "pairs". Raises ValueError
    or FileNotFoundError that says which file, row, field or split is wrong.
    """
    if data.source not in SOURCES:
        raise ValueError(f"data.source={data.source!r} is not one of {', '.join(SOURCES)}.")
    source = SOURCES[data.source]
    if kind == "pairs" and not source.pairs:
        raise ValueError(
            f"data.source={data.source!r} has no pairs. Make them with the `pairs` stage, or "
            "pass rows of prompt, chosen and rejected with data.source=local."
        )
    if source.make:
        splits = source.make(data, kind)
        ledger = Ledger(Counts(read=len(splits["train"])), Counts(read=len(splits["eval"])))
    else:
        splits, ledger = _read_splits(data, kind, source)
    # Counted and shown, not removed: some data sets repeat prompts between their splits.
    train_prompts = {_prompt_key(example) for example in splits["train"]}
    for example in splits["eval"]:
        ledger.shared_prompts += _prompt_key(example) in train_prompts
    return splits, ledger


def _read_splits(data, kind: str, source: Source) -> tuple[dict[str, list[TextExample]], Ledger]:
    splits = find_splits(data.path)
    train_names, eval_name = _choose(list(splits), data)
    records = itertools.chain.from_iterable(splits[name]() for name in train_names)
    train, train_counts = _parse(records, data, kind, source, data.max_rows)
    if eval_name:
        evals, eval_counts = _parse(splits[eval_name](), data, kind, source, data.max_eval_rows)
    else:
        train, held_out = _hold_out(train, data.eval_fraction)
        # All that is held out is kept from training, even if the evaluation reads fewer.
        evals = held_out[: data.max_eval_rows or None]
        train_counts.held_out = len(held_out)
        eval_counts = Counts(read=len(evals))
    return {"train": train, "eval": evals}, Ledger(train_counts, eval_counts)


def _choose(names: list[str], data) -> tuple[list[str], str]:
    """Return the splits to train on and the one to evaluate on.

    The latter is "" where a part of the training rows is to be held out.
    """
    train = data.train_split.split("+")
    # A single file has one split, whatever it is called: the default name then means that one.
    if len(names) == 1 and data.train_split == "train" and not data.eval_split:
        train = names
    for name in (*train, data.eval_split or train[0]):
        if name not in names:
            raise ValueError(
                f"{data.path} has no split {name!r}; it has {', '.join(names)}. See "
                f"data.train_split={data.train_split!r} and data.eval_split={data.eval_split!r}."
            )
    if data.eval_split in train:
        raise ValueError(
            f"data.eval_split={data.eval_split!r} is trained on (data.train_split="
            f"{data.train_split!r}): leave it empty to hold out data.eval_fraction of the prompts."
        )
    if data.eval_split:
        return train, data.eval_split
    unused = [name for name in EVAL_SPLITS if name in names and name not in train]
    return train, unused[0] if unused else ""


def _hold_out(
    examples: list[TextExample], fraction: float
) -> tuple[list[TextExample], list[TextExample]]:
    """Part the examples by prompt into (train, held out).

    A prompt's side depends on its text alone, so SFT and DPO on the same prompts hold out the same
    ones. Of few prompts, at least one is held out.
    """
    # By prompt, not by row: no prompt is both trained on and evaluated.
    keys = [_prompt_key(example) for example in examples]
    hashes = {key: _hash(key) for key in keys}
    held_out = {key for key in hashes if hashes[key] < fraction}
    if not held_out and fraction > 0 and len(hashes) > 1:
        held_out = {min(hashes, key=hashes.get)}
    train, evals = [], []
    for example, key in zip(examples, keys, strict=True):
        if key in held_out:
            evals.append(example)
        else:
            train.append(example)
    return train, evals


def _prompt_key(example: TextExample) -> str:
    """Return the text that tells prompts apart: the response, where there is no prompt."""
    # JSON, for a prompt may be a list of messages.
    return json.dumps(example.prompt or example.responses[0])


def _hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, the same in every process."""
    # Not hash(), which differs from process to process. Broken text may hold lone surrogates.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _parse(
    records: Iterable, data, kind: str, source: Source, limit: int
) -> tuple[list[TextExample], Counts]:
    """Return the first `limit` good examples (0: all), and the other records counted by reason.

    records: (where, record) of each.
    """
    if source.sorted:
        records = sorted(records, key=lambda record: _hash(str(record[1])))
    examples = []
    counts = Counts()
    for where, record in records:
        # Before the row is counted as read: rows after the last one needed are not looked at.
        if limit and len(examples) == limit:
            break
        counts.read += 1
        try:
            prompt, responses = source.parse(fields_of(record))
            responses = usable_responses(responses, kind)
            examples.append(TextExample(prompt, responses, where))
        except Filtered as reason:
            # Left out on purpose by the source's rule, which is no fault of the row.
            counts.filter(str(reason))
        except Unusable as reason:
            counts.drop(str(reason), where)
        except Malformed as error:
            if data.on_bad_row == "error":
                raise ValueError(_explain(error, where, record, data, source)) from None
            counts.drop(error.reason, where)
    return examples, counts


def usable_responses(responses: tuple[Text, ...], kind: str) -> tuple[Text, ...]:
    """Return the responses that this kind of training needs.

    Raises Malformed where a pair has one alone, Unusable where one is empty or both are equal.
    """
    if kind == "pairs" and len(responses) == 1:
        raise Malformed("a pair needs two responses, in 'chosen' and 'rejected'")
    if kind == "sft":
        # Of a pair, SFT trains on the chosen one.
        responses = responses[:1]
    texts = [_said(response).strip() for response in responses]
    if not all(texts):
        raise Unusable("empty response")
    # Messages that differ may say the same, and the same text may be split into other messages.
    if len(responses) == 2 and (responses[0] == responses[1] or texts[0] == texts[1]):
        raise Unusable("chosen and rejected are equal")
    return responses


def _said(response: Text) -> str:
    """Return all that a response says, as one text."""
    if isinstance(response, str):
        return response
    return "".join(message["content"] for message in response)


def _explain(error: Malformed, where: str, record, data, source: Source) -> str:
    """Say what is wrong with a record, to the person who can mend it."""
    try:
        found = ", ".join(map(str, fields_of(record)))
    except Malformed:
        found = ""
    return "\n".join(
        [
            f"{where}: {error}.",
            f"  data.path: {data.path}",
            f"  fields found: {found or 'none'}",
            f"  a right row for data.source={data.source}: {source.example}",
            "Fix the row, or drop and count such rows with --config.data.on_bad_row=drop.",
        ]
    )


def _text(fields: dict, name: str) -> str:
    """Return a field that must be text."""
    if fields.get(name) is None:
        raise Malformed(f"field {name!r} is missing")
    if not isinstance(fields[name], str):
        raise Malformed(f"field {name!r} is not text", shown(fields[name]))
    return fields[name]


def _number(fields: dict, name: str) -> float:
    """Return a field that must be a number."""
    if not isinstance(fields.get(name), int | float):
        raise Malformed(f"field {name!r} is missing or not a number", shown(fields.get(name)))
    return fields[name]


def _content(fields: dict, name: str) -> Text:
    """Return a field that must be text or chat messages, with role and content alone."""
    if not isinstance(fields.get(name), list):
        return _text(fields, name)
    messages = []
    for message in fields[name]:
        match message:
            case {"role": str(role), "content": str(content)}:
                messages.append({"role": role, "content": content})
            case _:
                raise Malformed(
                    f"field {name!r} holds more than messages, each a role and a content in text",
                    shown(message),
                )
    return messages


def _spaced(text: str) -> str:
    """Return a response that continues its prompt with one space."""
    return " " + text.strip()


def shown(value) -> str:
    """Return a value and its type, short enough for a message."""
    text = repr(value)
    if len(text) >= 80:
        text = text[:77] + "..."
    return f"{text} ({type(value).__name__})"


def _chat(prompt: Text | None, responses: tuple[Text, ...]) -> tuple[list, tuple[list, ...]]:
    """Return chat messages as (prompt, responses).

    Each given response is either the answer alone or the whole conversation.
    """
    chats = [_messages("assistant", response) for response in responses]
    given = _messages("user", prompt or [])
    if not all(chats):
        raise Unusable("empty response")
    starts_with_prompt = chats[0][: len(given)] == given
    # An assistant's turn first, and no prompt in it: the responses are answers alone.
    if given and chats[0][0]["role"] == "assistant" and not starts_with_prompt:
        start, answers = given, chats
    else:
        # Whole conversations. A prompt of text is only their last turn, so it does not say where
        # the answers start.
        is_whole_prompt = isinstance(prompt, list) and given
        turn = len(given) if is_whole_prompt else _last_shared_turn(chats)
        start, answers = chats[0][:turn], [chat[turn:] for chat in chats]
        differ = any(chat[:turn] != start for chat in chats)
        if differ or any(message not in start for message in given):
            raise Malformed("the conversation does not continue 'prompt'", shown(start))
    roles = [[message["role"] for message in answer] for answer in answers]
    # What is trained on is what an assistant says, from its first turn to its last.
    for turns in roles:
        if not start or turns[:1] != ["assistant"] or turns[-1] != "assistant":
            raise Malformed(
                "the response is not an assistant's turn after a prompt", f"roles {roles}"
            )
    return start, tuple(answers)


def _messages(role: str, content: Text) -> list:
    """Return text as the one message of a role; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _last_shared_turn(chats: list[list]) -> int:
    """Return where the last assistant turn starts, up to which all conversations are the same."""
    turn = 0
    shortest = min(map(len, chats))
    # The last message of each is never shared: something must be left to answer.
    while turn < shortest - 1 and all(chat[turn] == chats[0][turn] for chat in chats):
        turn += 1
    # Back to where every conversation has an assistant's turn.
    while turn > 0:
        if all(chat[turn]["role"] == "assistant" for chat in chats):
            return turn
        turn -= 1
    raise Unusable("no shared assistant turn")
