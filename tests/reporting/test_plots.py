"""Figures of reports: numbers and captions."""

import matplotlib.pyplot as plt

from ghnlib.reporting import plots


def test_figures_are_numbered_shown_once_and_told(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    figures = plots.Figures(3)
    for caption in "Bars.", "Lines.":
        figure = plt.figure()
        figures.show(figure, caption)
        assert shown[-2] is figure and figure.number not in plt.get_fignums()
    assert [shown[i].data for i in (1, 3)] == ["**Figure 3.1.** Bars.", "**Figure 3.2.** Lines."]


def test_every_figure_of_a_notebook_is_shown_with_a_caption():
    from shared import ROOT

    from ghnlib.pipeline.notebooks import NOTEBOOKS, read

    for name in NOTEBOOKS.values():
        cells = [cell.source for cell in read(ROOT / "notebooks" / f"{name}.ipynb").cells if cell.cell_type == "code"]
        drawn = [source for source in cells if "plt.subplot" in source or ".plot(" in source or "sns.relplot" in source]
        assert drawn and all("figures.show(" in source for source in drawn), name
        assert f"figures = Figures({name[0]})" in "\n".join(cells)
