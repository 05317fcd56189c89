"""The report's files, of a made-up run."""

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from load_tests.plots import token_times
from load_tests.publishing import Change
from load_tests.report import Report, html, report_of, text, write
from load_tests.runner import Run
from tests.fixtures.load_run import answered, refused, run_of


def busy_run() -> Run:
    records = [answered(float(second), gaps_s=[0.1, 0.2], model_class="head") for second in range(5)]
    return run_of(*records, refused(2.0), changes=[Change("replace", "a", 1.0, 0.1, None)])


def svgs(page: str) -> list[ElementTree.Element]:
    found = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)
    return [ElementTree.fromstring(base64.b64decode(svg)) for svg in found]


def test_the_files_have_the_scenario_s_name_and_the_json_file_has_everything(tmp_path: Path) -> None:
    report = report_of(busy_run())
    json_file, html_file = write(report, tmp_path / "new" / "folder")
    assert (json_file.name, html_file.name) == ("made-up.json", "made-up.html")
    again = msgspec.json.decode(json_file.read_bytes(), type=Report)
    assert again == report
    assert report_of(again.run) == report


def test_the_page_has_numbers_and_plots_and_needs_no_network() -> None:
    page = html(report_of(busy_run()))
    assert "<td>head<td>5<td>0<td>0.5 / 0.5 / 0.5 / 0.5" in page
    assert "<td>errors<td>0<td>1<td class=failed>failed" in page
    assert "error 503 queue_full" in page
    assert len(svgs(page)) == 3
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page) and "@import" not in page and "<script" not in page


def test_what_a_server_says_is_shown_as_text() -> None:
    page = html(report_of(run_of(refused(0.0, error="<script>alert(1)</script>"))))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "a &lt;made-up&gt; scenario" in page


@pytest.mark.parametrize("run", [run_of(), run_of(refused(1.0)), run_of(answered(0.0, gaps_s=[]))])
def test_there_is_a_report_of_a_run_with_next_to_nothing_in_it(run: Run) -> None:
    assert len(svgs(html(report_of(run)))) == 3


def test_the_terminal_says_what_was_missed() -> None:
    said = text(report_of(busy_run()))
    assert said.startswith("made-up: FAILED\n") and "FAILED errors: 1, bound 0" in said
    assert text(report_of(run_of(answered(0.0, gaps_s=[])))).startswith("made-up: passed\n")


def test_token_times_are_put_together_from_the_gaps() -> None:
    times = token_times([answered(1.0, gaps_s=[0.25, 0.5]), refused(2.0)])
    assert np.array_equal(times, [1.5, 1.75, 2.25])
