"""report.html: the same report as one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from warmkv_bench.report import METHOD, environment_table, notes, verdict_line
from warmkv_bench.results import Results
from warmkv_bench.tables import Table, all_tables, invalid_table

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8d8d8; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right }
td.long { white-space: normal }
figure { margin: 2rem 0 } svg { max-width: 100%; height: auto }
.bad { color: #a40000 }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e4e4e4 } th, td { border-color: #3a3d42 }
  figure { background: #fff; border-radius: .3rem; padding: .5rem } .bad { color: #ff8f8f }
}"""
LONG_CELL = 60


def page(results: Results, plots: Sequence[Path]) -> str:
    """The report with its plots (SVG files) inside."""
    title = f"WarmKV benchmark, {results.environment['time']}"
    tone = "" if results.good else ' class="bad"'
    body = [f"<h1>{html.escape(title)}</h1>", f"<p{tone}>{html.escape(verdict_line(results))}</p>"]
    body += [f'<p class="bad">{html.escape(note)}</p>' for note in notes(results)]
    if results.invalid:
        body.append(_table(invalid_table(results)))
    body += [f"<figure>{_inline(plot)}</figure>" for plot in plots]
    body += [_table(table) for table in all_tables(results)]
    body += ["<h2>Method</h2>", f"<p>{html.escape(METHOD)}</p>", _table(environment_table(results))]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def write_page(results: Results, folder: Path, plots: Sequence[Path]) -> None:
    (folder / "report.html").write_text(page(results, plots))


def _table(table: Table) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        shown = []
        for index, cell in enumerate(row):
            kind = "number" if index >= table.labels else "long" if len(cell) > LONG_CELL else "label"
            shown.append(f'<{tag} class="{kind}">{html.escape(cell)}</{tag}>')
        return f"<tr>{''.join(shown)}</tr>"

    rows = "".join(cells("td", row) for row in table.rows)
    head = cells("th", table.columns) if any(table.columns) else ""
    return f"<h2>{html.escape(table.title)}</h2>\n<table>{head}{rows}</table>"


def _inline(plot: Path) -> str:
    """An SVG without its XML declaration and document type, which have no place in HTML."""
    text = plot.read_text()
    return text[text.index("<svg") :]
