"""The HTML templates of tables and pages."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from anomaly_clip.reporting.table import ReportTable, TableLine
from anomaly_clip.reporting.templates import render


def test_values_are_escaped() -> None:
    line = TableLine(("<b>", "1.0"), "category")
    table = ReportTable("a & b", [], ["name", "AUROC"], [line], [])
    page = render("table.html.jinja", table=table)
    assert "<h1>a &amp; b</h1>" in page
    assert '<td class="name">&lt;b&gt;</td><td>1.0</td>' in page


def test_a_name_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("table.html.jinja")
