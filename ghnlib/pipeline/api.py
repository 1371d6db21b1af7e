"""The library's docstrings as pages that need no network: ``python -m ghnlib.pipeline.api`` (``make docs``).

Public names stand on the first page, ghnlib.html, then the modules by room.
"""

import sys
import warnings
from importlib import import_module
from pathlib import Path

ROOMS = ("config", "graphs", "data", "architectures", "deepnets", "released", "hypernetwork", "measuring", "training",
         "reporting")  # fmt: skip
"""All but the reports' own: what they compute (experiments) and how they are run (pipeline)."""


def build(folder: Path) -> Path:
    """Write the pages to a folder; returns the first.

    Raises:
        ModuleNotFoundError: pdoc is missing: ``make docs`` installs it.
    """
    pdoc = import_module("pdoc")  # no part of the locked environment, on which every stage depends
    library = import_module("ghnlib")
    for name in library.__all__:
        setattr(library, name, getattr(library, name))  # they are imported when used, and pdoc uses none
    library.__all__ += ROOMS  # which the first page then links to
    warnings.filterwarnings("ignore", module="pdoc")  # of annotations whose names only type checkers import
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    pdoc.pdoc("ghnlib", *(f"ghnlib.{room}" for room in ROOMS), output_directory=folder)
    return folder / "ghnlib.html"


if __name__ == "__main__":
    sys.exit(print(build(Path("site", "api"))))
