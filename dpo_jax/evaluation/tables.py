"""Tables of results as CSV, Markdown and LaTeX.

CSV has the numbers in full. Markdown and LaTeX have them rounded, with their intervals.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence

# What LaTeX does not print as it stands.
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": "$-$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "λ": r"$\lambda$",
    "×": r"$\times$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
}
MINUS = "−"  # of numbers that are shown


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: where its values stand in a row, and how they are shown.

    A row that lacks the field, or has None, has an empty cell.
    """

    title: str
    field: str
    number_format: str = ""  # empty: text, which is set to the left
    error: str = ""  # field of what is shown after ±
    interval: tuple[str, str] | tuple[()] = ()  # fields of the ends, shown in brackets

    def fields(self) -> list[str]:
        """Return the names of all fields that the column shows."""
        return [self.field, *([self.error] if self.error else []), *self.interval]

    def shown(self, row: dict) -> str:
        """Return the cell of a row as text."""
        value = row.get(self.field)
        if value is None:
            return ""
        if not self.number_format:
            return str(value)
        text = self._number(value)
        if self.error and row.get(self.error) is not None:
            text += f" ± {self._number(row[self.error])}"
        ends = [row.get(name) for name in self.interval]
        if ends and None not in ends:
            low, high = ends
            text += f" [{self._number(low)}, {self._number(high)}]"
        return text

    def _number(self, value) -> str:
        return format(value, self.number_format).replace("-", MINUS)


def to_csv(rows: Sequence[dict], columns: Sequence[Column]) -> str:
    """Return the columns' fields, under their own names and in full."""
    names = list(dict.fromkeys(name for column in columns for name in column.fields()))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[dict], columns: Sequence[Column]) -> str:
    """Return a table as GitHub renders it; numbers are set to the right."""
    lines = [[column.title for column in columns]]
    lines.append(["---:" if column.number_format else "---" for column in columns])
    for row in rows:
        # A bar would end the cell.
        lines.append([column.shown(row).replace("|", r"\|") for column in columns])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def to_latex(rows: Sequence[dict], columns: Sequence[Column]) -> str:
    """Return a tabular for the package booktabs."""
    alignment = "".join("r" if column.number_format else "l" for column in columns)
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule"]
    lines += [_latex_line([column.title for column in columns]), r"\midrule"]
    lines += [_latex_line([column.shown(row) for column in columns]) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _latex_line(cells: list[str]) -> str:
    return " & ".join(latex_text(cell) for cell in cells) + r" \\"


def latex_text(text: str) -> str:
    """Return text with all that LaTeX would read as its own escaped."""
    # One character at a time: what stands for one holds others that would be escaped again.
    return "".join(LATEX.get(letter, letter) for letter in text)


def write(stem: pathlib.Path, rows: Sequence[dict], columns: Sequence[Column]) -> None:
    """Write STEM.csv, STEM.md and STEM.tex."""
    made = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}
    for suffix, make in made.items():
        stem.with_suffix(suffix).write_text(make(rows, columns), encoding="utf-8")
