"""Every mistake of the catalogue ends in one message and exit code 2, and nothing is written.

The messages stand in `docs/proof/bad_input.md`, which `make soak` writes.
"""

import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from tests.bad_input.catalogue import ENTRIES
from tests.bad_input.laid_out import lay_out, lay_out_good, seen
from trainer_ext.cli import app

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "bad_input.md"
COMMAND = Path(sys.executable).with_name("trainer-ext")
PROCESSES = ("a missing label", "a number that is text", "a config of no name")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("laid_out") / "good"
    lay_out_good(folder)
    yield folder
    datasets.enable_progress_bars()


@pytest.fixture
def typed(good, tmp_path, monkeypatch):
    """What a mistake comes to: exit code and message; nothing may change in the folder in which it is made."""
    folder = tmp_path / "here"

    def type_in(entry, run):
        lay_out(entry.files, good, folder)
        monkeypatch.syspath_prepend(folder)
        before = seen(folder)
        with chdir(folder):
            code, said = run(shlex.split(entry.command))
        assert seen(folder) == before
        return code, said.replace(f"{folder.resolve()}", "HERE")

    return type_in


def in_this_process(words):
    found = CliRunner().invoke(app, words)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def message(said):
    """The one message in what was said, on one line; a box that typer draws is opened."""
    lines = [line.strip("│╭╰─╮╯ ") for line in said.splitlines() if line.startswith(("│", "trainer-ext"))]
    assert sum("error: " in line for line in lines if line.startswith("trainer-ext")) + said.count("─ Error ─") == 1
    assert "Traceback" not in said
    assert all(c.isprintable() for line in lines for c in line)
    return re.sub(r"^trainer-ext[a-z ]*: error: ", "", " ".join(" ".join(lines).split()))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.what)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake(typed, entry):
    code, said = typed(entry, in_this_process)
    assert code == 2
    found = message(said)
    assert entry.says in found
    assert row(entry, found) in PROOF.read_text(), (
        "the table is not current: pytest -m soak tests/soak/test_bad_input.py"
    )


@pytest.mark.parametrize("what", PROCESSES)
def test_a_mistake_as_a_person_types_it(typed, what):
    entry = next(entry for entry in ENTRIES if entry.what == what)

    def in_a_process(words):
        done = subprocess.run([COMMAND, *words], capture_output=True, text=True)
        assert done.stdout == ""
        return done.returncode, done.stderr

    code, said = typed(entry, in_a_process)
    assert code == 2
    assert entry.says in message(said)


def test_every_mistake_is_of_its_own():
    assert len(ENTRIES) >= 100
    assert len({entry.what for entry in ENTRIES}) == len({entry.command + str(entry.files) for entry in ENTRIES})
    assert len(ENTRIES) == len({entry.what for entry in ENTRIES})
    assert all(len(entry.says) >= 10 for entry in ENTRIES)


def row(entry, found):
    """A line of the table; the words of users, and so a `|`, stand between backticks."""
    return f"| {entry.what} | {code_of(entry.command)} | {code_of(found)} |"


def code_of(text):
    """Text as it is, in Markdown's table."""
    return f"`` {text} ``".replace("|", "\\|")
