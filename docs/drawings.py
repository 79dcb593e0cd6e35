"""Draw the pictures of docs/architecture.md: python docs/drawings.py

Writes the SVG files beside this one. A test checks that they are what this script draws.
"""

import pathlib
from html import escape

HERE = pathlib.Path(__file__).parent
FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, PAPER, LINE = "#1b1f24", "#ffffff", "#57606a"
# Packages, from the lowest level upwards, as in the table of architecture.md.
COLOURS = {
    "file": "#f6f8fa",
    "data": "#ddf4ff",
    "parallel": "#e6e0f8",
    "models": "#dafbe1",
    "training": "#fff1c2",
}


class Drawing:
    """An SVG picture on white paper, so that it is readable in dark mode too."""

    def __init__(self, width: int, height: int):
        self._size = (width, height)
        self._parts = []

    def box(self, x, y, width, height, colour, dashed=False):
        dash = " stroke-dasharray='4 3'" if dashed else ""
        self._parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{colour}' "
            f"stroke='{LINE}'{dash}/>"
        )

    def text(self, x, y, text, size=13, bold=False, anchor="middle", colour=INK):
        weight = " font-weight='bold'" if bold else ""
        self._parts.append(
            f"<text x='{x}' y='{y}' font-size='{size}'{weight} text-anchor='{anchor}' "
            f"fill='{colour}'>{escape(text)}</text>"
        )

    def arrow(self, *points):
        path = " ".join(f"{x},{y}" for x, y in points)
        self._parts.append(
            f"<polyline points='{path}' fill='none' stroke='{LINE}' stroke-width='1.6' "
            "marker-end='url(#head)'/>"
        )

    def svg(self) -> str:
        width, height = self._size
        head = (
            "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
            f"markerHeight='7' orient='auto'><path d='M0,0 L10,5 L0,10 z' fill='{LINE}'/></marker>"
            "</defs>"
        )
        lines = [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
            f"viewBox='0 0 {width} {height}' {FONT}>",
            head,
            f"<rect width='{width}' height='{height}' fill='{PAPER}'/>",
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def way_of_a_batch() -> str:
    """Return the steps from a row of a file to metrics, with the file that does each step."""
    drawing = Drawing(980, 470)
    steps = [  # (package, what it is, file), in reading order
        ("file", "a row", ["jsonl, csv, parquet, hub"]),
        ("data", "fields", ["data/readers.py"]),
        ("data", "prompt, responses", ["data/sources.py"]),
        ("data", "token ids", ["data/tokenizer.py", "data/ledger.py"]),
        ("data", "rows of step n", ["data/batches.py"]),
        ("data", "packed batch", ["data/packing.py"]),
        ("parallel", "batch on the mesh", ["parallel/sharding.py"]),
        ("models", "hidden states", ["models/transformer.py", "models/attention.py"]),
        ("models", "log-probs", ["models/log_probs.py"]),
        ("training", "loss", ["training/objectives.py", "training/losses.py"]),
        ("training", "update", ["training/step.py", "training/optim.py"]),
        ("training", "metrics, checkpoints", ["training/metrics.py", "training/checkpoint.py"]),
    ]
    width, height, gap, columns = 200, 84, 40, 4
    left, top = 30, 60
    drawing.text(30, 34, "How a batch moves through the code", size=18, bold=True, anchor="start")
    places = []
    for number, (package, name, files) in enumerate(steps):
        row, column = divmod(number, columns)
        x = left + column * (width + gap)
        y = top + row * (height + 50)
        places.append((x, y))
        drawing.box(x, y, width, height, COLOURS[package])
        drawing.text(x + width / 2, y + 28, name, size=15, bold=True)
        for line, file in enumerate(files):
            drawing.text(x + width / 2, y + 50 + 18 * line, file, size=12, colour=LINE)
    for (x, y), (next_x, next_y) in zip(places, places[1:], strict=False):
        if next_y == y:
            drawing.arrow((x + width, y + height / 2), (next_x - 2, y + height / 2))
        else:  # down to the start of the next line
            below = y + height + 25
            drawing.arrow(
                (x + width / 2, y + height),
                (x + width / 2, below),
                (next_x + width / 2, below),
                (next_x + width / 2, next_y - 2),
            )
    names = {
        "data": "data/: numpy, on the host",
        "parallel": "parallel/: the device mesh",
        "models": "models/: jitted, on the devices",
        "training": "training/: the jitted step and its loop",
    }
    x = 30
    for package, name in names.items():
        drawing.box(x, 438, 16, 16, COLOURS[package])
        drawing.text(x + 24, 451, name, size=12, anchor="start")
        x += 46 + 6.6 * len(name)
    return drawing.svg()


def packed_batch() -> str:
    """Return the layout of a packed batch: prompts and responses once, and rows for attention."""
    drawing = Drawing(980, 500)
    cell = 40
    colours = {"prompt": "#ddf4ff", "chosen": "#dafbe1", "rejected": "#ffd8d3"}

    def cells(x, y, kind, label, count):
        for index in range(count):
            drawing.box(x + index * cell, y, cell, cell, colours[kind])
            drawing.text(x + index * cell + cell / 2, y + 25, f"{label}{index}", size=12)
        return x + count * cell

    def padding(x, y, count):
        for index in range(count):
            drawing.box(x + index * cell, y, cell, cell, "#f6f8fa", dashed=True)

    drawing.text(
        30,
        34,
        "A packed batch: two pairs of one prompt, p with c over r and b over r",
        size=18,
        bold=True,
        anchor="start",
    )
    drawing.text(
        30,
        62,
        "tokens: dense layers see one flat sequence, each prompt and each response once",
        anchor="start",
    )
    end = cells(30, 76, "prompt", "p", 4)
    end = cells(end, 76, "chosen", "c", 3)
    end = cells(end, 76, "rejected", "r", 2)
    cells(end, 76, "chosen", "b", 3)

    drawing.text(
        30,
        168,
        "attention, first part: prompts, padded to the longest",
        anchor="start",
    )
    end = cells(30, 182, "prompt", "p", 4)
    padding(end, 182, 1)
    drawing.text(30, 264, "attention, second part: responses to each prompt", anchor="start")
    top = 278
    responses = (("chosen", "c", 3), ("rejected", "r", 2), ("chosen", "b", 3))
    for kind, letter, count in responses:
        end = cells(30, top, kind, letter, count)
        padding(end, top, 3 - count)
        top += cell + 8
    see_prompt = "each sees the whole prompt,"
    drawing.text(30 + 3 * cell + 16, 332, see_prompt, size=12, anchor="start")
    drawing.text(30 + 3 * cell + 16, 350, "and itself from left to right", size=12, anchor="start")

    x = 440
    notes = [
        ("response_index", "for each pair, which responses are chosen and rejected"),
        ("logit_positions", "where the output head runs: before each response token"),
        ("segment_ids", "which response each of these belongs to"),
        ("response_lengths", "tokens of each response"),
        ("last_token", "where a reward model reads its reward"),
        ("token_slots", "where a token is in attention's rows"),
    ]
    for line, (name, meaning) in enumerate(notes):
        drawing.text(x, 196 + 32 * line, name, bold=True, anchor="start")
        drawing.text(x + 150, 196 + 32 * line, meaning, size=12, anchor="start")
    drawing.text(
        30,
        470,
        "The head runs only at logit_positions, in chunks; "
        "logits of all tokens are never in memory.",
        anchor="start",
    )
    return drawing.svg()


PICTURES = {"way_of_a_batch.svg": way_of_a_batch, "packed_batch.svg": packed_batch}


def main():
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())


if __name__ == "__main__":
    main()
