"""Token ids that are made once: a later run, or another rank, that asks for the same ones reads them from the disk.

A split and the function that encodes it go in, the encoded split comes out. `datasets` keeps what it maps too, but
finds it again by pickling the tokenizer, which takes longer than to tokenise some thousand rows, and it knows a file by
its time stamp alone. Here the name is a digest of everything that the ids depend on, so that nothing stale is found: the
rows themselves, the tokenizer's definition, the length at which texts are cut, and the versions.
"""

import json
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

FOLDER = "trainer_ext_tokens"  # in the cache of `datasets`
PACKAGES = ("tokenizers", "transformers", "datasets")


def tokenize_once(
    split: Dataset, encode: Callable[..., Any], columns: list[str], definition: str, *, drop: list[str]
) -> Dataset:
    """`split.map(encode)`, read from the cache where it was made before; ranks that come together wait for the first.

    Args:
        split: The rows.
        encode: From a batch of rows to columns of token ids.
        columns: What the result depends on, in order: the texts and the label.
        definition: What `encode` does, as `definition_of` says it.
        drop: The columns that the result does not have.
    """
    rows = split.select_columns(columns)
    name = _digest(rows, json.dumps([definition, columns, drop, str(rows.features)]))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.arrow"
    with FileLock(f"{file}.lock"):
        return split.map(
            encode,
            batched=True,
            remove_columns=drop,
            new_fingerprint=name,
            cache_file_name=str(file),
            desc="Tokenising",
        )


def definition_of(tokenizer: Any, max_length: int | None) -> str | None:
    """All that the ids of a text depend on; None where it cannot be told: code that is not of transformers, or slow."""
    if not (tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")):
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # of the last call
    settings = [tokenizer.model_input_names, tokenizer.truncation_side, tokenizer.split_special_tokens, max_length]
    return json.dumps([backend, type(tokenizer).__qualname__, settings, [version(name) for name in PACKAGES]])


def digest_file(file: Path) -> str:
    """Of a file's content, as a name."""
    with file.open("rb") as content:
        digest = blake2b(digest_size=16)
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _digest(rows: Dataset, definition: str) -> str:
    digest = blake2b(definition.encode(), digest_size=16)
    for part in rows.with_format("arrow").iter(10_000):
        content = pa.BufferOutputStream()
        table = part.combine_chunks().replace_schema_metadata(None)  # that has the path in it, as a fingerprint
        with pa.ipc.new_stream(content, table.schema) as stream:
            stream.write_table(table)
        digest.update(content.getvalue())
    return digest.hexdigest()
