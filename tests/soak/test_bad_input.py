"""Every mistake of `tests/bad_input/catalogue.py` with its message goes to `docs/proof/bad_input.md`."""

from datetime import date
from importlib.metadata import version

import pytest

from tests.bad_input.catalogue import ENTRIES
from tests.bad_input.test_catalogue import PROOF, good, in_this_process, message, row, typed  # noqa: F401

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "deepspeed", "datasets", "typer")
FOUND = {}  # the message of each


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.what)
def test_a_mistake(typed, entry):  # noqa: F811
    code, said = typed(entry, in_this_process)
    assert code == 2
    FOUND[entry.what] = message(said)
    assert entry.says in FOUND[entry.what]


def test_write_the_table():
    assert len(FOUND) == len(ENTRIES), "some were not run"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    PROOF.write_text(
        "# What goes wrong, and what is said of it\n\n"
        f"Generated on {date.today().isoformat()} by `make soak`: {len(ENTRIES)} wrong command lines, files, configs and "
        "data sets, each typed in a folder of its own with what it needs. Each ends with exit code 2 and this one message, "
        "without a traceback, and leaves every file and folder as it was. `make test` repeats all of them. `HERE` is the "
        "folder.\n\n"
        "| what is wrong | command | message |\n|---|---|---|\n"
        + "\n".join(row(entry, FOUND[entry.what]) for entry in ENTRIES)
        + f"\n\n{versions}.\n"
    )
