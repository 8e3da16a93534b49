"""The table of a lifecycle as Markdown, and its page: one HTML file that needs nothing else, plots as SVG."""

import glob
import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tools.lifecycle import measures
from tools.lifecycle.measures import Gain
from tools.lifecycle.stages import Stage

HEAD = ("stage", "seconds", "CPU s", "starts", "held-out measure", "n", "before", "after", "difference [95%]", "")
_NOTE = (
    "n counts held-out documents. A difference is that of the same documents under the model before and after the "
    "stage, with its 95% interval (Student, paired); where `before` is guessing it is the distance to it (Wilson). "
    "Seconds are of wall clock; beside other work on the machine they are more."
)
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#1f2937}
table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #d1d5db;padding:.25em .6em;text-align:right}
td:first-child,th:first-child,td:nth-child(5),th:nth-child(5),.text td{text-align:left}.better{color:#047857}
.worse{color:#b91c1c}figure{display:inline-block;margin:.5em}figcaption{font-size:13px}pre{white-space:pre-wrap}"""


def rows(stages: Sequence[Stage], records: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Of the table: the cost of a stage stands in its first row, then a row for each gain."""
    found = []
    for stage in stages:
        record = records[stage.name]
        cost = [stage.name, *(f"{record[name]:.0f}" for name in ("seconds", "cpu_seconds", "starts"))]
        gains = [_cells(measures.gain(each)) for each in stage.gains] or [[""] * 6]
        found += [[*(cost if number == 0 else [""] * 4), *cells] for number, cells in enumerate(gains)]
    total = [sum(record[name] for record in records.values()) for name in ("seconds", "cpu_seconds", "starts")]
    return [*found, ["all", *(f"{value:.0f}" for value in total), *[""] * 6]]


def _cells(gain: Gain) -> list[str]:
    numbers = f"{gain.before:.3f}", f"{gain.after:.3f}", f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return [gain.label, str(gain.count), *numbers, gain.verdict]


def markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{_NOTE}\n"


def page(title: str, stages: Sequence[Stage], table: Sequence[Sequence[str]], facts: Sequence[str]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    body += ["<h2>What each stage cost and gained</h2>", _table(table), f"<p>{html.escape(_NOTE)}</p>"]
    says = "".join(f"<li><b>{html.escape(each.name)}</b>: {html.escape(each.says)}</li>" for each in stages)
    body += [f"<ol>{says}</ol>", "<h2>Differences with their intervals</h2>", _forest(stages)]
    body += ["<h2>Curves</h2>", *(_curves(stage) for stage in stages if stage.curves)]
    body += ["<h2>Samples</h2>", *(_samples(stage) for stage in stages if stage.samples)]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _table(table: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEAD)
    lines = []
    for row in table:
        kind = row[-1] if row[-1] in ("better", "worse") else ""
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row[:-1]]
        lines.append(f'<tr>{"".join(cells)}<td class="{kind}">{html.escape(row[-1])}</td></tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _forest(stages: Sequence[Stage]) -> str:
    """Every difference as a point with its interval, bits per byte turned so that right is better."""
    drawn = [(stage.name, measures.gain(each)) for stage in stages for each in stage.gains]
    if not drawn:
        return ""
    wide, left, step = 420, 330, 20
    reach = max(max(abs(gain.low), abs(gain.high)) for _, gain in drawn) or 1.0
    place = lambda value: left + wide / 2 * (1 + value / reach)  # noqa: E731
    lines = [f'<line x1="{place(0)}" x2="{place(0)}" y1="0" y2="{step * len(drawn)}" stroke="#9ca3af"/>']
    for number, (name, gain) in enumerate(drawn):
        y, ends = step * number + 12, sorted((gain.low * gain.better, gain.high * gain.better))
        colour = {"better": "#047857", "worse": "#b91c1c"}.get(gain.verdict, "#6b7280")
        lines += [
            f'<text x="0" y="{y + 4}" font-size="12">{html.escape(f"{name}: {gain.label}")}</text>',
            f'<line x1="{place(ends[0]):.1f}" x2="{place(ends[1]):.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
            'stroke-width="2"/>',
            f'<circle cx="{place(gain.difference * gain.better):.1f}" cy="{y}" r="4" fill="{colour}"/>',
        ]
    size = f'width="{left + wide + 10}" height="{step * len(drawn) + 5}"'
    return f"<figure><svg {size}>{''.join(lines)}</svg><figcaption>right of the line: better</figcaption></figure>"


def _curves(stage: Stage) -> str:
    found = measures.rows(str(pathlib.Path(stage.makes, "metrics.jsonl")))
    return "".join(_curve(stage.name, name, found) for name in stage.curves)


def _curve(stage: str, name: str, found: Sequence[Mapping[str, Any]]) -> str:
    points = [(row["step"], row[name]) for row in found if isinstance(row.get(name), int | float)]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ""
    wide, high, edge = 260, 120, 34
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across, down = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    line = " ".join(
        f"{edge + (x - min(xs)) / across * wide:.1f},{5 + (max(ys) - y) / down * high:.1f}" for x, y in points
    )
    colour = _COLOURS[0] if name.startswith("train/") else _COLOURS[2]
    marks = [(0, 14, f"{max(ys):.3g}"), (0, high + 5, f"{min(ys):.3g}")]
    marks += [(edge, high + 20, str(min(xs))), (edge + wide - 20, high + 20, str(max(xs)))]
    texts = "".join(f'<text x="{x}" y="{y}" font-size="10">{text}</text>' for x, y, text in marks)
    drawn = f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    caption = f"<figcaption>{html.escape(f'{stage}: {name}')}</figcaption>"
    return f'<figure><svg width="{edge + wide + 10}" height="{high + 26}">{drawn}{texts}</svg>{caption}</figure>'


def _samples(stage: Stage) -> str:
    parts = [f"<h3>{html.escape(stage.name)}</h3>"]
    for pattern in stage.samples:
        for path in map(pathlib.Path, sorted(glob.glob(pattern))):
            parts.append(_asked(path) if path.suffix == ".jsonl" else f"<pre>{html.escape(path.read_text())}</pre>")
    return "".join(parts)


def _asked(path: pathlib.Path) -> str:
    """The first three documents of a task: what was asked, answered and expected."""
    lines = []
    for line in path.read_text().splitlines()[:3]:
        sample = json.loads(line)
        asked = str(sample["arguments"][0][0]) if isinstance(sample["arguments"], list) else str(sample["arguments"])
        answer = str(sample["filtered_resps"][0])
        cells = "".join(f"<td>{html.escape(each)}</td>" for each in (asked, answer, str(sample["target"])))
        lines.append(f"<tr>{cells}</tr>")
    return f'<table class="text"><tr><td>asked</td><td>answered</td><td>expected</td></tr>{"".join(lines)}</table>'
