"""Figures of reports: one look, numbers, captions."""

import matplotlib.pyplot as plt
import seaborn as sns
from IPython.display import Markdown, display
from matplotlib.figure import Figure


class Figures:
    """Figures of the report of this number, numbered in the order in which they are shown ("Figure 3.2"); it sets their
    look."""

    def __init__(self, report: int):
        self.report, self.count = report, 0
        sns.set_theme(context="notebook", style="whitegrid", palette="deep")
        look = {"figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10}
        plt.rcParams.update(look)

    def show(self, figure: Figure, caption: str) -> None:
        """Display a figure and below it its number and caption: what is drawn, of how many networks and seeds."""
        self.count += 1
        display(figure)
        plt.close(figure)  # the end of the cell would show it again
        display(Markdown(f"**Figure {self.report}.{self.count}.** {caption}"))
