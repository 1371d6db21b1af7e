"""A profile's executed notebooks as a site that needs no network.

``python -m ghnlib.pipeline.site [PROFILE]`` (``make report``) writes it from the reports.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jinja2
import nbconvert
from nbformat import NotebookNode

from ghnlib.pipeline import notebooks

# nbconvert's page would load scripts from the network: notebooks here hold no maths, widgets or diagrams. The code of
# cells that say hide-input is folded: they are read for what they show.
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}
{% block body_header %}{{ super() }}<nav style="margin: 1em 4em">
{% for name, address in resources.links.items() %}<a href="{{ address }}">{{ name }}</a>{{ " · " if not loop.last }}
{% endfor %}</nav>{% endblock %}
{% block input_group %}{% if "hide-input" in cell.metadata.tags %}<details>
<summary style="margin-left: var(--jp-cell-prompt-width); color: #777; cursor: pointer">code</summary>
{{ super() }}</details>
{% else %}{{ super() }}{% endif %}{% endblock %}
{% block body_footer %}{% if resources.seconds %}<p style="margin: 1em 4em"><em>This stage took
{{ "%.0f" | format(resources.seconds) }} seconds.</em></p>{% endif %}{{ super() }}{% endblock %}"""

INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ghnlib: {{ profile }}</title><style>
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; line-height: 1.4 }
table { border-collapse: collapse; font-size: 85% } th, td { padding: 0.3em 0.7em; text-align: left }
tr { border-bottom: 1px solid #ddd }
</style></head><body><h1>Reports of the profile {{ profile }}</h1>
<ul>{% for name, address in links.items() if name != "index" %}
<li><a href="{{ address }}">{{ name }}</a></li>{% endfor %}</ul>
<h2>Claims of the papers</h2>
<p>{{ verdicts }}. Each claim is that a number is above 0: the 95 % interval of ours decides, over networks and, for
what is said about hypernetworks, training seeds; the published number comes from other images, sizes and
lengths.</p>{{ claims }}
<h2>Time</h2>{{ timing or "Shown after a run on this machine." }}</body></html>"""


def page(report: NotebookNode, title: str, seconds: float | None = None, links: Mapping[str, str] | None = None) -> str:
    """An executed notebook as HTML that loads nothing: figures are embedded. ``links``: name -> address."""
    resources = {"seconds": seconds, "links": links or {}, "metadata": {"name": title}}
    return nbconvert.HTMLExporter(raw_template=PAGE).from_notebook_node(report, resources)[0]


def build(profile: str) -> Path:
    """Write site/PROFILE from reports/PROFILE: a page for each notebook, and the index, whose path is returned.

    Raises:
        FileNotFoundError: the profile has no finished run.
    """
    import pandas as pd  # takes a second, and single pages do without

    reports, site = Path("reports", profile), Path("site", profile)
    names = [path.stem for path in sorted(reports.glob("*.ipynb"))]
    if not names or not (reports / "claims.csv").exists():
        raise FileNotFoundError(f"{reports} has no finished run: make repro PROFILE={profile} first")
    timing = reports / "timing.json"
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    links = {"index": "index.html", **{name: f"{name}.html" for name in names}}
    for name in names:
        html = page(notebooks.read(reports / f"{name}.ipynb"), name, seconds.get(name.partition("_")[2]), links)
        notebooks.write_text(html, site / f"{name}.html")
    table = pd.read_csv(reports / "claims.csv", dtype=str, keep_default_na=False)  # shown as written
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    claims = table.to_html(index=False, border=0)
    timing = pd.Series(seconds, name="seconds").to_frame().to_html(border=0) if seconds else ""
    index = jinja2.Template(INDEX).render(profile=profile, links=links, claims=claims, verdicts=verdicts, timing=timing)
    notebooks.write_text(index, site / "index.html")
    return site / "index.html"


if __name__ == "__main__":
    try:
        print(build(*(sys.argv[1:] or ["digits"])))
    except FileNotFoundError as error:
        sys.exit(str(error))
