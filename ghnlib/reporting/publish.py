"""What reports show: tables with the papers' numbers beside ours, claims as cards."""

from collections.abc import Mapping
from functools import cache
from html import escape
from math import isnan
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from IPython.display import display
from pandas.io.formats.style import Styler
from ruamel.yaml import YAML

from ghnlib.reporting.statistics import Measured

OUT_OF_DISTRIBUTION = ("wide", "deep", "dense", "bnfree")
EVALUATED = ("test", *OUT_OF_DISTRIBUTION)
SPLITS = ("train", "val", *EVALUATED)
"""Splits of DeepNets, in the order of tables."""


class Look(NamedTuple):
    """Of a verdict: a sign that is told apart without colours, the colours of its background and of lines."""

    sign: str
    background: str
    line: str


LOOKS = {
    "held": Look("✓", "#c6e5c3", "#2f8a3c"),
    "not held": Look("✗", "#f4c2bd", "#c0392b"),
    "not decided": Look("?", "#f3eac2", "#b08900"),
    "not testable": Look("–", "#e6e6e6", "#8c8c8c"),
}
"""By how verdicts begin."""

# Where styles are dropped (notebooks on a git host) a card is a row of a plain table, and reads as well.
CARDS = """<table style="border-collapse: separate; border-spacing: 0 0.4em; width: 100%; max-width: 68em; margin: 0">
{}</table>"""
CARD = """<tr style="background: none">
<td style="{box}; width: 8em; text-align: center; border-left: 0.4em solid {look.line};
 background: {look.background}; color: #222">{look.sign} <b>{verdict}</b>{note}</td>
<td style="{box}; text-align: left">{claim}</td>
<td style="{box}; width: 10em; text-align: left"><small>{paper}</small><br>{published}</td>
<td style="{box}; width: 14em; text-align: left; border-right: 1px solid #8886"><small>{count}</small><br>{ours}</td>
</tr>"""
BOX = "padding: 0.4em 0.8em; border: solid #8886; border-width: 1px 0"
NO_CLAIM = "No claim of the papers can be tested here at this scale."


class Claim(NamedTuple):
    """A sentence that a number is above 0. ``paper``: and place in it; ``published``: its number, as printed;
    ``stage``: where ours is measured; ``needs``: of what alone the paper says it, where no profile has that;
    ``differs``: from the paper, where ours contradicts it; ``scale``: what ours was measured with, if not what the
    stage's hypernetworks are (a key of ``pipeline.claims.scales``)."""

    paper: str
    claim: str
    published: str
    stage: str
    needs: str = ""
    differs: str = ""
    scale: str = ""

    def verdict(self, found: Measured) -> str:
        """That of the number, or that a number of other hypernetworks or lengths cannot decide it."""
        return f"not testable at this scale (needs {self.needs})" if self.needs else found.verdict


@cache
def known_claims() -> dict[str, Claim]:
    """All claims of claims.yaml, by id."""
    return {key: Claim(**fields) for key, fields in _read("claims.yaml").items()}


def claim_of(key: str) -> Claim:
    """The claim that an id, "id/what it is of", belongs to, its sentence with that. Raises KeyError."""
    name, _, of = key.partition("/")
    if name not in known_claims():
        raise KeyError(f"claims.yaml has no claim {name!r}")
    claim = known_claims()[name]
    return claim._replace(claim=f"{claim.claim}, {of}") if of else claim


@cache
def published(name: str) -> pd.Series:
    """A column of published.yaml: row -> what the paper prints, its ``name`` the title. Raises KeyError."""
    columns = _read("published.yaml") or {}
    if name not in columns:
        raise KeyError(f"published.yaml has no column {name!r}; there are {', '.join(columns) or 'none'}")
    return pd.Series(columns[name]["values"], name=columns[name]["title"], dtype=object)


@cache
def _read(name: str) -> dict:
    return YAML(typ="safe", pure=True).load(Path(__file__).with_name(name))


def show(table: pd.DataFrame, *columns: str) -> None:
    """Display a table, blank where there is nothing, with columns of ``published`` behind ours. A row of several keys,
    ("ghn2", "test"), is published as "ghn2, test". Raises KeyError if nothing of this name is published, ValueError if
    the table has a column of the same title."""
    rows = [", ".join(map(str, key)) if isinstance(key, tuple) else key for key in table.index]
    for column in map(published, columns):
        if column.name in table.columns:
            raise ValueError(f"the table has two columns {column.name!r}: give one another title")
        table = table.assign(**{column.name: column.reindex(rows).to_numpy()})
    with pd.option_context("display.max_colwidth", None):
        display(table.apply(_readable))


def _readable(column: pd.Series) -> pd.Series:
    """Blank where there is nothing; whole numbers without a point, large ones in groups of three digits."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        whole = (column.dropna() % 1 == 0).all()
        column = column.map(lambda value: f"{value:,.0f}" if whole or abs(value) >= 1000 else value, na_action="ignore")
    column = column.astype(object).where(column.notna(), "")
    return column.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", regex=True)


def look_of(verdict: str) -> Look:
    """Sign and colours of a verdict."""
    return next(look for start, look in LOOKS.items() if verdict.startswith(start))


def coloured(table: pd.DataFrame, caption: str = "") -> Styler:
    """A table with its column ``verdict`` first and coloured, numbers with three digits, blank where there is none."""
    table = table[["verdict", *table.columns.drop("verdict")]]
    numbers = list(table.select_dtypes("number"))
    styler = table.style.map(
        lambda verdict: f"background-color: {look_of(verdict).background}; color: #222", subset=["verdict"]
    )
    styler = styler.set_properties(subset=list(table.columns.difference(numbers)), **{"text-align": "left"})
    return styler.format("{:.3g}", subset=numbers, na_rep="").hide().set_caption(caption)


def show_claims(claims: Mapping[str, Measured]) -> None:
    """Display claims as cards: the sentence, the paper's number, ours with its interval and n, the verdict. ``claims``:
    id of a claim (a key of claims.yaml, or "key/what it is of") -> what was measured."""
    display(Cards(claims))


class Cards:
    """Claims as HTML in a notebook and as text in a terminal."""

    def __init__(self, claims: Mapping[str, Measured]):
        self.claims = [(claim_of(key), found) for key, found in claims.items()]

    def _repr_html_(self) -> str:
        return CARDS.format("".join(_card(*claim) for claim in self.claims)) if self.claims else f"<p>{NO_CLAIM}</p>"

    def __repr__(self) -> str:
        return "\n".join(_as_text(*claim) for claim in self.claims) or NO_CLAIM


def _card(claim: Claim, found: Measured) -> str:
    verdict, _, note = claim.verdict(found).partition(" (")
    return CARD.format(
        box=BOX, look=look_of(verdict), verdict=verdict, note=f"<br><small>({note}</small>" if note else "",
        claim=escape(claim.claim), paper=escape(claim.paper), published=escape(claim.published),
        count=f"ours, {found.count}" if found.count else "ours", ours=_number(found, "<b>{}</b>"),
    )  # fmt: skip


def _as_text(claim: Claim, found: Measured) -> str:
    count, verdict = f", {found.count}" if found.count else "", claim.verdict(found)
    return (
        f"{look_of(verdict).sign} {verdict}: {claim.claim}\n"
        f"    {claim.paper}: {claim.published}; ours: {_number(found)}{count}"
    )


def _number(found: Measured, bold: str = "{}") -> str:
    """With three digits and its interval."""
    if isnan(found.value):
        return "none"
    interval = "" if isnan(found.low) else f" [{found.low:.3g}, {found.high:.3g}]"
    return bold.format(f"{found.value:+.3g}") + interval
