"""Files that nobody meant: each reader takes or refuses them, and does nothing else. The same files in every run."""

import datasets
import pytest

from tests.bad_input.readers import READERS, fuzz
from trainer_ext.checkpoints.inert import parse
from trainer_ext.data import load_splits

EXAMPLES = {"CSV": 25, "TSV": 15, "JSON lines": 25, "JSON": 20, "parquet": 25, "an accelerate config": 25}
COUNTS_FOR_NOTHING = "a rehearsal's verdict"  # where it cannot be read


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What `datasets` makes of the files is gone with them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_reader(name, tmp_path):
    seen = fuzz(name, tmp_path, EXAMPLES.get(name, 150))
    assert seen.get("refused") or name == COUNTS_FOR_NOTHING, "nothing was refused: the files are too good"
    assert seen.keys() <= {"read", "refused"}


def test_a_pickle_cannot_ask_for_room():
    """Nine bytes that have Python's own parser make room for four thousand million values."""
    with pytest.raises(ValueError, match="numbers a value 4,294,967,295, in 9 bytes"):
        parse(b"\x80\x02Nr\xff\xff\xff\xff.")


@pytest.mark.parametrize(
    "content", ["null", "\n null\n", '{"a": 1}\nnull', '{"a": 1} null', '[{"a": 1}, null]', "\ufeffnull"], ids=repr
)
def test_a_row_that_is_null_does_not_end_the_process(tmp_path, content):
    """With a segmentation fault, which pyarrow alone does."""
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match="null"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("content", ['{"sentence": "} null", "label": 0}', '{"sentence": "a", "x": null, "label": 0}'])
def test_other_nulls_are_read(tmp_path, content):
    (tmp_path / "train.json").write_text(f'{content}\n{{"sentence": "b", "label": 1}}')
    assert len(load_splits(str(tmp_path)).splits["train"]) == 2
