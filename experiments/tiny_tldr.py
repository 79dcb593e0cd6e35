"""Write a tiny made-up TL;DR data set in the formats of the real ones.

    python -m experiments.tiny_tldr FOLDER

Writes FOLDER/posts, FOLDER/comparisons, FOLDER/cnn_dailymail and FOLDER/tokenizer, which
configs/tldr.py:tiny trains on. The posts are a few sentences long, and their good summaries are
shorter than the bad ones.
"""

import json
import pathlib
import random
import sys

from experiments.imdb_tokenizer import train

# Words of about the same length, so that texts have few different lengths and few programs compile.
WORDS = dict(
    who=["my cat", "my boss", "my aunt", "my son", "a pal"],
    did=["broke", "sold", "lost", "found", "drew"],
    what=["the car", "my lamp", "my pen", "the hat", "two eggs"],
    when=["at ten", "in time", "at noon", "in May", "by bus"],
)
# Folder -> split -> number of rows. A split's position is its seed.
POSTS = {"train": 120, "valid": 10, "test": 30}
COMPARISONS = {"train": 80, "test": 16, "valid1": 8}
ARTICLES = {"train": 4, "validation": 4, "test": 20}
PIECES = 384  # size of the tokenizer's vocabulary


def story(rng: random.Random) -> tuple[str, str, str]:
    """Return a post, a good summary and a bad one."""
    said = {name: rng.choice(words) for name, words in WORDS.items()}
    event = f"{said['who']} {said['did']} {said['what']}"
    post = f"So {said['when']} {event}. I do not know what to say. What now?"
    good = f"{event} {said['when']}."
    bad = f"so so {event} {said['when']} and what now, what to say now."
    return post, good, bad


def numbered_stories(count: int, seed: int) -> list[tuple[int, tuple[str, str, str]]]:
    """Return `count` stories with a number each, different for each seed."""
    rng = random.Random(seed)
    stories = [story(rng) for _ in range(count)]
    return list(enumerate(stories, start=1000 * (seed + 1)))


def posts(count: int, seed: int) -> list[dict]:
    """Return rows in the format of CarperAI/openai_summarize_tldr."""
    rows = []
    for number, (post, good, _) in numbered_stories(count, seed):
        prompt = f"SUBREDDIT: r/advice\nTITLE: Help {number}\nPOST: {post}\nTL;DR:"
        rows.append(dict(prompt=prompt, label=f" {good}"))
    return rows


def comparisons(count: int, seed: int) -> list[dict]:
    """Return rows in the format of CarperAI/openai_summarize_comparisons."""
    rows = []
    for number, (post, good, bad) in numbered_stories(count, seed):
        prompt = f"SUBREDDIT: r/advice\nTITLE: Help {number}\nPOST: {post}"
        rows.append(dict(prompt=prompt, chosen=f"TL;DR: {good}", rejected=f"TL;DR: {bad}"))
    return rows


def articles(count: int, seed: int) -> list[dict]:
    """Return rows in the format of abisee/cnn_dailymail."""
    rows = []
    for number, (post, good, _) in numbered_stories(count, seed):
        article = f"LONDON, England ({number}) -- {post} {post}"
        highlights = good.replace(".", " .") + "\nMore ."
        rows.append(dict(article=article, id=str(number), highlights=highlights))
    return rows


def write(folder) -> pathlib.Path:
    """Write the data sets and their tokenizer to a folder; return the folder."""
    folder = pathlib.Path(folder)
    data_sets = {
        "posts": (posts, POSTS),
        "comparisons": (comparisons, COMPARISONS),
        "cnn_dailymail": (articles, ARTICLES),
    }
    for name, (make_rows, splits) in data_sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed, (split, count) in enumerate(splits.items()):
            lines = [json.dumps(row) + "\n" for row in make_rows(count, seed)]
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
    texts = [row["prompt"] + row["label"] for row in posts(POSTS["train"], 0)]
    train(texts, PIECES).save_pretrained(folder / "tokenizer")
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1]))
