"""The site of a profile's reports: complete, linked, and nothing in it is loaded from the network."""

import json
import re
import shutil
import subprocess
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

from ghnlib.params_file import read_yaml, validate
from ghnlib.pipeline import notebooks, site
from ghnlib.pipeline.article import article
from ghnlib.pipeline.diagram import stages_of, svg
from ghnlib.pipeline.page import page
from ghnlib.pipeline.provenance import record
from ghnlib.reporting.publish import Cards
from ghnlib.reporting.statistics import Measured

ROOT = Path(__file__).parents[2]


class Loaded(HTMLParser):
    """Addresses that a page loads, and those that it links to."""

    def __init__(self, html):
        super().__init__()
        self.resources, self.links = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = [value for name, value in attributes if name in ("src", "href", "data", "poster", "srcset") and value]
        (self.links if tag == "a" else self.resources).extend(found)


def markdown(text):
    return nbformat.v4.new_output("display_data", {"text/markdown": text, "text/plain": "Markdown"})


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A profile with two executed notebooks, one with a figure, two claims, times and provenance."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    plt.figure(figsize=(1, 1)).savefig("figure.png")
    figure = nbformat.v4.new_code_cell("plot()", id="a")
    png = b64encode(Path("figure.png").read_bytes()).decode()
    figure.outputs = [nbformat.v4.new_output("display_data", {"image/png": png, "text/plain": "Figure"}),
                      markdown("**Figure 1.1.** Two networks.")]  # fmt: skip
    text = nbformat.v4.new_markdown_cell("# Accuracy < 50 % & [paper](https://arxiv.org/abs/2303.04143)", id="b")
    for name, cell in (("1_architectures", figure), ("2_train-ghn3", text)):
        notebooks.write(nbformat.v4.new_notebook(cells=[cell]), Path(f"reports/digits/{name}.ipynb"))
    rows = ["paper,claim,published,ours,low,high,scale,verdict", "PPUDA Table 3,a < b,24.7,2.5,1.7,3.3,small,held"]
    Path("reports/digits/claims.csv").write_text("\n".join([*rows, "GHN,c,1,,,,,not testable at this scale"]) + "\n")
    Path("reports/digits/timing.json").write_text(json.dumps({"architectures": 12.5, "train-ghn3": 297.3}))
    record(Path(), validate(read_yaml(ROOT / "params.yaml")), {"commit": "0123456789ab", "clean": True}, 60.0, 1, 24)
    return tmp_path


def test_pages_load_nothing_and_hold_their_figures(tree):
    index = site.build("digits")
    pages = sorted(path.name for path in index.parent.iterdir())
    assert pages == ["1_architectures.html", "2_train-ghn3.html", "article.html", "index.html", "provenance.json"]
    for name in pages[:-1]:
        html = (index.parent / name).read_text()
        loaded = Loaded(html)
        assert all(address.startswith(("data:", "#")) for address in loaded.resources)
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//|import\([\"']|require\(", html)
        local = [link for link in loaded.links if not link.startswith(("#", "https://arxiv.org"))]
        assert local and all((index.parent / link.partition("#")[0]).exists() for link in local)
        assert "Made from commit 0123456789 on " in html and "provenance.json" in local
    assert "data:image/png;base64," in (index.parent / "1_architectures.html").read_text()


def test_the_index_shows_claims_and_times(tree):
    html = site.build("digits").read_text()
    assert (
        "a &lt; b" in html
        and "1 held, 1 not testable at this scale" in html
        and not re.search(r"\bnan\b", html.lower())
    )
    assert "297.3" in html and "<td>small</td>" in html
    assert "took\n297 seconds" in Path("site/digits/2_train-ghn3.html").read_text()


def code(source, *tags):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="shown")]
    return cell


def test_code_that_only_shows_is_folded_and_what_it_shows_is_not():
    cells = code("seed = 0", "parameters"), code("print('figure')", "hide-input"), code("untagged = 1")
    html = page(nbformat.v4.new_notebook(cells=list(cells)), "test")
    folded = "".join(re.findall(r"<details>.*?</details>", html, re.DOTALL))
    assert folded.count("<summary") == 1 and "print" in folded
    assert "seed" not in folded and "untagged" not in folded and "<pre>shown" not in folded
    assert "seed" in html and "untagged" in html and html.count("<pre>shown") == 3
    assert "<details open" not in html


BROKEN = "addEventListener('load', () => document.title = `broken: ${[...document.images].filter(i => !i.naturalWidth).length}`)"


def opened_images(path, folder):
    """Images of a page in Chromium, which must show all and report no errors."""
    path.write_text(path.read_text().replace("</head>", f"<script>{BROKEN}</script></head>", 1))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=2000"]
    command = ["chromium", *options, "--enable-logging=stderr", "--dump-dom", path.resolve().as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>broken: 0</title>" in shown.stdout and "CONSOLE" not in shown.stderr
    return shown.stdout.count("<img")


needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")


@needs_chromium
@pytest.mark.parametrize("name", ["1_architectures", "2_train-ghn3"])
def test_a_browser_shows_every_figure_and_has_no_errors(tree, name):
    path = site.build("digits").with_name(f"{name}.html")
    assert opened_images(path, tree) == (name == "1_architectures")


@needs_chromium
@pytest.mark.skipif(not (ROOT / "reports/digits/claims.csv").exists(), reason="needs the reports of a run")
def test_a_browser_shows_the_reports_of_the_default_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reports").symlink_to(ROOT / "reports")
    Path("dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    index = site.build("digits")
    figures = (ROOT / "reports/digits/3_evaluate.ipynb").read_text().count('"image/png"')
    assert opened_images(index, tmp_path) == 0
    assert opened_images(index.with_name("3_evaluate.html"), tmp_path) == figures > 1
    article = index.with_name("article.html")
    assert article.read_text().count("<strong>Summary.</strong>") >= 8 and opened_images(article, tmp_path) == 7


def test_figures_have_addresses_and_lead_to_their_stage(tree):
    html = site.build("digits").with_name("1_architectures.html").read_text()
    found = Loaded(html)
    assert 'id="figure-1-1"' in html and {"#figure-1-1", "index.html#stage-architectures"} <= set(found.links)
    assert 'id="stage-architectures"' in Path("site/digits/index.html").read_text()
    assert "index.html" not in page(notebooks.read(Path("reports/digits/1_architectures.ipynb")), "alone")


def test_the_picture_has_every_stage_and_what_it_needs():
    graph = stages_of(read_yaml(ROOT / "dvc.yaml"))
    assert set(graph) == {"sources", *notebooks.NOTEBOOKS}
    assert set(graph.predecessors("finetune")) == {"train"}, "and through it sources"
    assert set(graph.successors("anytime")) == {"claims"} and set(graph.successors("train")) == {
        "evaluate",
        "finetune",
        "analysis",
    }
    drawn = svg(graph, {"train": "2_train.html"})
    assert drawn.count("<rect x") == len(graph) and drawn.count('<path d="M') - 1 == graph.number_of_edges()
    assert '<a id="stage-train" href="2_train.html">' in drawn


def test_the_article_takes_summary_first_figure_first_table_and_claims():
    shown = lambda **data: nbformat.v4.new_output(
        "display_data", {key.replace("_", "/"): text for key, text in data.items()}
    )
    cards = Cards({"few-steps": Measured(1.0, 0.5, 1.5)})._repr_html_()
    cells = [
        code("1"), nbformat.v4.new_markdown_cell("## Accuracy by split\n\nmethods"), code("2"),
        nbformat.v4.new_markdown_cell("## Another section"), code("3"),
    ]  # fmt: skip
    cells[0].outputs = [markdown("**Summary.** It works."), shown(image_png="A"), markdown("**Figure 3.1.** Bars.")]
    cells[2].outputs += [
        shown(text_html="table 1"),
        shown(image_png="B"),
        shown(text_html="table 2"),
        shown(text_html=cards),
    ]
    cells[4].outputs = [shown(text_html="table 3")]
    report = nbformat.v4.new_notebook(cells=cells)
    of_one_seed = article(dict.fromkeys(("2_train-ghn1", "2_train-mlp", "3_evaluate"), report), "digits")
    assert all(f"[{name}]({name}.html)" in str(of_one_seed) for name in ("2_train-ghn1", "2_train-mlp"))
    told = article(dict.fromkeys(("2_train-ghn2-0", "2_train-mlp-1", "2_train-mlp-2", "3_evaluate"), report), "digits")
    outputs = [
        [next(iter(output.data.values())) for output in cell.outputs] for cell in told.cells if cell.cell_type == "code"
    ]
    assert outputs == [
        ["**Summary.** It works."] * 2,
        ["**Summary.** It works.", "A", "**Figure 3.1.** Bars.", "table 1", cards],
    ]
    texts = [cell.source for cell in told.cells if cell.cell_type == "markdown"]
    assert (
        "`digits`" in texts[0]
        and texts[2] == "Report: [2_train-ghn2-0](2_train-ghn2-0.html), [2_train-mlp-1](2_train-mlp-1.html)"
    )
    assert article({"3_evaluate": report}, "digits") == article({"3_evaluate": report}, "digits")


@pytest.mark.parametrize("profile", ["none", "digits"])
def test_a_profile_without_a_finished_run_is_refused(tree, profile):
    Path("reports/digits/claims.csv").unlink()
    with pytest.raises(FileNotFoundError, match=f"reports/{profile}.*make repro"):
        site.build(profile)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_hold_no_formulas_that_only_a_script_would_show(path):
    texts = [cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown"]
    assert not any(re.search(r"\$[^$]+\$|\\\(|\\\[", text) for text in texts)
