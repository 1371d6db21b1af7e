"""Tables and claims as reports show them."""

import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from ghnlib.pipeline.notebooks import NOTEBOOKS
from ghnlib.reporting import publish
from ghnlib.reporting.publish import Cards, claim_of, known_claims, published
from ghnlib.reporting.statistics import Measured

VERDICTS = [Measured(*of) for of in ((1.0, 0.5, 2.0), (-1.0, -2.0, -0.5), (0.0, -1.0, 1.0), (1.0,), (math.nan,))]


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed."""
    shown = []
    monkeypatch.setattr(publish, "display", shown.append)
    return shown


@pytest.fixture
def columns(monkeypatch):
    """Two columns that papers print."""
    fake = {
        "a": pd.Series({"ghn2": "66.9 ± 0.3", "ghn3, test": "71.7"}, name="paper"),
        "b": pd.Series({"ghn2": 14.3}, name="paper, top-5"),
    }
    monkeypatch.setattr(publish, "published", fake.__getitem__)


class Text(HTMLParser):
    """Texts of the cells of a table by row, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.rows = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.rows[-1][-1] += data


def test_published_columns_stand_behind_ours(displayed, columns):
    table = pd.DataFrame({"ours": [1.5, math.nan]}, index=["ghn2", "mlp"])
    publish.show(table, "a", "b")
    (shown,) = displayed
    assert shown.to_dict("list") == {"ours": [1.5, ""], "paper": ["66.9\xa0±\xa00.3", ""], "paper, top-5": [14.3, ""]}
    assert list(shown.index) == ["ghn2", "mlp"] and list(table.columns) == ["ours"]


def test_numbers_are_read_at_a_glance(displayed):
    publish.show(pd.DataFrame({"whole": [3000.0, math.nan], "large": [1.5, 12345.678], "sure": [True, False]}))
    assert displayed[0].to_dict("list") == {"whole": ["3,000", ""], "large": [1.5, "12,346"], "sure": [True, False]}


def test_rows_of_several_keys_are_published_by_all(displayed, columns):
    index = pd.MultiIndex.from_tuples([("ghn3", "test"), ("ghn3", "wide")])
    publish.show(pd.DataFrame({"ours": [1.0, 2.0]}, index=index), "a")
    assert displayed[0]["paper"].tolist() == ["71.7", ""] and displayed[0].index.equals(index)


def test_two_columns_of_one_title_are_an_error(columns):
    table = pd.DataFrame({"paper": [1.0]}, index=["ghn2"])
    with pytest.raises(ValueError, match="two columns 'paper'"):
        publish.show(table, "a")
    with pytest.raises(ValueError, match="two columns 'paper'"):
        publish.show(table[[]], "a", "a")


def test_what_no_paper_prints_is_an_error():
    with pytest.raises(KeyError, match=r"no column 'evaluate/none'; there are .*evaluate/cifar10"):
        published("evaluate/none")


def test_every_published_column_has_a_title_and_numbers_as_printed():
    names = publish._read("published.yaml")
    for name in names:
        column = published(name)
        assert re.fullmatch(r"[a-z]+/[a-z0-9-]+", name) and isinstance(column.name, str) and len(column)
        assert column.map(lambda value: isinstance(value, str | int | float)).all()


def test_every_claim_says_where_it_stands_and_who_measures_it():
    claims = known_claims()
    assert len(claims) == len({claim.claim for claim in claims.values()})
    for key, claim in claims.items():
        assert re.fullmatch(r"[a-z0-9-]+", key) and claim.stage in NOTEBOOKS
        assert re.match(r"(PPUDA|GHN-3|GHN-orth|GHN)( |$)", claim.paper)
        assert isinstance(claim.published, str)


def test_a_claim_of_several_kinds_says_which():
    assert claim_of("orth/digits, 0 to 4").claim == known_claims()["orth"].claim + ", digits, 0 to 4"
    assert claim_of("orth") == known_claims()["orth"]
    with pytest.raises(KeyError, match=r"claims\.yaml has no claim 'orht'"):
        claim_of("orht/digits")


def test_a_card_tells_the_claim_both_numbers_and_the_verdict(displayed):
    publish.show_claims({"few-steps": Measured(-10.04, -13.51, -6.49, 10), "orth-correlation/a < b": Measured(0.0651)})
    page = Text(displayed[0]._repr_html_())
    assert page.open == []
    assert page.rows == [
        ["✗ not held", known_claims()["few-steps"].claim, "GHN-3 Table 226.7", "ours, n = 10-10 [-13.5, -6.49]"],
        [
            "? not decided(no interval)",
            known_claims()["orth-correlation"].claim + ", a < b",
            "GHN-orth Fig. 2not legible",
            "ours+0.0651",
        ],
    ]


def test_a_card_tells_what_a_claim_needs_and_shows_our_number_all_the_same(displayed):
    publish.show_claims({"full-training": Measured(10.04, 6.49, 13.51, 10)})
    ((verdict, *_, ours),) = Text(displayed[0]._repr_html_()).rows
    assert verdict == "– not testable at this scale(needs GHN-3-XL, m = 16, 90 epochs)"
    assert ours == "ours, n = 10+10 [6.49, 13.5]"


def test_a_card_is_text_in_a_terminal():
    cards = {"full-training": Measured(-10.04, -13.51, -6.49, 10), "orth-correlation": Measured(math.nan)}
    assert repr(Cards(cards)) == (
        "– not testable at this scale (needs GHN-3-XL, m = 16, 90 epochs): points at the end of the longest training: "
        "from GHN-3 over from random (paper: XL/m16)\n"
        "    GHN-3 Table 6: 0.2; ours: -10 [-13.5, -6.49], n = 10\n"
        f"– not testable at this scale: {known_claims()['orth-correlation'].claim}\n"
        "    GHN-orth Fig. 2: not legible; ours: none"
    )


def test_where_nothing_could_be_measured_it_is_said():
    assert repr(Cards({})) == publish.NO_CLAIM and Text(Cards({})._repr_html_()).open == []
    assert publish.NO_CLAIM in Cards({})._repr_html_()


def test_verdicts_are_told_apart_without_colours():
    looks = [publish.look_of(measured.verdict) for measured in VERDICTS]
    assert [look.sign for look in looks] == ["✓", "✗", "?", "?", "–"]
    assert len({look.background for look in looks}) == 4


def test_a_table_of_claims_is_coloured_by_verdict():
    table = pd.DataFrame(
        [("a < b", "24.7", 1.23456, math.nan, "held")], columns=["claim", "published", "ours", "low", "verdict"]
    )
    html = publish.coloured(table, "PPUDA").to_html()
    assert publish.look_of("held").background in html and "1.23" in html and "1.2345" not in html
    assert "nan" not in html and "24.7" in html and "PPUDA</caption>" in html
    assert "PPUDA" in publish.coloured(table[:0], "PPUDA").to_html(), "none"
