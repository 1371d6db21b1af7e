"""Curves of ``dvc plots show`` as a page that needs no network: ``python -m ghnlib.pipeline.curves`` (``make plots``).

DVC's own page loads Vega from the network; its template here holds it.
"""

import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

TEMPLATE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Trainings</title>
<script>{bundle}</script></head><body>{{plot_divs}}</body></html>"""
VEGA_LITE = "5.20"
"""Version of DVC's charts."""


def build(folder: Path) -> int:
    """Write the page to a folder; returns DVC's exit status.

    Raises:
        ModuleNotFoundError: vl-convert is missing: ``make plots`` installs it.
    """
    bundle = import_module("vl_convert").javascript_bundle(vl_version=VEGA_LITE)  # no part of the locked environment
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as template:
        template.write(TEMPLATE.format(bundle=bundle))
        template.flush()
        command = ["plots", "show", "--html-template", template.name, "--out", str(folder)]
        return subprocess.run([sys.executable, "-m", "dvc", *command]).returncode


if __name__ == "__main__":
    sys.exit(build(Path("site", "plots")))
