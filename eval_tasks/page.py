"""One HTML page of studies: what is claimed, the metrics, the plots; everything inside the file."""

import base64
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from .report import format_metric

TEMPLATE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; display: block; margin: 1rem 0 }
table { border-collapse: collapse } td { padding: .1rem .8rem .1rem 0; border-bottom: 1px solid #ddd }
.claim { border-left: 4px solid #69c; padding-left: 1rem; white-space: pre-line }
.made { color: #777; font-size: .8rem }
.wrong { background: #fbb; border-radius: 3px }
.examples { font-family: ui-monospace, monospace; font-size: .85rem }
</style>
<h1>{{ title }}</h1>
<p>{% for s in sections %}<a href="#{{ s.name }}">{{ s.name }}</a>{{ " · " if not loop.last }}{% endfor %}</p>
{% for s in sections %}
<h2 id="{{ s.name }}">{{ s.name }}</h2>
<p class="claim">{{ s.claim }}</p>
{% for plot in s.plots %}<img alt="{{ plot.stem }}" src="data:image/png;base64,{{ encoded(plot) }}">
{% endfor %}
<details{{ " open" if s.result.metrics | length <= 30 }}>
<summary>{{ s.result.metrics | length }} metrics</summary><table>
{% for name, metric in s.result.metrics.items() %}<tr><td>{{ name.replace("_", " ") }}</td><td>{{ shown(metric) }}</td>
{% endfor %}</table></details>
{% if s.examples %}<details><summary>examples</summary><div class="examples">{{ s.examples }}</div></details>{% endif %}
<p class="made">{{ s.result.command }} · {{ s.result.date }} · {{ s.result.model }} · {{ s.result.data }} ·
seed {{ s.result.seed }} · {{ s.result.device }}, {{ s.result.machine }}</p>
{% endfor %}
""")


@dataclass
class Section:
    """
    A study on the page.

    Args:
        name, claim (`str`): what is studied, and why.
        result (`dict`): from `read_result`.
        plots (`list[Path]`): PNG files.
        examples (`str`): HTML that is taken as it is.
    """

    name: str
    claim: str
    result: dict
    plots: list[Path] = field(default_factory=list)
    examples: str = ""

    def __post_init__(self):
        self.examples = Markup(self.examples)


def html_page(title: str, sections: list[Section]) -> str:
    """The page; intervals are shown as in the tables."""
    return TEMPLATE.render(
        title=title,
        sections=sections,
        shown=format_metric,
        encoded=lambda path: base64.b64encode(path.read_bytes()).decode(),
    )
