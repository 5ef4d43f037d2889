"""report.html: one self-contained page with the results before and after."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import Any

from pliant.formatting import duration, human_bytes
from pliant.record import Curve, Note, Section, Table, sections_of
from pliant.run.card import changed, measured_on, settings_line, table

STYLE = """
:root{--ink:#1c2024;--dim:#60646c;--line:#d9dce0;--paper:#fff;--fill:#2a7d6f;--gone:#e7e9ec;--mark:#c2502e}
@media(prefers-color-scheme:dark){:root{--ink:#edeef0;--dim:#a0a5ad;--line:#3a3f46;
--paper:#16181b;--fill:#4fb3a1;--gone:#2a2e33;--mark:#e88a68}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:54rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem}h3{font-size:1rem}p{color:var(--dim)}
table{border-collapse:collapse;width:100%}
td,th{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}td{font-variant-numeric:tabular-nums}th{font-weight:600;color:var(--dim)}
svg{width:100%;height:auto}svg text{fill:var(--dim);font:11px system-ui,sans-serif}
.axis{stroke:var(--line)}.curve{stroke:var(--fill);fill:none;stroke-width:2}
.dot{fill:var(--fill)}.first{fill:var(--mark)}
.kept{fill:var(--fill)}.gone{fill:var(--gone)}
.said td{text-align:left;vertical-align:top;white-space:pre-wrap}
code{font-size:.9em}details{margin-top:1rem}
"""


def page(report: dict[str, Any]) -> str:
    """The report as HTML; no script, nothing fetched.

    Arguments:
        report: as :func:`pliant.run.compress.compress` returns it.
    """
    model = escape(str(report["model"]))
    rows = [f"<tr><td>{escape(n)}</td><td>{escape(b)}</td><td>{escape(a)}</td></tr>" for n, b, a in table(report)]
    steps = "".join(_step(step) for step in report["steps"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>pliant: {model}</title><style>{STYLE}</style></head><body>
<h1>{model}</h1>
<p>{escape(changed(report).capitalize())}. Measured on {escape(measured_on(report))}, in {report["dtype"]};
{escape(versions)}.</p>
<h2>Before and after</h2>
<table><tr><th></th><th>before</th><th>after</th></tr>{"".join(rows)}</table>
{_replies(report.get("replies", []))}
{_predicted(report)}
{_picture(report["layers"])}
{steps}
</body></html>
"""


def _replies(replies: list[dict[str, str]]) -> str:
    """The replies of both models, side by side."""
    if not replies:
        return ""
    rows = "".join(
        f'<tr class="said">{"".join(f"<td>{escape(r[key])}</td>" for key in ("prompt", "before", "after"))}</tr>'
        for r in replies
    )
    return (
        "<h2>Replies</h2><table><tr><th>prompt</th><th>before</th><th>after</th></tr>"
        f"{rows}</table><p>Generated greedily, cut off after a few lines.</p>"
    )


def _predicted(report: dict[str, Any]) -> str:
    """The speed-up predicted from the removed parameters, beside the measured one."""
    speed = report.get("speed")
    if not speed:
        return ""
    rows = []
    for kind, of in (("prefill", "multiply-accumulates"), ("decode", "bytes of weights and cache read")):
        gain = speed["speedup"][kind]
        rows.append(
            f"<tr><td>{kind}, from {of}</td><td>{report['predicted'][kind]:.2f}x</td><td>{gain['median']:.2f}x</td>"
            f"<td>{gain['p10']:.2f} to {gain['p90']:.2f}</td></tr>"
        )
    settings = speed["settings"]
    return (
        "<h2>Speed-up, predicted and measured</h2><table><tr><th></th><th>predicted</th><th>measured</th><th>p10 to "
        f"p90</th></tr>{''.join(rows)}</table><p>Both models were timed alternately in {settings['repeats']} rounds: "
        f"prompt of {settings['prompt']} tokens, {settings['tokens']} decoded, batch {settings['batch']}.</p>"
    )


def _step(step: dict[str, Any]) -> str:
    drawn = "".join(
        f"<p>{escape(' '.join(section.text for section in run if isinstance(section, Note)))}</p>"
        if kind is Note
        else "".join(map(_section, run))
        for kind, run in groupby(sections_of(step), type)
    )
    return (
        f"<h2>{escape(step['settings']['step'])}</h2><p><code>{escape(settings_line(step))}</code></p>{drawn}"
        f"<p>{duration(step['seconds'])} in all, peak memory {human_bytes(step['peak_memory'])}.</p>"
    )


def _section(section: Section) -> str:
    """A table or a curve."""
    if isinstance(section, Table):
        rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in section.rows)
        head = "".join(f"<th>{escape(name)}</th>" for name in section.columns)
        drawn, title = f"<table><tr>{head}</tr>{rows}</table>", escape(section.title)
        if section.folded:
            return f"<details><summary>{title}</summary>{drawn}</details>"
        return f"<h3>{title}</h3>{drawn}" if title else drawn
    if isinstance(section, Note) or len(section.xs) < 2 or max(section.xs) <= 0:
        return ""
    return _plot(section) + (f"<p>{escape(section.caption)}</p>" if section.caption else "")


def _plot(curve: Curve) -> str:
    """A line with a dot at every point. The horizontal axis begins at 0."""
    xs, ys, marks = curve.xs, curve.ys, {int(number): word for number, word in curve.marks.items()}
    width, height, left, bottom = 640, 260, 48, 30
    top_x, low, high = max(xs), min(ys), max(ys)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / top_x * (width - left - 16), 14 + (high - y) / span * (height - bottom - 14)

    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(map(place, xs, ys)))
    dots = []
    for i, (x, y) in enumerate(map(place, xs, ys)):
        dots.append(
            f'<circle class="{"first" if i in marks else "dot"}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{4 if i in marks else 2.5}">'
            f"<title>{escape(curve.labels[i])}</title></circle>"
        )
        if i in marks:
            dots.append(f'<text x="{x + 6:.1f}" y="{y + 14:.1f}">{escape(marks[i])}</text>')
    ticks = "".join(
        f'<text x="{place(t * top_x, low)[0]:.0f}" text-anchor="{anchor}" y="{height - 8}">'
        f"{t * top_x:{curve.x_format}}</text>"
        for t, anchor in ((0, "middle"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end"))
    ) + "".join(
        f'<text x="4" y="{place(0, low + t * span)[1] + 4:.0f}">{low + t * span:.4g}</text>' for t in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(curve.title)}">'
        f'<line class="axis" x1="{left}" y1="{height - bottom + 4}" x2="{width - 8}" y2="{height - bottom + 4}"/>'
        f'<path class="curve" d="{path}"/>{"".join(dots)}{ticks}</svg>'
    )


def _picture(layers: dict[str, float]) -> str:
    """A bar for every layer and axis, filled by the share kept; nothing if a model has no list of layers."""
    layers = {name: share for name, share in layers.items() if name.startswith("layers.")}
    if not layers:
        return ""
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in layers))
    depth = 1 + max(int(name.split(".")[1]) for name in layers)
    left, row, gap = 110, 46, 14
    bar = min(24.0, (640 - left) / depth)
    height = len(kinds) * (row + gap) + 18
    parts = []
    for place, kind in enumerate(kinds):
        top = place * (row + gap)
        parts.append(f'<text x="0" y="{top + row / 2 + 4}">{escape(kind)}</text>')
        for layer in range(depth):
            kept = layers.get(f"layers.{layer}.{kind}", 0.0)
            x = left + layer * bar
            parts.append(
                f'<rect class="gone" x="{x:.1f}" y="{top}" width="{bar - 2:.1f}" height="{row}" rx="2">'
                f"<title>layer {layer}, {escape(kind)}: {kept:.0%} kept</title></rect>"
            )
            if kept:
                parts.append(
                    f'<rect class="kept" x="{x:.1f}" y="{top + row * (1 - kept):.1f}" width="{bar - 2:.1f}" '
                    f'height="{row * kept:.1f}" rx="2" pointer-events="none"/>'
                )
    for layer in range(0, depth, max(1, depth // 10)):
        parts.append(f'<text x="{left + layer * bar:.1f}" y="{height - 4}">{layer}</text>')
    return (
        "<h2>Kept shares</h2><p>The share of every block that is kept, by layer. An empty bar is a removed block.</p>"
        f'<svg viewBox="0 0 640 {height}" role="img" aria-label="share kept of every block">{"".join(parts)}</svg>'
    )
