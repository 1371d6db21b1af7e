from pathlib import Path

from ghnlib.readme import END, START, results

ROOT = Path(__file__).parent.parent


def test_the_numbers_of_the_readme_are_those_of_the_committed_metrics():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(START)[1].split(END)[0].strip()
    assert section == results(ROOT)
