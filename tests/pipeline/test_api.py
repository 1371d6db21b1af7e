"""Pages of the library's docstrings."""

from pathlib import Path

from ghnlib.pipeline.api import ROOMS

ROOT = Path(__file__).parents[2]


def test_every_room_of_the_library_has_pages():
    rooms = {path.parent.name for path in ROOT.glob("ghnlib/*/__init__.py")}
    assert set(ROOMS) - {"config"} == rooms - {"experiments", "pipeline"}
