"""One thread for tests and what they start; the values that the released code gives, where they are at hand."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more are slower for small tensors, many times where cores are shared
GIVEN = os.environ.get("GHNLIB_REFERENCE")
REFERENCE = Path(GIVEN or Path(__file__).parents[2] / "shared" / "reference")


def pytest_report_header():
    return f"released code: {REFERENCE if _at_hand() else 'no values, set GHNLIB_REFERENCE to their folder'}"


def pytest_collection_modifyitems(config, items):
    """Without the values, tests marked ``reference`` are deselected; where a folder is named they must pass."""
    if not _at_hand():
        needing = [item for item in items if item.get_closest_marker("reference")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def _at_hand():
    return bool(GIVEN) or REFERENCE.is_dir()


@pytest.fixture
def reference():
    """Folder of the values that the released code gives."""
    return REFERENCE
