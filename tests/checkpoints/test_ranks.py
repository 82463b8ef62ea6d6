"""Several nodes with one storage, or with one each: threads stand for their processes, and folders for their disks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer_ext.checkpoints import write
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.checkpoints.ranks import Ranks
from trainer_ext.checkpoints.resume import Choice, named, newest_good
from trainer_ext.checkpoints.write import CheckpointNotSavedError, Save

OWN = threading.local()


def on_ranks(call, disks, of_node=2):
    """What `call(rank, disk, ranks)` returned or raised for each of `of_node` processes of each node."""
    count = len(disks) * of_node
    held, barrier = [None] * count, threading.Barrier(count, timeout=20)

    def run(rank):
        def gather(value):
            barrier.wait()
            held[rank] = value
            barrier.wait()
            return list(held)

        OWN.rank = rank
        try:
            return call(rank, disks[rank // of_node], Ranks(rank == 0, rank % of_node == 0, gather))
        except (CheckpointNotSavedError, ValueError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def save(rank, disk, ranks, step=1):
    made = Save(str(disk), f"checkpoint-{step}", ranks)
    made.begin()
    (made.folder / f"rank{rank}").write_text(f"{rank} at {step}")
    made.commit()
    (made.place / f"added{rank}").write_text("by a callback")
    made.seal()


@pytest.fixture(params=["shared", "own"])
def disks(request, tmp_path):
    found = [tmp_path / ("disk" if request.param == "shared" else f"disk{node}") for node in (0, 1)]
    for disk in found:
        disk.mkdir(exist_ok=True)
        (disk / write.SAVING / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (disk / write.SAVING / "checkpoint-1" / "of a killed save").write_text("half")
    return found


def test_every_storage_gets_a_whole_checkpoint(disks):
    assert on_ranks(save, disks) == [None] * 4
    shared = disks[0] == disks[1]
    for node, disk in enumerate(disks):
        assert [path.name for path in disk.iterdir()] == ["checkpoint-1"]
        assert not verify(disk / "checkpoint-1")
        ranks = range(4) if shared else range(2 * node, 2 * node + 2)
        expected = {"manifest.json", *(f"{name}{rank}" for rank in ranks for name in ("rank", "added"))}
        assert {path.name for path in (disk / "checkpoint-1").iterdir()} == expected


def test_what_one_node_sees_decides_for_all(disks):
    for step in (1, 2):
        on_ranks(lambda *of: save(*of, step=step), disks)  # noqa: B023
    (disks[1] / "checkpoint-2" / "rank3").write_text("3 at 3")
    choices = on_ranks(lambda rank, disk, ranks: newest_good(disk, ranks), disks)
    why = ["rank3 is not as it was saved: its SHA-256 differs"]
    for rank, choice in enumerate(choices):
        disk = disks[rank // 2]
        assert choice == Choice(disk / "checkpoint-1", {disk / "checkpoint-2": why})
    refused = on_ranks(lambda rank, disk, ranks: named(disk / "checkpoint-2", ranks), disks)
    assert all("rank3 is not as it was saved" in str(error) for error in refused)


def test_one_node_that_cannot_write_is_heard_of_by_all(disks, monkeypatch):
    sync = write.sync_tree

    def refuses(folder):
        if OWN.rank == 2:
            raise OSError(28, "No space left on device")
        sync(folder)

    monkeypatch.setattr(write, "sync_tree", refuses)
    found = on_ranks(save, disks)
    assert all("checkpoint-1 was not saved: [Errno 28] No space left on device" in str(error) for error in found)
    assert [path.name for disk in disks for path in disk.iterdir()] == []


def test_a_save_whose_ranks_do_not_wait_is_caught(disks, monkeypatch):
    """The mutation: without waiting, what a slow rank writes is not in the manifest."""
    monkeypatch.setattr(Ranks, "on_every_node", lambda self, action: action() if self.first_of_node else [])
    monkeypatch.setattr(Ranks, "once_for_each_storage", lambda self, action: action() if self.first else [])
    slow = threading.Event()

    def late(rank, disk, ranks):
        alone = Ranks(ranks.first, ranks.first_of_node, lambda value: [value])
        made = Save(str(disk), "checkpoint-1", alone)
        if rank == 0:
            made.begin()
            made.commit()
            slow.set()
        elif rank == 1:
            slow.wait(20)
            (made.place / "rank1").write_text("late")

    on_ranks(late, disks)
    assert [str(finding) for finding in verify(disks[0] / "checkpoint-1")] == [
        "rank1 is not in the manifest: it was added later"
    ]
