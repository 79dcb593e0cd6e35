"""Known data sets: from the fields of a record to a prompt and its responses.

To add a data set, write a function from the fields of one record to a Row, and its line in SOURCES.
Where the records are (a file, a folder, the hub) is said by `data.path`, so any source reads from
anywhere.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from dpo_jax.data.ledger import Filtered, Malformed, Unusable
from dpo_jax.data.rows import ONE_PAIR, Row, numbers_of, text_field
from dpo_jax.data.shapes import local, local_or_prompt, parse_columns, shp

ASSISTANT = "\n\nAssistant:"
CUE = "TL;DR:"
NEWS = "news article, not a Reddit post"


def hh(fields: dict) -> Row:
    """Anthropic's transcripts, split after the last assistant cue that both sides share."""
    chosen, rejected = text_field(fields, "chosen"), text_field(fields, "rejected")
    # Transcripts differ in their last turn, so the last cue they share starts it.
    prompt = ""
    for cue in re.finditer(ASSISTANT, chosen):
        beginning = chosen[: cue.end()]
        if rejected.startswith(beginning):
            prompt = beginning
    if not prompt:
        raise Unusable("no shared assistant turn")
    return Row(prompt, (chosen[len(prompt) :], rejected[len(prompt) :]), ONE_PAIR)


def imdb(fields: dict) -> Row:
    """Film reviews, without a prompt; HTML line breaks become newlines."""
    text = re.sub(r"\s*<br\s*/?>[ \t]*", "\n", text_field(fields, "text"))
    return Row("", (text.strip(),))


def tldr(fields: dict) -> Row:
    """Reddit posts and summaries.

    The prompt ends in one "TL;DR:", and each summary starts with one space. Some sets of
    comparisons have news articles among the posts; these are left out.
    """
    if "summaries" in fields:
        fields = _compared(fields)
    prompt = text_field(fields, "prompt").rstrip()
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
        without_cue = re.sub(r"^(\s*TL;DR:)+", "", text_field(fields, name))
        summaries.append(_spaced(without_cue))
    if len(summaries) == 2 and summaries[0] == summaries[1]:
        raise Filtered("summaries are equal")
    if len(summaries) == 2 and min(len(summary.split()) for summary in summaries) < 5:
        raise Filtered("a summary has fewer than 5 words")
    return Row(prompt, tuple(summaries), ONE_PAIR if len(summaries) == 2 else ())


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
    subreddit, title, post = (text_field(info, name) for name in ("subreddit", "title", "post"))
    return dict(
        prompt=f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\n{CUE}",
        chosen=text_field(summaries[choice], "text"),
        rejected=text_field(summaries[1 - choice], "text"),
    )


def cnn_dailymail(fields: dict) -> Row:
    """News articles and their highlights, as one text.

    Highlights are a sentence a line, some with a blank before the full stop.
    """
    # The summary is to be one line, as TL;DR's are.
    one_line = " ".join(text_field(fields, "highlights").split())
    highlights = re.sub(r" (?=[.,;:?!]( |$))", "", one_line)
    article = text_field(fields, "article").strip()
    return Row(f"Article:\n\n{article}\n\n{CUE}", (_spaced(highlights),))


def _spaced(text: str) -> str:
    """Return a response that continues its prompt with one space."""
    return " " + text.strip()


@dataclass(frozen=True)
class Source:
    """A data set's parser, from the fields of a record to a Row, and its peculiarities."""

    parse: Callable[[dict], Row] | None  # None: the data is generated
    example: str = ""  # a right record, shown beside a wrong one
    cue: str = ""  # what its prompts end in, which asks for the answer and must not be cut off
    # Which part of a too long prompt stays, for data.truncate="auto": the end has the question.
    truncate: str = "keep_end"
    pairs: bool = True  # it has pairs; every source has responses for SFT
    sorted: bool = False  # rows come sorted (by label, say): they are read in a hashed order


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
    "imdb": Source(
        imdb, '{"text": "A fine film."}', truncate="keep_start", pairs=False, sorted=True
    ),
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
    "toy": Source(None, truncate="keep_start"),
}


def parser(data, *, takes_prompts: bool = False) -> Callable[[dict], Row]:
    """Return the function that reads a record's fields as the config `data` says.

    takes_prompts: read local rows of a prompt alone, too. Raises ValueError where data.columns is
    wrong, or set for a source other than local.
    """
    parse = _parser_of_texts(data, takes_prompts)
    if not data.weight and not data.margin:
        return parse
    return functools.partial(_with_numbers, parse, data.weight, data.margin)


def _with_numbers(parse: Callable[[dict], Row], weight: str, margin: str, fields: dict) -> Row:
    # The texts first: a row that is left out by design needs no numbers.
    row = parse(fields)
    return dataclasses.replace(row, numbers=numbers_of(fields, weight, margin))


def _parser_of_texts(data, takes_prompts: bool) -> Callable[[dict], Row]:
    columns = parse_columns(data.columns)
    if data.source == "local":
        parse = local_or_prompt if takes_prompts else local
        return functools.partial(parse, columns=columns, ignore=tuple(data.ignore))
    if columns:
        raise ValueError(
            f"data.columns={data.columns!r} is for data.source=local; the columns of "
            f"data.source={data.source} are known."
        )
    return SOURCES[data.source].parse
