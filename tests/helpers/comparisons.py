"""Made-up comparisons for a judge."""

from dpo_jax.evaluation import chat_api, judge
from dpo_jax.evaluation.judge import Comparison

LENGTHS = [(1, 2), (5, 2), (3, 4), (9, 1)]  # of ours and the other's, in words
LONGER_WINS = ["loss", "win", "loss", "win"]


def a_judge(**fields) -> judge.Judge:
    """Return a judge of summaries, with these fields changed."""
    return judge.Judge(**dict(model="judge", template="summary_concise", timeout=20.0) | fields)


def comparisons(count=4) -> list[Comparison]:
    """Return comparisons that differ in length; "longer wins" gives LONGER_WINS."""
    return [
        Comparison(f"post {i}", "ours " * LENGTHS[i % 4][0], "other " * LENGTHS[i % 4][1])
        for i in range(count)
    ]


def asked(prompt) -> int:
    """Return which of the comparisons a prompt is about."""
    return int(prompt.split("\npost ")[1].split("\n")[0])


def kept(folder) -> list[dict]:
    """Return the answers that are kept in a folder."""
    return chat_api.read(folder / "judgements.jsonl")


def quiet(_line):
    """Show no progress."""
