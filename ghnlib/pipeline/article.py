"""All reports of a profile told as one article: what each found, its main figure, its main table."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from nbformat import NotebookNode, v4

from ghnlib.reporting.publish import CARDS

TITLE = """# Predicting the parameters of unseen networks

The reports of the profile `{profile}` as one story: of each the summary, the main figure and a table. Every section
links to the whole report, with its methods and controls."""
SUMMARY, CAPTION, CLAIMS = "**Summary.**", "**Figure", CARDS.partition("{}")[0]
"""How outputs begin that the article knows."""


class Part(NamedTuple):
    """What the article says before a report, and the heading of the section whose first table and claims it shows."""

    title: str
    prose: str
    section: str


STORY = {
    "1_architectures": Part(
        "Networks to predict for",
        "A graph hypernetwork reads the computational graph of a network and predicts all of its parameters. It is "
        "trained on some architectures and judged on others, so the first question is which networks there are, and "
        "how far those of the splits for evaluation lie from those of training.",
        "Statistics of the splits",
    ),
    "2_train": Part(
        "Training hypernetworks",
        "At each step a hypernetwork predicts parameters for some of the training architectures; these classify a "
        "batch of images, and the gradient of their loss trains the hypernetwork, not the networks. The hypernetworks "
        "differ in how they read the graph: an MLP sees each node by itself, GHN-1 and GHN-2 pass messages along the "
        "edges, GHN-3 is a Graphormer.",
        "",
    ),
    "3_evaluate": Part(
        "Accuracy without training",
        "Now to the architectures that were set aside. Their parameters are predicted in one forward pass and used as "
        "they are: accuracy on test images, beside random parameters and a few epochs of SGD, which is what a "
        "prediction saves.",
        "Accuracy by split",
    ),
    "4_finetune": Part(
        "Fine-tuning",
        "Predicted parameters can be trained further. The question of the later papers is whether networks that start "
        "from them stay ahead of networks that start from random parameters, when both sides are tuned equally.",
        "Accuracy after each budget",
    ),
    "5_transfer": Part(
        "Other classes, few images, detection",
        "So far the images were those of the hypernetwork's training. Here networks learn classes it has not seen, "
        "from few images of each, with and without orthogonal post-processing of what is predicted, and find objects.",
        "Accuracy on few images",
    ),
    "6_analysis": Part(
        "What hypernetworks know about architectures",
        "A hypernetwork has a view of every architecture: its states, and the accuracy with its parameters. Does that "
        "say how well an architecture will train, so that good ones are found without training? And how do predicted "
        "parameters differ from trained ones?",
        "Search without training",
    ),
    "7_anytime": Part(
        "The first graph hypernetwork",
        "Search was what graph hypernetworks were invented for. The hypernetwork of 2018 ranks the blocks of its own "
        "space, and networks that answer at any budget of computation.",
        "Ranking blocks",
    ),
    "8_claims": Part(
        "What holds",
        "Every claim of the papers that this pipeline can measure is put as a number above 0, with a 95% interval over "
        "training seeds and networks.",
        "Where ours contradicts the papers",
    ),
}  # fmt: skip
"""By notebook."""


def article(reports: Mapping[str, NotebookNode], profile: str) -> NotebookNode:
    """The article as a notebook.

    Args:
        reports: executed notebooks by name ("3_evaluate", "2_train-ghn3-0"), in their order. Of hypernetworks with
            several trainings the first is told. What a report lacks is left out.
    """
    cells = [v4.new_markdown_cell(TITLE.format(profile=profile))]
    for number, (stage, part) in enumerate(STORY.items(), 1):
        names = _told(stage, reports)
        if not names:
            continue
        cells.append(v4.new_markdown_cell(f"## {number}. {part.title}\n\n{part.prose}"))
        summaries = [output for name in names for output in _summary(reports[name])]
        one = reports[names[0]] if len(names) == 1 else v4.new_notebook()
        cells.append(v4.new_code_cell(outputs=[*summaries, *_main_figure(one), *_table(one, part.section)]))
        cells.append(v4.new_markdown_cell("Report: " + ", ".join(f"[{name}]({name}.html)" for name in names)))
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i:02d}"  # equal runs give equal pages
    return v4.new_notebook(cells=cells)


def _told(stage: str, reports: Mapping[str, NotebookNode]) -> list[str]:
    """Names of a stage's reports: of trainings that differ in their seed alone the first."""
    first: dict[str, str] = {}
    for name in reports:
        if name == stage or name.startswith(f"{stage}-"):
            first.setdefault(re.sub(r"-\d+$", "", name), name)
    return list(first.values())


def _outputs(report: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    """Outputs with the heading of their section."""
    heading = ""
    for cell in report.cells:
        if cell.cell_type == "markdown":
            heading = next((line[3:] for line in cell.source.splitlines() if line.startswith("## ")), heading)
        else:
            yield from ((heading, output) for output in cell.outputs)


def _text(output: NotebookNode, kind: str = "text/markdown") -> str:
    return output.get("data", {}).get(kind, "")


def _summary(report: NotebookNode) -> list[NotebookNode]:
    return [output for _, output in _outputs(report) if _text(output).startswith(SUMMARY)]


def _main_figure(report: NotebookNode) -> list[NotebookNode]:
    """The first figure, and its caption."""
    outputs = [output for _, output in _outputs(report)]
    first = next((i for i, output in enumerate(outputs) if _text(output, "image/png")), len(outputs))
    caption = [output for output in outputs[first + 1 : first + 2] if _text(output).startswith(CAPTION)]
    return outputs[first : first + 1] + caption


def _table(report: NotebookNode, section: str) -> list[NotebookNode]:
    """The first table of a section with what is said before it, and the section's claims."""
    outputs = [output for heading, output in _outputs(report) if section and heading.startswith(section)]
    outputs = [output for output in outputs if "image/png" not in output.get("data", {}) and "data" in output]
    first = next((i for i, output in enumerate(outputs) if _text(output, "text/html")), -1)
    claims = [output for output in outputs[first + 1 :] if _text(output, "text/html").startswith(CLAIMS)]
    return outputs[: first + 1] + claims
