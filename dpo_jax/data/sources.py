"""Rows of text from files and hub data sets: a prompt with one response (SFT) or a chosen and a
rejected one.

A source is a function from one record to (prompt, responses). Adding a data set is one such
function and one line of SOURCES. Where the records lie (a file, a folder, the hub) is the business
of `data.path`, so any source reads from anywhere.
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
EVAL_SPLITS = (
    "test",
    "validation",
    "valid",
    "valid1",
)  # the first one there is, if data.eval_split is empty


@dataclass(frozen=True)
class Row:
    """A prompt and its responses: (completion,) for SFT, (chosen, rejected) for pairs."""

    prompt: Text
    responses: tuple[Text, ...]
    where: str  # the file or data set, and the row in it counted from 1


def local(fields: dict) -> tuple[Text, tuple[Text, ...]]:
    """Your own rows: a pair (prompt, chosen, rejected), or for SFT prompt and completion, text, or
    messages.

    Each may be text or chat messages; `chosen` and `rejected` may hold the whole conversation.
    """
    given = {name for name, value in fields.items() if value is not None}
    if given & {"chosen", "rejected"}:
        names = ("chosen", "rejected") if "rejected" in given else ("chosen",)
    else:
        names = tuple(name for name in ("completion", "messages", "text") if name in given)[:1]
    if not names:
        raise Malformed("none of the fields 'chosen', 'completion', 'messages', 'text' is there")
    responses = tuple(_content(fields, name) for name in names)
    if names == ("text",):
        return "", responses
    prompt = _content(fields, "prompt") if "prompt" in given else None
    if any(isinstance(part, list) for part in (prompt, *responses)):
        return _chat(prompt, responses)
    return _text(fields, "prompt"), responses


def hh(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Anthropic's transcripts, split after the last assistant cue up to which both sides are the
    same.
    """
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    ends = [
        cue.end()
        for cue in re.finditer(ASSISTANT, chosen)
        if rejected.startswith(chosen[: cue.end()])
    ]
    if not ends:
        raise Unusable("no shared assistant turn")
    prompt = chosen[: ends[-1]]
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def shp(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Stanford Human Preferences: pairs of Reddit answers whose scores differ twofold or more."""
    history, *answers = (_text(fields, name) for name in ("history", "human_ref_A", "human_ref_B"))
    label, ratio = _number(fields, "labels"), _number(fields, "score_ratio")
    if label not in (0, 1):
        raise Malformed("field 'labels' is neither 1 (A is preferred) nor 0 (B is)", repr(label))
    if ratio < 2:
        raise Filtered("score ratio below 2")
    best, other = answers if label == 1 else reversed(answers)
    return f"\n\nHuman: {history}{ASSISTANT}", (_spaced(best), _spaced(other))


def imdb(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Film reviews, without a prompt; HTML line breaks become newlines."""
    text = re.sub(r"\s*<br\s*/?>[ \t]*", "\n", _text(fields, "text"))
    return "", (text.strip(),)


def tldr(fields: dict) -> tuple[str, tuple[str, ...]]:
    """Reddit posts and summaries: the prompt ends in one "TL;DR:", each summary starts with one
    space.

    Some sets of comparisons have news articles among the posts; these are left out.
    """
    if "summaries" in fields:
        fields = _compared(fields)
    prompt = _text(fields, "prompt").rstrip()
    if re.match(r"\s*(Article|TITLE):", prompt):  # a post starts with its subreddit
        raise Filtered(NEWS)
    end = re.search(r"(\s*)(?:TL;DR:\s*)+$", prompt)
    prompt = prompt[: end.start()] + end[1] + CUE if end else f"{prompt}\n{CUE}"
    name = next(
        (name for name in ("chosen", "completion") if fields.get(name) is not None), "label"
    )
    names = (name, "rejected") if fields.get("rejected") is not None else (name,)
    summaries = tuple(_spaced(re.sub(r"^(\s*TL;DR:)+", "", _text(fields, name))) for name in names)
    if len(summaries) == 2 and summaries[0] == summaries[1]:
        raise Filtered("summaries are equal")
    if len(summaries) == 2 and min(len(summary.split()) for summary in summaries) < 5:
        raise Filtered("a summary has fewer than 5 words")
    return prompt, summaries


def _compared(fields: dict) -> dict:
    """A record of OpenAI's comparisons (a post, two summaries, and which is better) as prompt,
    chosen, rejected.
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
    """News articles and their highlights, a sentence a line (some before a detached stop), as one
    text.
    """
    highlights = re.sub(r" (?=[.,;:?!]( |$))", "", " ".join(_text(fields, "highlights").split()))
    return f"Article:\n\n{_text(fields, 'article').strip()}\n\n{CUE}", (_spaced(highlights),)


def _toy(data, kind: str) -> dict[str, list[Row]]:
    return {split: [Row(*row) for row in rows] for split, rows in toy.rows(data, kind).items()}


@dataclass(frozen=True)
class Source:
    """How a record becomes (prompt, responses), and what is special about the data set."""

    parse: Callable[[dict], tuple] | None
    example: str = ""  # a right record, shown beside a wrong one
    cue: str = ""  # what its prompts end in, which asks for the answer and must not be cut off
    truncate: str = (
        "keep_start"  # which part of a prompt that is too long stays, for data.truncate="auto"
    )
    pairs: bool = True  # it has pairs; every source has responses for SFT
    sorted: bool = (
        False  # its rows come sorted (by label, say), so they are read in a hashed order instead
    )
    make: Callable | None = (
        None  # (data, kind) -> the rows of both splits, for a source without records
    )


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


def read(data, kind: str, ledger: Ledger) -> dict[str, list[Row]]:
    """The rows of both splits, {"train": [...], "eval": [...]}; `kind` is "sft" or "pairs".

    Raises ValueError or FileNotFoundError that says which file, row, field or split is wrong.
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
        rows = source.make(data, kind)
        ledger.train.read, ledger.eval.read = len(rows["train"]), len(rows["eval"])
    else:
        rows = _read_splits(data, kind, source, ledger)
    train_prompts = {_prompt_key(row) for row in rows["train"]}
    ledger.shared_prompts = sum(_prompt_key(row) in train_prompts for row in rows["eval"])
    return rows


def _read_splits(data, kind: str, source: Source, ledger: Ledger) -> dict[str, list[Row]]:
    splits = find_splits(data.path)
    train_names, eval_name = _choose(list(splits), data)
    records = itertools.chain.from_iterable(splits[name]() for name in train_names)
    train = _parse(records, data, kind, source, ledger.train, data.max_rows)
    if eval_name:
        evals = _parse(splits[eval_name](), data, kind, source, ledger.eval, data.max_eval_rows)
        return {"train": train, "eval": evals}
    train, held = _hold_out(train, data.eval_fraction)
    evals = held[: data.max_eval_rows or None]
    ledger.train.held_out, ledger.eval.read = len(held), len(evals)
    return {"train": train, "eval": evals}


def _choose(names: list[str], data) -> tuple[list[str], str]:
    """The splits to train on and the one to evaluate on ("": hold out a part of the training
    rows).
    """
    train = data.train_split.split("+")
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
            f"data.eval_split={data.eval_split!r} is trained on (data.train_split={data.train_split!r}): "
            "leave it empty to hold out data.eval_fraction of the prompts."
        )
    unused = (name for name in EVAL_SPLITS if name in names and name not in train)
    return train, data.eval_split or next(unused, "")


def _hold_out(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Parts the rows by prompt into (train, held out); a prompt's side depends on its text alone.

    So SFT and DPO on the same prompts hold out the same ones. Few prompts: one at least is held
    out.
    """
    keys = [_prompt_key(row) for row in rows]
    hashes = {key: _hash(key) for key in keys}
    held = {key for key in hashes if hashes[key] < fraction}
    if not held and fraction > 0 and len(hashes) > 1:
        held = {min(hashes, key=hashes.get)}
    train, out = [], []
    for row, key in zip(rows, keys, strict=True):
        (out if key in held else train).append(row)
    return train, out


def _prompt_key(row: Row) -> str:
    """The text that tells prompts apart; rows without a prompt (film reviews) go by their
    response.
    """
    return json.dumps(row.prompt or row.responses[0])


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same in every process."""
    return (
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")
        / 2**48
    )


def _parse(
    records: Iterable, data, kind: str, source: Source, counts: Counts, limit: int
) -> list[Row]:
    """The first `limit` good rows (0: all) of (where, record), with the others counted by
    reason.
    """
    if source.sorted:
        records = sorted(records, key=lambda record: _hash(str(record[1])))
    rows = []
    for where, record in records:
        if limit and len(rows) == limit:
            break
        counts.read += 1
        try:
            rows.append(Row(*_responses(*source.parse(fields_of(record)), kind), where))
        except Filtered as reason:
            counts.filter(str(reason))
        except Unusable as reason:
            counts.drop(str(reason), where)
        except Malformed as error:
            if data.on_bad_row == "error":
                raise ValueError(_explain(error, where, record, data, source)) from None
            counts.drop(error.reason, where)
    return rows


def _responses(
    prompt: Text, responses: tuple[Text, ...], kind: str
) -> tuple[Text, tuple[Text, ...]]:
    """The responses that this kind of training needs, neither empty nor equal."""
    if kind == "pairs" and len(responses) == 1:
        raise Malformed("a pair needs two responses, in 'chosen' and 'rejected'")
    responses = responses[:1] if kind == "sft" else responses
    said = [
        response
        if isinstance(response, str)
        else "".join(message["content"] for message in response)
        for response in responses
    ]
    if not all(text.strip() for text in said):
        raise Unusable("empty response")
    if len(responses) == 2 and (responses[0] == responses[1] or said[0].strip() == said[1].strip()):
        raise Unusable("chosen and rejected are equal")
    return prompt, responses


def _explain(error: Malformed, where: str, record, data, source: Source) -> str:
    """What is wrong with a record, for the person who can mend it."""
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
            "Mend the row, or drop and count such rows with --config.data.on_bad_row=drop.",
        ]
    )


def _text(fields: dict, name: str) -> str:
    """A field that must be text."""
    if fields.get(name) is None:
        raise Malformed(f"field {name!r} is missing")
    if not isinstance(fields[name], str):
        raise Malformed(f"field {name!r} is not text", _shown(fields[name]))
    return fields[name]


def _number(fields: dict, name: str) -> float:
    """A field that must be a number."""
    if not isinstance(fields.get(name), int | float):
        raise Malformed(f"field {name!r} is missing or not a number", _shown(fields.get(name)))
    return fields[name]


def _content(fields: dict, name: str) -> Text:
    """A field that must be text or chat messages."""
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
                    _shown(message),
                )
    return messages


def _spaced(text: str) -> str:
    return " " + text.strip()


def _shown(value) -> str:
    text = repr(value)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"


def _chat(prompt: Text | None, responses: tuple[Text, ...]) -> tuple[list, tuple[list, ...]]:
    """Chat messages as (prompt, responses), whether each response is the answer or the whole
    conversation.
    """
    chats = [_messages("assistant", response) for response in responses]
    given = _messages("user", prompt or [])
    if not all(chats):
        raise Unusable("empty response")
    if given and chats[0][0]["role"] == "assistant" and chats[0][: len(given)] != given:
        start, answers = given, chats
    else:
        turn = len(given) if isinstance(prompt, list) and given else _last_shared_turn(chats)
        start, answers = chats[0][:turn], [chat[turn:] for chat in chats]
        if any(chat[:turn] != start for chat in chats) or any(
            message not in start for message in given
        ):
            raise Malformed("the conversation does not continue 'prompt'", _shown(start))
    roles = [[message["role"] for message in answer] for answer in answers]
    if not start or any(turns[:1] != ["assistant"] or turns[-1] != "assistant" for turns in roles):
        raise Malformed("the response is not an assistant's turn after a prompt", f"roles {roles}")
    return start, tuple(answers)


def _messages(role: str, content: Text) -> list:
    """Text as the one message of a role; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _last_shared_turn(chats: list[list]) -> int:
    """Where the last assistant turn starts, up to which all conversations are the same."""
    shortest = min(map(len, chats))
    differ = (
        turn for turn in range(shortest) if any(chat[turn] != chats[0][turn] for chat in chats)
    )
    for turn in range(next(differ, shortest - 1), 0, -1):
        if all(chat[turn]["role"] == "assistant" for chat in chats):
            return turn
    raise Unusable("no shared assistant turn")
