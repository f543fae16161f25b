"""A comparison as Markdown and HTML."""

from __future__ import annotations

import jinja2

from prefillshare_train.evaluation.compare import Comparison, Result

_MARKDOWN = """\
| | {{ tasks | join(' | ') }} |
|---|{{ '---:|' * (tasks | length) }}
{% for name, cells in rows -%}
| {{ name }} | {{ cells | join(' | ') }} |
{% endfor %}
Share of items answered right, in per cent, with its 95 % interval (Wilson) and n.
{% if paired %}
| task | from | to | n | gained | lost | difference | p |
|---|---|---|---:|---:|---:|---:|---:|
{% for task, first, second, test in paired -%}
| {{ task }} | {{ first }} | {{ second }} | {{ test.n }} | {{ test.gained }} | {{ test.lost }} | \
{{ '%+.1f' % (100 * test.difference) }} | {{ '%.3g' % test.p_value }} |
{% endfor %}
Gained: items that the first got wrong and the second right. p: exact McNemar test.
{% endif %}
{%- for note in savings + notes %}
- {{ note }}
{%- endfor %}
"""

_HTML = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ccc; padding: .35rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
</style></head><body>
<h1>Share of items answered right</h1>
<table><thead><tr><th></th>{% for task in tasks %}<th>{{ task }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in rows %}
<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>
<p>In per cent, with the 95 % interval (Wilson) and n.</p>
{% if paired %}<h2>On the same items</h2>
<table><thead><tr><th>task</th><th>from</th><th>to</th><th>n</th><th>gained</th><th>lost</th>
<th>difference</th><th>p</th></tr></thead><tbody>{% for task, first, second, test in paired %}
<tr><td>{{ task }}</td><td>{{ first }}</td><td>{{ second }}</td><td>{{ test.n }}</td>
<td>{{ test.gained }}</td><td>{{ test.lost }}</td>
<td>{{ '%+.1f' % (100 * test.difference) }}</td><td>{{ '%.3g' % test.p_value }}</td></tr>
{%- endfor %}</tbody></table>
<p>Gained: items that the first got wrong and the second right. p: exact McNemar test.</p>
{% endif %}
<ul>{% for note in savings + notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% for plot in plots %}<p><img src="{{ plot }}" alt="{{ plot }}"></p>{% endfor %}
</body></html>
"""


def markdown(comparison: Comparison) -> str:
    """The table, the paired tests and the notes."""
    return _render(_MARKDOWN, comparison, autoescape=False)


def html(comparison: Comparison, plots: list[str]) -> str:
    """The same as a page; `plots` are files beside it."""
    return _render(_HTML, comparison, autoescape=True, plots=plots)


def _render(template: str, comparison: Comparison, *, autoescape: bool, **more: object) -> str:
    environment = jinja2.Environment(autoescape=autoescape, keep_trailing_newline=True)
    rows = [
        (name, [_cell(comparison.cell(name, task)) for task in comparison.tasks])
        for name in comparison.names
    ]
    return environment.from_string(template).render(
        tasks=comparison.tasks,
        rows=rows,
        paired=comparison.paired,
        notes=comparison.notes,
        savings=comparison.savings,
        **more,
    )


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    low, high = result.row["ci95"]
    mark = " (contract does not fit)" if result.row["contract_mismatch"] else ""
    return (
        f"{100 * result.row['score']:.1f} [{100 * low:.1f}, {100 * high:.1f}] "
        f"n={result.row['n']}{mark}"
    )
