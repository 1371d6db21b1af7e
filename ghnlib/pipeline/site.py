"""A profile's executed notebooks as a site that needs no network.

``python -m ghnlib.pipeline.site [PROFILE]`` (``make report``) writes it from the reports.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from ghnlib.params_file import read_yaml
from ghnlib.pipeline import notebooks
from ghnlib.pipeline.article import article
from ghnlib.pipeline.diagram import stages_of, svg
from ghnlib.pipeline.notebooks import NOTEBOOKS
from ghnlib.pipeline.page import page
from ghnlib.pipeline.provenance import in_words

INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ghnlib: {{ profile }}</title><style>
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; line-height: 1.4 }
table { border-collapse: collapse; font-size: 85% } th, td { padding: 0.3em 0.7em; text-align: left }
tr { border-bottom: 1px solid #ddd } footer { color: #555 }
</style></head><body><h1>Reports of the profile {{ profile }}</h1>
<p><a href="article.html"><b>All of it as one article</b></a>. The pipeline, each stage with its report:</p>
{{ picture }}
<p>{% for name, address in links.items() if name not in ("index", "article") %}<a href="{{ address }}">{{ name }}</a>
{{- " · " if not loop.last }} {% endfor %}</p>
<h2>Claims of the papers</h2>
<p>{{ verdicts }}. Each claim is that a number is above 0: the 95 % interval of ours decides, over networks and, for
what is said about hypernetworks, training seeds; the published number comes from other images, sizes and
lengths.</p>{{ claims }}
<h2>Time</h2>{{ timing or "Shown after a run on this machine." }}
{% if made %}<footer><p><small>{{ made }} <a href="provenance.json">provenance.json</a></small></p></footer>{% endif %}
</body></html>"""


def build(profile: str) -> Path:
    """Write site/PROFILE from reports/PROFILE: a page for each notebook, the article, and the index, whose path is
    returned.

    Raises:
        FileNotFoundError: the profile has no finished run.
    """
    reports, site = Path("reports", profile), Path("site", profile)
    names = [path.stem for path in sorted(reports.glob("*.ipynb"))]
    if not names or not (reports / "claims.csv").exists():
        raise FileNotFoundError(f"{reports} has no finished run: make repro PROFILE={profile} first")
    timing, source = reports / "timing.json", reports / "provenance.json"
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    made = in_words(json.loads(source.read_text())) if source.exists() else ""
    if made:
        notebooks.write_text(source.read_text(), site / source.name)
    links = {"index": "index.html", "article": "article.html", **{name: f"{name}.html" for name in names}}
    executed = {name: notebooks.read(reports / f"{name}.ipynb") for name in names}
    for name, report in executed.items():
        html = page(report, name, seconds.get(name.partition("_")[2]), links, made)
        notebooks.write_text(html, site / f"{name}.html")
    notebooks.write_text(page(article(executed, profile), "article", links=links, made=made), site / "article.html")
    table = pd.read_csv(reports / "claims.csv", dtype=str, keep_default_na=False)  # shown as written
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    index = jinja2.Template(INDEX).render(
        profile=profile, links=links, verdicts=verdicts, made=made, claims=table.to_html(index=False, border=0),
        timing=pd.Series(seconds, name="seconds").to_frame().to_html(border=0) if seconds else "",
        picture=svg(stages_of(read_yaml("dvc.yaml")), _first_pages(names)),
    )  # fmt: skip
    notebooks.write_text(index, site / "index.html")
    return site / "index.html"


def _first_pages(names: Sequence[str]) -> dict[str, str]:
    """The page of each stage, of trainings the first."""
    found = {stage: [name for name in names if name.partition("-")[0] == own] for stage, own in NOTEBOOKS.items()}
    return {stage: f"{own[0]}.html" for stage, own in found.items() if own}


if __name__ == "__main__":
    try:
        print(build(*(sys.argv[1:] or ["digits"])))
    except FileNotFoundError as error:
        sys.exit(str(error))
