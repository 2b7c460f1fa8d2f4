"""`log/report.html`: a finished run on one page, generated from the files in its folder.

The page is self-contained: plots are embedded, there is no script, and its content security policy lets a browser load
nothing. All text of the run is escaped, because class and file names may contain anything.
"""

from __future__ import annotations

import base64
import csv
import html
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils import metrics
from utils.files import write_text
from utils.metrics import read_rows
from utils.names import class_name
from utils.reporting import confusion, suspects
from utils.reporting.plots import CONFUSIONS

FILE = "report.html"
LISTED = 20  # suspects in the table
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
p { overflow-wrap: anywhere; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: .6rem 0; }
.plots .plots { flex: 1 1 520px; margin: 0; }
.plots img { max-width: 100%; border: 1px solid #e4e4e4; border-radius: 4px; }
.plots.half img { flex: 1 1 440px; min-width: 0; max-width: 530px; }
.scroll { overflow: auto; max-height: 32rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .15rem .7rem .15rem 0; text-align: left; vertical-align: top; max-width: 36rem; overflow-wrap: break-word; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
thead th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #bbb; }
tbody tr:nth-child(even) { background: #f6f7f9; }
summary { cursor: pointer; color: #2a6f97; }
pre { background: #f6f7f9; padding: .8rem; overflow: auto; font-size: .82rem; }
"""
SHARES = {
    "clean_accuracy": "ACC, clean test images that get their label",
    "attack_success_rate": "ASR, triggered test images that get the attacker's label",
    "robust_accuracy": "RA, triggered test images that get their original label",
    "clean_as_target": "the same images without the trigger that get the attacker's label",
}


def write_page(folder: Path, title: str) -> None:
    """Write the page of the run in `folder`, which has finished at least one epoch; missing plots are omitted."""
    rows = read_rows(folder / "log" / metrics.FILE)
    parts = [f"<h1>{escape(title)}</h1>", *section("Last epoch", results(rows))]
    parts += section("Training", plots(folder / "log", ("accuracy.png", "purity.png"), "half"))
    splits = tuple(f"split_{stage}.png" for stage in dict.fromkeys(row["stage"] for row in rows))
    parts += section("Last split of each stage", plots(folder / "log", splits, "half"))
    parts += section("Triggered images", plots(folder / "log", ("triggered.png",)))
    parts += section("Test images by class", plots(folder / "log", CONFUSIONS, "half") + classes(folder))
    parts += section("Features of the training images", plots(folder / "log", ("features.png",)))
    parts += section("Suspect training images", ranking(folder) + plots(folder, (suspects.PICTURE,)))
    parts += section("Epochs", details("Every epoch", epochs(rows)))
    settings = (folder / "config.yaml").read_text(encoding="utf-8")
    parts += section("Settings", details("Every setting", f"<pre>{escape_lines(settings)}</pre>"))
    write_text(folder / "log" / FILE, document(title, parts))


def document(title: str, parts: Iterable[str]) -> str:
    """Return the HTML document with these parts as its body."""
    return "\n".join((
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>", *parts, "</body>", "</html>", "",
    ))  # fmt: skip


def escape(text: object) -> str:
    """Return a text as HTML; characters that are not printable (control, text direction) become visible escapes."""
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)))


def escape_lines(text: str) -> str:
    """Return a text as HTML, as `escape`, but keep its line breaks."""
    return "\n".join(map(escape, text.split("\n")))


def section(heading: str, body: str) -> list[str]:
    """Return a heading and its body; nothing if the body is empty."""
    return [f"<h2>{escape(heading)}</h2>", body] if body else []


def details(summary: str, body: str) -> str:
    """Return a part that is collapsed until it is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def plots(folder: Path, names: Sequence[str], kind: str = "") -> str:
    """Return the PNG files that exist, embedded."""
    found = [folder / name for name in names if (folder / name).is_file()]
    images = (
        f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in found
    )
    return f'<div class="plots {kind}">{"".join(images)}</div>' if found else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; columns of numbers are aligned to the right, None is an empty cell."""
    cells = [["" if cell is None else cell for cell in row] for row in rows]
    kinds = [
        ' class="n"' if all(cell == "" or isinstance(cell, Number) for cell in column) else ""
        for column in (zip(*cells, strict=True) if cells else [()] * len(head))
    ]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in cells
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


class Number(str):
    """The text of a number."""


def percent(share: float | None) -> Number | None:
    """Return e.g. `93.41 %`."""
    return None if share is None else Number(f"{100 * share:.2f} %")


def number(value: Any) -> Any:
    """Return a number as a short text, any other value unchanged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return Number(value if isinstance(value, int) else f"{value:.4g}")


def results(rows: list[dict[str, Any]]) -> str:
    """Return the figures of the last epoch."""
    last = rows[-1]
    lines: list[tuple[str, object]] = [(name, percent(last.get(key))) for key, name in SHARES.items()]
    if last["clean_pool_size"] is not None:
        lines.append(("images in the last clean pool", counted(last, "clean_pool")))
        lines.append(("TPR of the last split: poisoned images outside the clean pool", percent(last.get("split_tpr"))))
        lines.append(("FPR of the last split: clean images outside the clean pool", percent(last.get("split_fpr"))))
    lines += [(f"images in the set {name.replace('_', ' ')}", counted(last, name)) for name in metrics.sets_of(last)]
    lines += [(name.replace("_", " "), number(value)) for name, value in metrics.own_figures(last).items()]
    lines.append(("epochs, seconds", f"{last['epoch'] + 1}, {sum(row['seconds'] for row in rows):.0f}"))
    return table(("figure", "value"), [line for line in lines if line[1] is not None])


def counted(row: dict[str, Any], name: str) -> str:
    """Return the size of a set of training images, and how many of them are poisoned, if that is known."""
    found = row.get(f"poisoned_in_{name}")
    return f"{row[f'{name}_size']}" + ("" if found is None else f", {found} of them poisoned")


def classes(folder: Path) -> str:
    """Return the accuracy of each class and the class that it is most often mistaken for, and the ASR of each original class,
    from `confusion.json`."""
    path = folder / "log" / confusion.FILE
    if not path.is_file():
        return ""
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows: list[tuple[object, ...]] = []
    attacked = kept.get("per_class_attack_success_rate")  # files of earlier versions have none
    for label, (counts, share) in enumerate(zip(kept["confusion"], kept["per_class_accuracy"], strict=True)):
        wrong = [0 if other == label else count for other, count in enumerate(counts)]
        most = max(wrong)
        rival = f"{class_name(wrong.index(most), kept['class_names'])} ({most})" if most else None
        name = class_name(label, kept["class_names"])
        row = (number(label), name, number(sum(counts)), percent(share), rival)
        rows.append((*row, percent(attacked[label])) if attacked else row)
    head = ("class", "name", "images", "accuracy", "most often mistaken for", "ASR of its images")
    return table(head if attacked else head[:-1], rows)


def ranking(folder: Path) -> str:
    """Return the first rows of `suspects.csv`, and the quality of the ranking from `suspects.json` if it exists."""
    path, judged = folder / suspects.CSV, folder / suspects.QUALITY
    if not path.is_file():
        return ""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = itertools.islice(csv.reader(file), LISTED + 1)
    line = ""
    if judged.is_file():
        line = f"<p>{escape(suspects.quality_line(json.loads(judged.read_text(encoding='utf-8'))))}</p>"
    texts = {head.index(name) for name in ("name", "label", "model_label")}
    cells = [[cell if i in texts else Number(cell) for i, cell in enumerate(row)] for row in rows]
    return line + details(f"The first {len(rows)}", table([name.replace("_", " ") for name in head], cells))


def epochs(rows: list[dict[str, Any]]) -> str:
    """Return `metrics.jsonl` as a table without empty columns; epochs count from 1."""
    keys = [key for key in rows[-1] if key != "defense" and any(row.get(key) is not None for row in rows)]
    shown = (row | {"epoch": row["epoch"] + 1} for row in rows)
    return table([key.replace("_", " ") for key in keys], [[number(row.get(key)) for key in keys] for row in shown])
