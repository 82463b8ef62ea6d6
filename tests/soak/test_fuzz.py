"""The readers of `tests/bad_input/readers.py`, with many more files."""

import pytest

from tests.bad_input.readers import READERS, fuzz
from tests.bad_input.test_fuzz import EXAMPLES, _own_cache  # noqa: F401

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]
TIMES = 20


@pytest.mark.parametrize("name", READERS)
def test_a_reader(name, tmp_path):
    seen = fuzz(name, tmp_path, TIMES * EXAMPLES.get(name, 150))
    print(name, seen)
    assert seen.keys() <= {"read", "refused"}
