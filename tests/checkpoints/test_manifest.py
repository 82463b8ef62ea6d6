"""A manifest names every change of every file, by an oracle that hashes by itself, and follows no link."""

import hashlib
import json
import os
import random
import subprocess

import pytest

from trainer_ext.checkpoints import manifest
from trainer_ext.checkpoints.manifest import Entry, has_manifest, read_manifest, verify, write_manifest

FILES = {
    "model.safetensors": bytes(range(256)) * 40,
    "config.json": b'{"a": 1}',
    "empty": b"",
    "global_step2/zero_pp_rank_0.pt": b"shard" * 100,
    "pytorch_model_fsdp_0/.metadata": b"hidden",
    "odd \n name": b"x",
}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint-2"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    write_manifest(made)
    return made


def said(folder):
    return [str(finding) for finding in verify(folder)]


def test_every_file_is_named_with_its_size_and_hash(folder):
    document = json.loads((folder / "manifest.json").read_text())
    assert document["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    sums = subprocess.run(["sha256sum", folder / "model.safetensors"], capture_output=True, text=True, check=True)
    assert sums.stdout.split()[0] == read_manifest(folder)["model.safetensors"].sha256
    assert verify(folder) == []
    assert not list(folder.glob("*.unfinished"))


FAULTS = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes, and was saved with"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, and was saved with"),
    "zeroed tail": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"), "its SHA-256 differs"),
    "bit flip": (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "SHA-256"),
    "a link": (lambda path: (path.rename(path.parent.parent.parent / "away"),
                             path.symlink_to(path.parent.parent.parent / "away")), "is no regular file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [name for name in FILES if name != "empty"])
def test_what_is_done_to_a_file_is_found(folder, name, fault):
    harm, says = FAULTS[fault]
    harm(folder / name)
    (found,) = verify(folder)
    assert found.path == name
    assert says in str(found)
    assert "\n" not in str(found)


def test_what_is_added_is_found(folder):
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "deep" / "er").mkdir(parents=True)  # empty folders are nothing
    assert said(folder) == ["optimizer.pt is not in the manifest: it was added later"]


def test_every_bit_of_the_manifest_counts(folder):
    path = folder / "manifest.json"
    text = path.read_bytes()
    for place in range(len(text)):
        bit = random.Random(place).randrange(8)
        path.write_bytes(text[:place] + bytes([text[place] ^ (1 << bit)]) + text[place + 1 :])
        assert verify(folder), (place, bit)
    for length in (0, 1, len(text) // 2, len(text) - 1):
        path.write_bytes(text[:length])
        assert said(folder)[0].startswith("manifest.json is damaged")
    path.unlink()
    assert said(folder) == ["manifest.json is missing"]
    assert not has_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "null",
        '{"files": []}',
        '{"files": {"a": 1}}',
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass"),
        manifest._render({"a": Entry("2", "x")}),
    ],
)
def test_a_manifest_of_something_else_is_a_finding(folder, text):
    (folder / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert [finding.path for finding in verify(folder)] == ["manifest.json"]


def test_a_path_in_a_manifest_leads_nowhere(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s")
    outside = {"../secret": Entry(1, hashlib.sha256(b"s").hexdigest())}
    (folder / "manifest.json").write_text(manifest._render(read_manifest(folder) | outside))
    assert said(folder) == ["../secret is missing"]


def test_a_pipe_or_a_linked_folder_is_not_read(folder, tmp_path):
    os.mkfifo(folder / "pipe")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big").write_bytes(b"x")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert [finding.path for finding in verify(folder)] == ["linked", "pipe"]
    with pytest.raises(ValueError, match="linked is no regular file"):
        write_manifest(folder)


def test_a_manifest_that_is_a_link_is_not_followed(folder, tmp_path):
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert said(folder)[0].startswith("manifest.json is damaged")
    (folder / "manifest.json.unfinished").symlink_to(tmp_path / "victim")
    write_manifest(folder)
    assert verify(folder) == []
    assert not (tmp_path / "victim").exists()


def test_what_cannot_be_read_is_a_finding(folder, monkeypatch):
    """Errors of the disk: the file's content cannot be had, though its name and size can."""
    monkeypatch.setattr(manifest.hashlib, "file_digest", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    assert said(folder)[0] == "config.json cannot be read ([Errno 5] I/O error)"


def test_a_manifest_that_forgets_hashes_is_caught(folder, monkeypatch):
    """The mutation: a check of sizes alone misses a flipped bit."""
    monkeypatch.setattr(manifest, "_read", lambda folder, paths, or_error=False: dict(read_manifest(folder)))
    with pytest.raises(ValueError, match="not enough values to unpack"):
        test_what_is_done_to_a_file_is_found(folder, "model.safetensors", "bit flip")


def test_a_folder_that_is_none(tmp_path):
    assert "is no folder" in said(tmp_path / "nothing")[0]
