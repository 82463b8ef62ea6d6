"""Names of labels, columns, models and files that are commands to a browser or a terminal are text in all that is shown."""

import json
import re
import shutil
from contextlib import chdir
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from tests.bad_input.laid_out import PAIRS, jsonl, lay_out_good
from tests.conftest import tiny_model
from trainer_ext.callbacks.run_summary import RunSummary
from trainer_ext.cli import app
from trainer_ext.inline_svg import inline_svg
from trainer_ext.plain_text import masked, printable

HOSTILE = [
    "<script>alert(1)</script>", "](javascript:alert(1))", "\"&'><img src=x onerror=alert(1)>", "[red]x[/red]",
    "\x1b[2J\x1b]0;title\x07", "\u202eevil\u202c", "a|b\n# c", "`code`", "``` x", "x\u2028y", "[x](javascript:alert(2))",
]  # fmt: skip
ACTIVE = ("script", "img", "iframe", "object", "embed", "form", "base", "link", "foreignobject")


class Page(HTMLParser):
    """What of a page acts; only its icon, which is empty, is a `link`."""

    def __init__(self, text):
        super().__init__()
        self.acting, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ACTIVE and given != {"rel": "icon", "href": "data:,"}:
            self.acting.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (
                name in ("href", "src", "xlink:href") and not re.match(r"data:,|data:image/png|https://|#", value)
            ):
                self.acting.append(f"{name}={value}")

    def handle_data(self, data):
        self.text.append(data)


def check_text(text):
    """No control, no invisible character."""
    assert printable(text) == text, [c for c in text if not (c.isprintable() or c in "\n\t")]


def check_page(text):
    check_text(text)
    page = Page(text)
    assert page.acting == []
    return "".join(page.text)


def check_markdown(text):
    check_text(text)
    check_page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_check_sees(name):
    """The names do act where they are put in as they are."""
    raw = f"<p>{name}</p><a href='{name}'>"
    rendered = MarkdownIt("commonmark", {"html": True}).render(f"[x{name}\n\n{name}")
    seen = bool(Page(raw).acting or Page(rendered).acting or printable(name) != name)
    assert seen or name in ("[red]x[/red]", "a|b\n# c", "`code`", "``` x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose labels, model and folder have such names, and what it printed."""
    home = tmp_path_factory.mktemp("named") / "home"
    lay_out_good(home)
    model = "<img src=x onerror=alert(1)> \x1b[2J"
    shutil.copytree(home / "model", home / model)
    tiny_model(num_labels=len(HOSTILE)).save_pretrained(home / model)
    rows = [{"sentence1": a, "sentence2": b, "label": name} for name in HOSTILE for a, b, _ in PAIRS[:2]]
    (home / "both").mkdir()
    for split in ("train", "validation"):
        (home / "both" / f"{split}.jsonl").write_text(jsonl(*rows))
    words = ["--dataset", "both", "--model", model, "--max-steps", "2", "--batch-size", "8", "--use-cpu"]
    out = "out <script>alert(3)</script>"
    with chdir(home):
        run = CliRunner().invoke(
            app, ["train", *words, "--output-dir", out, "--class-weights", "balanced", "--disable-tqdm", "true"]
        )
        parity = CliRunner().invoke(app, ["parity", "run", *words, "--modes", "single", "--output-dir", f"{out}/p"])
    assert run.exit_code == 0, run.output
    assert parity.exit_code == 0, parity.output
    return home / out, run.stdout, parity.stdout


@pytest.mark.filterwarnings("ignore")
def test_the_pictures(trained):
    folder, *_ = trained
    for name in ("confusion_matrix.svg", "precision_recall.svg"):
        text = (folder / name).read_text()
        check_text(text)
        assert not Page(text).acting
        shown = "".join(ElementTree.fromstring(text).itertext())
        assert "<script>alert(1)" in shown


def test_the_terminal(trained):
    _, run, parity = trained
    for text in (run, parity):
        check_text(text)
    assert r"\x1b[2J" in run
    assert "[red]x[/red]" in run


def test_the_report(trained):
    folder, *_ = trained
    assert "<script>alert(3)" in check_page((folder / "p" / "report.html").read_text())
    check_markdown((folder / "p" / "report.md").read_text())


@pytest.mark.filterwarnings("ignore")
def test_a_record_that_is_hostile(trained, call, tmp_path):
    """Whoever made the record chose its path, which is a row's name."""
    folder, *_ = trained
    for which, name in (("a", "x"), ("b", " ".join(HOSTILE))):
        made = tmp_path / which
        shutil.copytree(folder / "p" / "single" / "manual", made)
        lines = (made / "trajectory.jsonl").read_text().splitlines()
        header = {**json.loads(lines[0]), "path": name}
        steps = [line.replace('"loss": ', '"loss": 1') if which == "b" else line for line in lines[1:]]
        (made / "trajectory.jsonl").write_text("\n".join([json.dumps(header), *steps]))
    found = call("parity", "compare", tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "c")
    assert found.exit_code == 1, found.output
    check_text(found.output)
    assert "<script>alert(1)" in check_page((tmp_path / "c" / "report.html").read_text())
    check_markdown((tmp_path / "c" / "report.md").read_text())


@pytest.mark.filterwarnings("ignore")
def test_the_summary(trainer, tmp_path):
    model = tiny_model()
    model.config._name_or_path = " ".join(HOSTILE)
    made = trainer(model=model, callbacks=[RunSummary()], run_name=HOSTILE[0], output_dir=str(tmp_path / HOSTILE[3]))
    made.train()
    folder = tmp_path / HOSTILE[3]
    assert "<script>alert(1)" in check_page((folder / "run_summary.html").read_text())
    card = (folder / "README.md").read_text()
    check_markdown(card.split("---", 2)[2].replace("<!-- Written", "").replace("next run. -->", ""))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_drawing():
    def draw(figure):
        figure.subplots().plot([0, 1], label=" ".join(HOSTILE))
        figure.axes[0].legend()

    text = str(inline_svg(draw, (30, 3), name="a", described=" ".join(HOSTILE)))
    check_text(text)
    assert not Page(text).acting
    assert "<script>alert(1)" in "".join(ElementTree.fromstring(re.sub(r"xlink:", "", text)).itertext())


def test_masked(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    assert (
        masked("at 0123456789, https://me:pass@host/x, hf_abcdefghijklmnopqrst") == "at ***, https://***@host/x, ***"
    )
