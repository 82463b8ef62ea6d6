"""What reads files of others, and what it may be given: a strategy of bytes, the file's name, and a call for each.

`fuzz(name, examples)` gives a reader so many files. It either reads them or raises ValueError or OSError: no other error,
no crash and no hang.
"""

import json
import pickle
from collections import OrderedDict
from datetime import timedelta

import pyarrow as pa
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bad_input.laid_out import jsonl, parquet
from trainer_ext.checkpoints.inert import parse
from trainer_ext.checkpoints.manifest import read_manifest, verify
from trainer_ext.checkpoints.weights import open_weights
from trainer_ext.data import load_splits
from trainer_ext.labels import column_labels
from trainer_ext.loss_record import check_same_loss
from trainer_ext.parity import Trajectory
from trainer_ext.parity.runs import _calibrated
from trainer_ext.rehearsal.exported import exported_earlier
from trainer_ext.rehearsal.launch import asked_by_config
from trainer_ext.rehearsal.launch import parse as parse_launch

REFUSED = (ValueError, OSError)
SLOWEST = timedelta(seconds=20)

HOSTILE = st.sampled_from(
    ["", " ", "\0", "\ufeff", "\x1b[2J", "\u202e", "\ud800", '"', ",", "\t", "\n", "\r\n", "'", "\\", "{", "[", "#", "nan",
     "NaN", "None", "-0", "1e400", "9" * 400, "Infinity", "true", "<script>", "a" * 5000, "=cmd()", "sentence", "label"]
)  # fmt: skip
WORDS = st.one_of(HOSTILE, st.text(max_size=8))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**63, -(2**63) - 1, 10**400, float("nan")]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)
DEEP = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000, b"- " * 3000])
JSON = VALUES.map(lambda value: json.dumps(value).encode())


def around(*good):
    """What is like these values: parts of them taken out, put in or changed; and anything else."""
    keys = st.sampled_from([key for value in good for key in (value if isinstance(value, dict) else {})] or [""])
    changed = st.builds(
        lambda value, key, other: {**value, key: other} if isinstance(value, dict) else [value, other],
        st.sampled_from(good),
        keys,
        VALUES,
    )
    return st.one_of(changed.map(lambda value: json.dumps(value).encode()), JSON, DEEP, st.binary(max_size=60))


@st.composite
def mutated(draw, *good):
    """Good bytes with some of them changed, cut or doubled."""
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["set", "cut", "put", "double"]))
        if what == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        elif what == "put":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            data[at:at] = data[at : at + 20]
    return bytes(data)


def tables(delimiter):
    """Tables of cells that quote, encode and break where they should not."""
    line = st.lists(WORDS, max_size=4).map(delimiter.join)
    text = st.builds(
        lambda head, lines, end: end.join([head, *lines]),
        st.sampled_from([delimiter.join(["sentence", "label"]), delimiter.join(["text", "text", "label"]), "\0", ""]),
        st.lists(line, max_size=5),
        st.sampled_from(["\n", "\r\n", "\r"]),
    )
    encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"])
    encoded = st.builds(
        lambda text, how: text.encode(how, "surrogatepass" if "utf" in how else "replace"), text, encodings
    )
    return st.one_of(encoded, st.binary(max_size=80))


ROW = st.fixed_dictionaries({"sentence": VALUES, "label": VALUES})
LABELS = st.fixed_dictionaries({"sentence": WORDS, "label": st.one_of(NUMBERS, WORDS, st.none())})
LINES = st.one_of(st.lists(ROW, max_size=4), st.lists(LABELS, min_size=1, max_size=4)).map(
    lambda rows: jsonl(*rows).encode()
)
PICKLES = [
    pickle.dumps(value, protocol)
    for protocol in (0, 2, 4, 5)
    for value in (OrderedDict(a=[1, 2.5, None, "x"], b=(b"y", {1, 2})), {"state": {0: {"step": 3}}, "big": 2**70})
] + [pickle.dumps(torch.Size([2, 3])), pickle.dumps(timedelta(1))]
PARQUET = [parquet(sentence=["a", "b", "c"], label=[0, 1, 0]), parquet(text=pa.array(["a"]), label=pa.array([1.5]))]
STEP = {
    "kind": "step",
    "step": 1,
    "rows": "",
    "labels": "",
    "sizes": [1],
    "rng": None,
    "denominator": 1.0,
    "loss": 1.0,
}
STEP |= {"grad_norm": None, "group_norms": None, "learning_rates": [1.0]}
HEADER = json.dumps({"schema": 3, "path": "x"}).encode() + b"\n"


def yaml_launch(path):
    """`accelerate launch` with a config."""
    parse_launch(["accelerate", "launch", "--config_file", str(path), "script.py"])


def splits(path):
    """A data set that is read is one that can be trained on."""
    read = load_splits(str(path))
    for split in read.splits.values():
        labels = column_labels(split, read.label_column)
        assert 0 <= labels.min() <= labels.max() < len(read.label_names)


def manifest(path):
    """What `verify` says, it says without an error."""
    assert verify(path.parent)
    read_manifest(path.parent)


MANIFEST = {"version": 1, "sha256": "0" * 64, "files": {"a": {"size": 1, "sha256": "0" * 64}, "../a": {"size": 1}}}
READERS = {
    "a DeepSpeed config": ("c.json", around({"zero_optimization": {"stage": 2}}, {}), lambda p: asked_by_config(str(p))),
    "an accelerate config": (
        "c.yaml", around({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, {"num_processes": 2}),
        yaml_launch,
    ),
    "a calibration": ("c.json", around({"multiple": 10, "tolerance": {"relative": 0.1, "weights": 0.1}}), _calibrated),
    "a record": ("trajectory.jsonl", around(STEP).map(lambda line: HEADER + line), lambda p: Trajectory.load(p.parent)),
    "a manifest": ("manifest.json", around(MANIFEST), manifest),
    "a loss": ("loss.json", around({"loss": "model"}), lambda p: check_same_loss(str(p.parent), None)),
    "a rehearsal's verdict": (
        "rehearsal.json", around({"exported": {"files": {"a": "0"}}}), lambda p: exported_earlier(p.parent),
    ),
    "an index of weights": (
        "model.safetensors.index.json", around({"weight_map": {"a": "../b"}}), lambda p: open_weights(p.parent),
    ),
    "weights": ("model.safetensors", mutated(b"\x08\0\0\0\0\0\0\0{}      "), lambda p: open_weights(p.parent)),
    "a pickle": ("a.pkl", st.one_of(mutated(*PICKLES), st.binary(max_size=80)), lambda p: parse(p.read_bytes())),
    "CSV": ("train.csv", tables(","), splits),
    "TSV": ("train.tsv", tables("\t"), splits),
    "JSON lines": ("train.jsonl", st.one_of(LINES, DEEP, mutated(jsonl({"sentence": "a", "label": 1}).encode())), splits),
    "JSON": ("train.json", st.one_of(JSON, DEEP), splits),
    "parquet": ("train.parquet", mutated(*PARQUET), splits),
}  # fmt: skip


def fuzz(name, folder, examples):
    """Give a reader so many files; what it made of them, by the kind of error, or `read`."""
    file, contents, read = READERS[name]
    seen = {}

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=SLOWEST,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def check(content):
        path = folder / file
        path.write_bytes(content)
        try:
            read(path)
            found = "read"
        except REFUSED as error:
            found = "refused" if str(error).strip() else "refused without a word"
        seen[found] = seen.get(found, 0) + 1

    check()
    return seen
