"""An executed notebook as a page that needs no network."""

import re
from collections.abc import Mapping
from functools import partial

import nbconvert
from nbformat import NotebookNode

from ghnlib.pipeline.notebooks import NOTEBOOKS

# nbconvert's page would load scripts from the network: notebooks here hold no maths, widgets or diagrams. The code of
# cells that say hide-input is folded: they are read for what they show. So are the logs of trainings. An article has no
# code. Wide tables scroll.
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}
{% block body_header %}{{ super() }}<style>
.jp-RenderedHTMLCommon { overflow-x: auto } .jp-RenderedHTMLCommon table { font-size: 80% }
.jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th { padding: 0.3em 0.5em }
</style><nav style="margin: 1em 4em; font-family: sans-serif">
{% for name, address in resources.links.items() %}<a href="{{ address }}">{{ name }}</a>{{ " · " if not loop.last }}
{% endfor %}</nav>{% endblock %}
{% block input_group %}{% if not cell.source %}{% elif "hide-input" in cell.metadata.tags %}<details>
<summary style="margin-left: var(--jp-cell-prompt-width); color: #777; cursor: pointer">code</summary>
{{ super() }}</details>
{% else %}{{ super() }}{% endif %}{% endblock %}
{% block stream_stdout %}{% if output.text.count("\n") > 12 %}<details>
<summary style="color: #777; cursor: pointer">log</summary>{{ super() }}</details>
{% else %}{{ super() }}{% endif %}{% endblock %}
{% block body_footer %}<footer style="margin: 1em 4em; color: #555">{% if resources.seconds %}<p><em>This stage took
{{ "%.0f" | format(resources.seconds) }} seconds.</em></p>{% endif %}
{% if resources.made %}<p><small>{{ resources.made }}
<a href="provenance.json">provenance.json</a></small></p>{% endif %}</footer>{{ super() }}{% endblock %}"""


def page(
    report: NotebookNode,
    title: str,
    seconds: float | None = None,
    links: Mapping[str, str] | None = None,
    made: str = "",
) -> str:
    """An executed notebook as HTML that loads nothing: figures are embedded, their captions have addresses.

    Args:
        seconds: that its stage took.
        links: name -> address, at the head of the page.
        made: where the numbers come from, at its foot.
    """
    links = links or {}
    resources = {"seconds": seconds, "links": links, "made": made, "metadata": {"name": title}}
    html = nbconvert.HTMLExporter(raw_template=PAGE).from_notebook_node(report, resources)[0]
    return re.sub(r"<strong>Figure (\d+)\.(\d+)\.</strong>", partial(_caption, pictured="index" in links), html)


def _caption(found: re.Match, pictured: bool) -> str:
    """A figure's number that links to itself, and to its stage in the picture of the pipeline."""
    report, figure = found.groups()
    stage = next((stage for stage, name in NOTEBOOKS.items() if name.startswith(f"{report}_")), "")
    link = f' (<a href="index.html#stage-{stage}">{stage}</a>)' if pictured and stage else ""
    anchor = f"figure-{report}-{figure}"
    return f'<strong id="{anchor}"><a href="#{anchor}">Figure {report}.{figure}</a></strong>{link}<strong>.</strong>'
