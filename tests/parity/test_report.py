"""The report: what the page, its twins and its curves say, for rows that are equal, differ and failed."""

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.parity.test_comparison import trajectory, with_step
from trainer_ext.parity import compare, diagnose
from trainer_ext.parity.curves import Line, described, figure
from trainer_ext.parity.matrix import Row
from trainer_ext.parity.report import verdict, write
from trainer_ext.parity.tolerance import BITWISE, ROUNDING
from trainer_ext.plain_text import for_markdown


def row(mode, candidate, tolerance=ROUNDING["float32"], dtype="float32"):
    reference = trajectory(header={"arguments": {"max_grad_norm": 1.0, "seed": 1}})
    found = compare(reference, candidate, tolerance)
    first = found.first_difference
    return Row(
        mode, dtype, tolerance, dropout=True, comparison=found, reference=reference, candidate=candidate,
        folders=("runs/a b", "runs/c"), diagnosis=diagnose(reference, candidate, first) if first else None,
    )  # fmt: skip


FOURFOLD = trajectory(
    header={"arguments": {"max_grad_norm": 1.0, "seed": 2}},
    steps=[dataclasses.replace(s, loss=2 * s.loss, grad_norm=2 * s.grad_norm) for s in trajectory().steps],
)
NAN = with_step(2, loss=math.nan)
ROWS = [
    row("single", trajectory(), BITWISE),
    row("stock:ga4", FOURFOLD),
    row("nan", NAN),
    Row("zero2", "float32", ROUNDING["float32"], dropout=False, error="RuntimeError: no <device>", log="rank0: a & b"),
]


@pytest.fixture
def folder(tmp_path):
    write(ROWS, tmp_path, command=["trainer-ext", "parity", "run", "--modes", "a b"], about="About <it>.")
    return tmp_path


def test_the_page(folder):
    page = (folder / "report.html").read_text()
    assert "Not the same run: nan differs, zero2 failed." in page
    assert "stock:ga4: the loss is not divided by the whole step" in page
    assert "2.000 times the reference&#39;s = accumulation steps" in page
    link = '<a href="https://github.com/huggingface/transformers/issues/47688">huggingface/transformers#47688</a>'
    assert link in page
    assert "Arguments that differ: seed: 1 / 2." in page
    assert "no &lt;device&gt;" in page
    assert "rank0: a &amp; b" in page
    assert "About &lt;it&gt;." in page
    assert "trainer-ext parity compare &#39;runs/a b&#39; runs/c --tolerance 0.0001" in page
    assert not re.search(r'(?:src|href)="(?!https://github\.com|data:|#)', page), "the page needs nothing but itself"
    assert "light-dark(" in page
    assert 'name="viewport"' in page


def test_its_twins_say_the_same(folder):
    document = json.loads((folder / "parity.json").read_text())
    assert document["verdict"] == verdict(ROWS)
    assert [mode["verdict"] for mode in document["modes"]] == ["equal", "differs", "differs", "failed"]
    assert document["modes"][1]["diagnosis"]["known"].endswith("47688")
    assert document["modes"][2]["max_abs_loss_difference"] == "nan"
    assert document["modes"][3]["log"] == "rank0: a & b"
    text = (folder / "report.md").read_text()
    assert f"**{for_markdown(verdict(ROWS))}**" in text
    assert "| single | equal | 3 | 1.000 | 1.000 | 0 | 0 | bitwise |" in text
    assert "Likely cause\\: the loss is not divided by the whole step's items." in text
    assert "rank0: a & b" in text


def test_the_verdict_of_rows_that_agree():
    both = [row("single", trajectory(), BITWISE), row("ga4", trajectory())]
    assert verdict(both) == "Test are equal within fp32 rounding in single, ga4 (dropout on)."
    assert "bitwise equal" in verdict(both[:1])
    assert verdict([*both[:1], ROWS[1]]).startswith("Test are bitwise equal"), "stock rows do not count"


def test_a_figure_is_sound_xml_with_a_text_alternative():
    lines = [Line("a & b", [1, 2, 3], [1.0, 2.0, math.nan], [1.0, 2.5, 1.0]), Line("none", [1], [None], [None])]
    root = ElementTree.fromstring(str(figure("loss", lines)))
    assert root.get("role") == "img"
    said = root.get("aria-label")
    assert said == described("Loss of each step", lines)
    assert "a & b" in said
    assert "from 1 to 2; the largest relative difference from the reference is 0.2, in a & b" in said
    drawn = "".join(root.itertext())
    assert "optimizer step" in drawn
    assert "relative difference" in drawn
    assert "#000000" not in str(figure("loss", lines)), "it takes the page's colour"


def test_figures_of_one_page_do_not_share_ids():
    line = [Line("a", [1, 2], [1.0, 2.0], [1.0, 2.0])]
    ids = [set(re.findall(r' id="([^"]+)"', str(figure(name, line)))) for name in ("loss", "grad_norm")]
    referred = [set(re.findall(r'#([\w-]+)[")]', str(figure(name, line)))) for name in ("loss", "grad_norm")]
    assert referred[0]
    assert referred[0].isdisjoint(referred[1])
    assert referred[0] <= ids[0]


def test_nothing_recorded():
    assert described("Loss", []) == "Loss: no run says it."
    assert "svg" in str(figure("grad_norm", []))
