"""One HTML page of a plan: memory over the program, time by region, tables. It reads the JSON of a plan alone.

A page stands by itself: styles and drawings (SVG) are in it, no script, nothing is fetched. Every text of a plan, such
as names of operations, is escaped. What a plan has no figures for is left out.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes, format_count, format_duration

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em; color: #1d2430; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } p.note { color: #5a6472; }
table { border-collapse: collapse; margin: .6em 0; } svg { max-width: 100%; height: auto; }
td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #c5ccd6; font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.code { font: 12px/1.4 ui-monospace, monospace; word-break: break-all; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 1em; }
.bad { color: #b3261e; font-weight: 600; }
"""
# Told apart by people who do not see all colours: Okabe and Ito's, then greys.
_COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c6bb1"),
    *("#767676", "#b0b0b0", "#4d4d4d"),
)
_WIDTH, _HEIGHT = 1000, 300
_LEFT, _BOTTOM = 70, 30  # of a drawing, for its axes
_ROWS = 25  # of a long table


def page(plan: Mapping[str, Any]) -> str:
    """The page of the content of `plan --json`, of one program or of an iteration of several."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    slices = f"{plan['slices']} x " if plan.get("slices", 1) > 1 else ""
    title = f"{plan['program']} on {slices}{plan['topology']}"
    versions = ", ".join(f"{name} {version}" for name, version in plan.get("versions", {}).items())
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{plan['chips']} chips, mesh {_text(mesh)}</p>",
        f'<p class="note">Estimates of the TPU compiler ({_text(versions)}) and of what is derived from it; nothing '
        "was run. Figures are of one device and one step.</p>",
        *(f"<p>{_text(fact)}</p>" for fact in (*plan.get("notes", ()), *plan.get("facts", ()), *_stages(plan))),
    ]
    parts += _problem(plan)
    programs = plan.get("programs")
    if programs is None:
        parts += _program(plan, plan["hbm_bytes"])
    else:
        parts += _iteration(plan)
    for program in programs or ():
        parts.append(f"<h1>{_text(program['program'])}, {program['times']} times an iteration</h1>")
        parts += _problem(program)
        parts += _program(program, plan["hbm_bytes"])
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _stages(plan: Mapping[str, Any]) -> list[str]:
    stages = plan.get("pipeline")
    return [] if not stages else [f"A pipeline of {stages['turns']} turns, of which {stages['bubble']:.0%} is bubble."]


def _problem(content: Mapping[str, Any]) -> list[str]:
    """The line that says that it cannot run, in red."""
    said = content.get("problem") or ("it does not fit" if content.get("fits") is False else "")
    return [f'<p class="bad">{_text(said)}</p>'] if said else []


def _program(content: Mapping[str, Any], hbm_bytes: int) -> list[str]:
    """The sections of one program, those that it has figures for."""
    parts = _estimate(content.get("estimate"))
    parts += _regions(content)
    if content.get("memory"):
        parts += _memory(content["memory"], hbm_bytes, content.get("beside_bytes"), content.get("fits"))
    parts += _largest(content.get("largest", ()))  # of a refusal of which nothing else is known
    parts += _kernels(content.get("kernels", ()))
    parts += _collectives(content.get("collectives", ()))
    return parts + _missing(content)


def _iteration(plan: Mapping[str, Any]) -> list[str]:
    """What all programs of an iteration come to."""
    found = plan.get("iteration") or {}
    parts = _estimate(plan.get("estimate"))
    if found.get("peak_bytes") is not None:
        size = f"{format_bytes(found['peak_bytes'])} of {format_bytes(plan['hbm_bytes'])}"
        parts.append(f"<p>The most memory is that of {_text(found['peak_program'])}: {size} HBM.</p>")
    if found.get("fits") is False:
        parts.append('<p class="bad">The iteration does not fit.</p>')
    return parts + _collectives(found.get("collectives", ()))


# Time.


_ESTIMATED = (  # key of the JSON, what it is called, how it is written
    ("step_seconds", "a step", lambda value: f"{value:.4g} s"),
    ("exposed_step_seconds", "a step that waits for all that is exposed", lambda value: f"{value:.4g} s"),
    ("compiler_seconds", "computing, by the compiler's cycles", lambda value: f"{value:.4g} s"),
    ("iteration_seconds", "an iteration", lambda value: f"{value:.4g} s"),
    ("mfu", "MFU", lambda value: f"{value:.1%}"),
    ("mfu_full_attention", "MFU, full attention counted", lambda value: f"{value:.1%}"),
    ("hfu", "HFU", lambda value: f"{value:.1%}"),
    ("model_flops", "model FLOPs", format_count),
    ("hardware_flops", "hardware FLOPs", format_count),
    ("tokens_per_second", "tokens a second", format_count),
    ("run_seconds", "the run", format_duration),
    ("chip_hours", "chip-hours", lambda value: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"),
    ("bound_by", "bound by", str),
)


def _estimate(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    rows = [(name, write(found[key])) for key, name, write in _ESTIMATED if found.get(key) is not None]
    if found.get("cost") is not None:
        rows.append(("cost", f"{found['cost']:,.2f} {found.get('currency') or ''}"))
    if found.get("cost_per_million_tokens") is not None:
        rows.append(("a million tokens", f"{found['cost_per_million_tokens']:.3g} {found.get('currency') or ''}"))
    bar = _bar(list((found.get("parts") or {}).items()), lambda value: f"{value:.3g} s")
    return ["<h2>Time, estimated</h2>", _table(("", ""), rows), *bar]


def _regions(content: Mapping[str, Any]) -> list[str]:
    """Time by region and pass: seconds where the plan has them, else cycles."""
    rows = content.get("regions") or ()
    key = "seconds" if rows and all(row.get("seconds") is not None for row in rows) else "cycles"
    amounts = [
        (f"{row['region']}, {row['pass']}" if row.get("pass") else row["region"], row.get(key) or 0) for row in rows
    ]
    total = sum(amount for _, amount in amounts)
    if not total:
        return []
    amounts.sort(key=lambda item: -item[1])
    table = [(name, f"{amount:.4g}", f"{amount / total:.1%}") for name, amount in amounts]
    return [
        f"<h2>{key.capitalize()} by region</h2>",
        *_bar(amounts, lambda value: f"{value:.3g} {key}"),
        _table(("region", key, "share"), table),
    ]


def _bar(amounts: Sequence[tuple[str, float]], said: Any) -> list[str]:
    """A bar of parts, with what each colour is."""
    shown = [(name, amount) for name, amount in amounts if amount > 0]
    total = sum(amount for _, amount in shown)
    if not total:
        return []
    drawn, at = [], 0.0
    for number, (name, amount) in enumerate(shown):
        width = _WIDTH * amount / total
        drawn.append(
            f'<rect x="{at:.1f}" y="0" width="{width:.1f}" height="44" fill="{_colour(number)}">'
            f"<title>{_text(name)}: {_text(said(amount))} ({amount / total:.1%})</title></rect>"
        )
        at += width
    return [_svg(_WIDTH, 44, drawn), _legend([name for name, _ in shown])]


# Memory.


def _memory(memory: Mapping[str, Any], hbm_bytes: int, beside_bytes: int | None, fits: bool | None) -> list[str]:
    """beside_bytes: what a device holds meanwhile and the program does not read; fits: the compiler's word, whose
    measure is up to 1% from ours, None where a plan has none."""
    total = memory["total_bytes"] + (beside_bytes or 0)
    left = hbm_bytes - total
    if fits is None:
        fits = left >= 0
    by = f"by {format_bytes(-left)}" if left < 0 else "by the compiler"
    verdict = f"fits, {format_bytes(max(left, 0))} are free" if fits else f"does not fit, {by}"
    parts = [f"<h2>Memory</h2><p>{format_bytes(total)} of {format_bytes(hbm_bytes)} HBM at the peak: {verdict}.</p>"]
    if beside_bytes:
        parts.append(
            f"<p>{format_bytes(beside_bytes)} of it is held beside the program, which does not read it; what follows "
            "is without.</p>"
        )
    timeline = memory.get("timeline") or ()
    if timeline:
        parts += _timeline(timeline, hbm_bytes)
    rows = [(name, format_bytes(size)) for name, size in (memory.get("parts") or {}).items()]
    rows.sort(key=lambda row: -memory["parts"][row[0]])
    if rows:
        parts += ["<h2>What it is made of, at the peak</h2>", _table(("part", "bytes"), rows)]
    return parts + _largest(memory.get("largest") or ())


def _largest(buffers: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            format_bytes(item["bytes"]),
            item["shape"],
            item["part"],
            f"{item['region']} {item['pass']}".strip(),
            item["operation"],
        )
        for item in buffers
    ]
    header = ("bytes", "shape", "part", "made in", "operation")
    return ["<h2>Largest buffers</h2>", _table(header, rows, code=(1, 4), right=(0,))] if rows else []


def _timeline(moments: Sequence[Mapping[str, Any]], hbm_bytes: int) -> list[str]:
    """Parts stacked over the course of the program."""
    names = list(dict.fromkeys(name for moment in moments for name in moment["parts"]))
    highest = max(moment["bytes"] for moment in moments)
    limit = hbm_bytes if highest > 0.5 * hbm_bytes else None  # a line far above the rest would flatten it
    top = 1.08 * max(highest, limit or 0)
    drawn = _grid(top)
    for moment, begin in zip(moments, [0.0, *(moment["at"] for moment in moments)], strict=False):
        left, right = _LEFT + begin * (_WIDTH - _LEFT), _LEFT + moment["at"] * (_WIDTH - _LEFT)
        below = 0
        made_of = ", ".join(f"{name} {format_bytes(size)}" for name, size in moment["parts"].items())
        said = f"{moment['region']} {moment['pass']}".strip() + f": {format_bytes(moment['bytes'])}; {made_of}"
        for name, size in moment["parts"].items():
            height = _height(size, top)
            y = _HEIGHT - _height(below + size, top)
            drawn.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left + 0.3:.1f}" height="{height:.1f}" '
                f'fill="{_colour(names.index(name))}"><title>{_text(said)}</title></rect>'
            )
            below += size
    if limit:
        y = _HEIGHT - _height(limit, top)
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#b3261e" stroke-dasharray="6 4"/>'
        )
        drawn.append(f'<text x="{_WIDTH}" y="{y - 4:.1f}" text-anchor="end" font-size="12">HBM of a device</text>')
    note = (
        '<p class="note">From the begin of the program to its end, by the estimated cycles of the compiler; a loop is '
        "as wide as all its turns, at its worst moment.</p>"
    )
    return [_svg(_WIDTH, _HEIGHT + _BOTTOM, drawn), _legend(names), note]


def _grid(top: float) -> list[str]:
    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _HEIGHT - share * _HEIGHT
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e7ec"/>')
        said = format_bytes(share * top)
        drawn.append(f'<text x="{_LEFT - 6}" y="{max(y + 4, 11):.1f}" text-anchor="end" font-size="12">{said}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT + 20}" font-size="12">begin</text>')
    drawn.append(f'<text x="{_WIDTH}" y="{_HEIGHT + 20}" text-anchor="end" font-size="12">end of the step</text>')
    return drawn


def _height(size: float, top: float) -> float:
    return _HEIGHT * size / top


# Tables.


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> list[str]:
    if not kernels:
        return []
    rows = []
    for item in kernels:
        seconds = "?" if item.get("seconds") is None else f"{item['seconds']:.4g} s"
        rows.append((item["name"], item.get("pass") or "", f"{item['count']}", seconds))
    return ["<h2>Kernels</h2>", _table(("kernel", "pass", "count", "seconds"), rows, right=(2, 3))]


def _collectives(items: Sequence[Mapping[str, Any]]) -> list[str]:
    if not items:
        return []
    timed = any(item.get("seconds") is not None for item in items)
    header = ["kind", "axes", "network", "devices", "count", "bytes", *(("seconds", "exposed") if timed else ())]
    rows = []
    for item in items[:_ROWS]:
        row = [item["kind"], " x ".join(item["axes"]) or "none", item.get("network", "ici").upper()]
        row += [f"{item['group_size']}", f"{item['count']}", format_bytes(item["bytes"])]
        for key in ("seconds", "exposed_seconds") if timed else ():
            row.append("?" if item.get(key) is None else f"{item[key]:.4g} s")
        rows.append(tuple(row))
    return ["<h2>Collectives</h2>", _table(tuple(header), rows, right=range(3, len(header)))]


def _missing(content: Mapping[str, Any]) -> list[str]:
    """What the figures do not have in them, or have in another way than it will be."""
    kernels = content.get("kernels", ()) if content.get("estimate") else ()
    rows = [(name, f"x {count}: the compiler gives no estimate") for name, count in _items(content, "without_estimate")]
    rows += [(item["name"], "a kernel: no time is known") for item in kernels if item.get("seconds") is None]
    rows += [(name, "a loop whose length depends on data: counted once") for name in content.get("unknown_loops", ())]
    rows += [
        (loop["name"], f"a loop counted {loop['turns']} times, its limit, which data may not reach")
        for loop in content.get("limited_loops", ())
    ]
    return ["<h2>Not in these figures</h2>", _table(("", ""), rows, right=())] if rows else []


def _items(content: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    return list((content.get(key) or {}).items())


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    code: Sequence[int] = (),
    right: Sequence[int] | range | None = None,
) -> str:
    """Columns from the second on are numbers, to the right, unless `right` says which are."""
    numbers = set(range(1, len(header))) if right is None else set(right)

    def cell(tag: str, number: int, text: str) -> str:
        kind = "number" if number in numbers else "code" if number in code else ""
        return f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{_text(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", n, text) for n, text in enumerate(header)) + "</tr>"] if any(header) else []
    lines += ["<tr>" + "".join(cell("td", n, text) for n, text in enumerate(row)) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def _legend(names: Sequence[str]) -> str:
    keys = (f'<span class="key" style="background:{_colour(n)}"></span>{_text(name)}' for n, name in enumerate(names))
    return f"<p>{' '.join(keys)}</p>"


def _svg(width: int, height: int, drawn: Sequence[str]) -> str:
    inside = "\n".join(drawn)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{inside}</svg>'


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
