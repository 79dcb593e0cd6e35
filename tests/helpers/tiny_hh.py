"""Made-up dialogues in the schema of Anthropic/hh-rlhf."""

import json
import pathlib
import random

ANIMALS = ["cat", "dog", "frog", "bird", "fish", "cow"]
PLACES = ["the park", "the sea", "a big tree", "my house", "the red boat"]


def dialogues(count: int, seed: int = 0) -> list[dict]:
    """Return rows whose chosen answer is a sentence; every third has an earlier turn."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
        shared = f"\n\nHuman: Where did {animal} {number} go?\n\nAssistant:"
        if number % 3 == 0:
            shared = f"\n\nHuman: Hello?\n\nAssistant: Hi.{shared}"
        rows.append(dict(chosen=f"{shared} It went to {place}.", rejected=f"{shared} No."))
    return rows


def write_dialogues(folder, count: int = 100) -> pathlib.Path:
    """Write them where the hub's data set has them; return the folder."""
    path = pathlib.Path(folder) / "harmless-base" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in dialogues(count)))
    return pathlib.Path(folder)
