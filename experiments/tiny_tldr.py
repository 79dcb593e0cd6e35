"""A tiny TL;DR in the schemas of the hub's data sets: python -m experiments.tiny_tldr FOLDER

    FOLDER/posts  comparisons  cnn_dailymail  tokenizer

What configs/tldr.py:tiny trains on: made-up posts of a few sentences, whose good summaries are
shorter than the bad.
"""

import json
import pathlib
import random
import sys

from experiments.imdb_tokenizer import train

WORDS = dict(
    who=[
        "my cat",
        "my boss",
        "my aunt",
        "my son",
        "a pal",
    ],  # all texts are about as long: few programs
    did=["broke", "sold", "lost", "found", "drew"],
    what=["the car", "my lamp", "my pen", "the hat", "two eggs"],
    when=["at ten", "in time", "at noon", "in May", "by bus"],
)


def story(rng) -> tuple[str, str, str]:
    """A post, a good summary and a bad one."""
    said = {name: rng.choice(words) for name, words in WORDS.items()}
    event = f"{said['who']} {said['did']} {said['what']}"
    post = f"So {said['when']} {event}. I do not know what to say. What now?"
    return (
        post,
        f"{event} {said['when']}.",
        f"so so {event} {said['when']} and what now, what to say now.",
    )


def posts(count: int, seed: int) -> list[dict]:
    """Rows as of CarperAI/openai_summarize_tldr."""
    rng = random.Random(seed)
    stories = [story(rng) for _ in range(count)]
    return [
        dict(
            prompt=f"SUBREDDIT: r/advice\nTITLE: Help {number}\nPOST: {post}\nTL;DR:",
            label=f" {good}",
        )
        for number, (post, good, _) in enumerate(stories, 1000 * (seed + 1))
    ]


def comparisons(count: int, seed: int) -> list[dict]:
    """Rows as of CarperAI/openai_summarize_comparisons."""
    rng = random.Random(seed)
    stories = [story(rng) for _ in range(count)]
    return [
        dict(
            prompt=f"SUBREDDIT: r/advice\nTITLE: Help {number}\nPOST: {post}",
            chosen=f"TL;DR: {good}",
            rejected=f"TL;DR: {bad}",
        )
        for number, (post, good, bad) in enumerate(stories, 1000 * (seed + 1))
    ]


def articles(count: int, seed: int) -> list[dict]:
    """Rows as of abisee/cnn_dailymail."""
    rng = random.Random(seed)
    stories = [story(rng) for _ in range(count)]
    return [
        dict(
            article=f"LONDON, England ({number}) -- {post} {post}",
            id=str(number),
            highlights=good.replace(".", " .") + "\nMore .",
        )
        for number, (post, good, _) in enumerate(stories, 1000 * (seed + 1))
    ]


def write(folder) -> pathlib.Path:
    """All of it; the folder."""
    folder = pathlib.Path(folder)
    splits = {
        "posts": (posts, {"train": 120, "valid": 10, "test": 30}),
        "comparisons": (comparisons, {"train": 80, "test": 16, "valid1": 8}),
        "cnn_dailymail": (articles, {"train": 4, "validation": 4, "test": 20}),
    }
    for name, (make, sizes) in splits.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed, (split, count) in enumerate(sizes.items()):
            rows = make(count, seed)
            (folder / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    tokenizer = train((row["prompt"] + row["label"] for row in posts(120, 0)), 384)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


if __name__ == "__main__":
    print(write(sys.argv[1]))
