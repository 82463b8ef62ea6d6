"""What a checkpoint's pickles may hold: nothing of a crafted one runs, wherever it stands, and the error names it."""

import copyreg
import io
import os
import pickle
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import TrainingArguments

from tests.conftest import rows, tiny_model
from trainer_ext.checkpoints.allowed import DEEPSPEED
from trainer_ext.checkpoints.trusted import UntrustedPickleError, check_pickles, load, require_trusted

COMMAND = f"{os.system.__module__}.system"


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


@pytest.fixture
def made(tmp_path):
    """The file that a crafted pickle makes."""
    return tmp_path / "made"


def test_the_crafted_pickle_works(made, tmp_path):
    """Else the tests below would show nothing."""
    torch.save({"module": Command(made)}, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert made.exists()


def save_sharded(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of the stock layout, and what other engines put beside it."""
    from transformers import Trainer, default_data_collator

    out = tmp_path_factory.mktemp("plain")
    args = TrainingArguments(
        str(out), use_cpu=True, report_to="none", max_steps=2, save_steps=1, disable_tqdm=True, log_level="error",
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(tiny_model(), args, default_data_collator, rows()).train()
    folder = out / "checkpoint-1"
    torch.save(torch.load(folder / "optimizer.pt", weights_only=True), folder / "optimizer.bin")
    state = {"weight": torch.ones(3)}
    for name in ("pytorch_model.bin", "pytorch_model_fsdp.bin", "scaler.pt", "rng_state_1.pth"):
        torch.save(state, folder / name)
    (folder / "global_step1").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(state, folder / "global_step1" / name)
    (folder / "latest").write_text("global_step1")
    save_sharded({"weight": torch.ones(3), "step": 3, "name": "a"}, folder / "optimizer_0")
    return folder


@pytest.fixture
def checkpoint(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "checkpoint-1"))


def test_a_real_checkpoint_is_trusted(checkpoint):
    assert check_pickles(checkpoint) == []
    require_trusted(checkpoint)
    assert load(checkpoint / "optimizer.pt").keys() == {"state", "param_groups"}
    assert load(checkpoint / "scheduler.pt")["last_epoch"] == 1
    assert set(load(checkpoint / "rng_state.pth")) >= {"python", "numpy", "cpu"}


SLOTS = [
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_1.pth",
    "training_args.bin",
    "pytorch_model.bin",
    "pytorch_model_fsdp.bin",
    "global_step1/mp_rank_00_model_states.pt",
    "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "optimizer_0/.metadata",
    "optimizer_0/__0_0.distcp",
]


def craft(path, made):
    """Put a command into a file, in the way in which its loader would come to it."""
    if path.name == ".metadata":
        index = pickle.loads(path.read_bytes())
        index.planner_data = Command(made)
        path.write_bytes(pickle.dumps(index))
    elif path.suffix == ".distcp":
        shutil.rmtree(path.parent)
        save_sharded({"weight": torch.ones(3), "step": Command(made)}, path.parent)
    else:
        torch.save({"weight": torch.ones(3), "more": Command(made)}, path)


def test_every_pickle_of_the_checkpoint_is_a_slot(checkpoint):
    found = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    texts = {"config.json", "latest", "model.safetensors", "trainer_state.json"}
    assert found == {*SLOTS, *texts}


@pytest.mark.parametrize("slot", SLOTS)
def test_a_command_in_any_slot_is_named_and_not_run(checkpoint, made, slot):
    craft(checkpoint / slot, made)
    (finding,) = check_pickles(checkpoint)
    assert (finding.file, finding.name) == (checkpoint / slot, COMMAND)
    with pytest.raises(UntrustedPickleError, match=f"{slot} names {COMMAND}"):
        require_trusted(checkpoint)
    assert not made.exists()


@pytest.mark.parametrize("slot", SLOTS)
def test_rot_is_no_pickle(checkpoint, slot):
    data = (checkpoint / slot).read_bytes()
    (checkpoint / slot).write_bytes(data[: len(data) // 4])
    with pytest.raises(UntrustedPickleError, match=slot):
        require_trusted(checkpoint)


@pytest.mark.parametrize("slot", [slot for slot in SLOTS if not slot.startswith("optimizer_0")])
def test_a_bare_pickle_is_refused(checkpoint, made, slot):
    """As torch.save wrote them before 1.6, and as any pickle is."""
    torch.save(Command(made), checkpoint / slot, _use_new_zipfile_serialization=False)
    with pytest.raises(UntrustedPickleError, match="is not what torch.save writes"):
        require_trusted(checkpoint)
    (checkpoint / slot).write_bytes(pickle.dumps(Command(made)))
    with pytest.raises(UntrustedPickleError, match="is not what torch.save writes"):
        require_trusted(checkpoint)
    assert not made.exists()


def test_hidden_behind_a_link(checkpoint, made, tmp_path):
    craft(tmp_path / "elsewhere.pt", made)
    (tmp_path / "far").mkdir()
    craft(tmp_path / "far" / "mp_rank_00_model_states.pt", made)
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer.pt").symlink_to(tmp_path / "elsewhere.pt")
    (checkpoint / "global_step7").symlink_to(tmp_path / "far")
    found = {finding.file.name for finding in check_pickles(checkpoint)}
    assert found == {"optimizer.pt", "mp_rank_00_model_states.pt"}
    assert not made.exists()


def zipped(path, data):
    """An archive of torch.save with this pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch MADE'\ntR.",  # protocol 0
        b"(S'touch MADE'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MADE'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\nMADE\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x00\x93h\x01h\x00\x93.",  # its words out of the memo
        b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00acposix\nsystem\nsb.",  # as a state, not called
    ],
)
def test_every_way_to_name_a_global(tmp_path, made, data):
    zipped(tmp_path / "optimizer.pt", data.replace(b"touch MADE", f"touch {made}".encode()))
    with pytest.raises(UntrustedPickleError, match="optimizer.pt (names (os|posix|system|__builtin__)|has a pickle)"):
        require_trusted(tmp_path)
    assert not made.exists()


def test_a_class_of_the_list_cannot_be_changed(tmp_path):
    """Unpickling sets attributes also of classes; a later call of theirs would run what was set."""
    state = b"(N}X\x0c\x00\x00\x00__setstate__ctorch\nSize\nst"
    zipped(tmp_path / "optimizer.pt", b"\x80\x02ccollections\nOrderedDict\n" + state + b"b.")
    with pytest.raises(UntrustedPickleError, match="optimizer.pt has a pickle that cannot be read"):
        require_trusted(tmp_path)


def test_no_item_of_a_tensor_is_set(tmp_path):
    """Some versions of torch write such an item wherever the key says."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "optimizer.pt")
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as archive:
        (data,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    assert data.endswith(b"s.")
    zipped(tmp_path / "optimizer.pt", data.removesuffix(b"s.") + b"K\x00K\x01s" + b"s.")
    with pytest.raises(UntrustedPickleError, match="sets an item of a torch._utils._rebuild_tensor_v2"):
        require_trusted(tmp_path)


def test_a_script_in_an_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "scaler.pt")
    with pytest.raises(UntrustedPickleError, match="scaler.pt is a TorchScript archive"):
        require_trusted(tmp_path)


@pytest.mark.parametrize("tag", ["../other", "/tmp/other", "..", "", "a/b"])
def test_deepspeed_is_not_sent_elsewhere(checkpoint, tag):
    (checkpoint / "latest").write_text(tag)
    with pytest.raises(UntrustedPickleError, match="latest names .*, which is no folder beside it"):
        require_trusted(checkpoint)


def test_an_index_does_not_point_elsewhere(checkpoint):
    index = pickle.loads((checkpoint / "optimizer_0" / ".metadata").read_bytes())
    info = next(iter(index.storage_data.values()))
    info.relative_path = "../../other/__0_0.distcp"
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        UntrustedPickleError, match=r"points to '../../other/__0_0.distcp', which is no file beside it"
    ):
        require_trusted(checkpoint)


def test_deepspeed_names_are_for_deepspeeds_files(checkpoint):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    state = {"loss_scaler": LossScaler(2.0)}
    torch.save(state, checkpoint / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    require_trusted(checkpoint)
    torch.save(state, checkpoint / "optimizer.pt")
    (finding,) = check_pickles(checkpoint)
    assert finding.name in DEEPSPEED


def test_the_arguments_of_the_run_itself_are_known(checkpoint, trainer):
    """A class of the user's own in training_args.bin, which nothing loads."""
    own = type("OwnArguments", (TrainingArguments,), {"__module__": "own.script"})
    copyreg.pickle(own, lambda args: (TrainingArguments, ()))
    name = b"\x80\x02cown.script\nOwnArguments\n)\x81."
    zipped(checkpoint / "training_args.bin", name)
    assert [finding.name for finding in check_pickles(checkpoint)] == ["own.script.OwnArguments"]
    assert check_pickles(checkpoint, arguments={"own.script.OwnArguments"}) == []


def test_numbers_of_the_random_state_come_back(tmp_path):
    state = {"numpy": np.random.RandomState(3).get_state(), "python": (3, (1, 2), None), "cpu": torch.get_rng_state()}
    torch.save(state, tmp_path / "rng_state.pth")
    found = load(tmp_path / "rng_state.pth")
    assert np.array_equal(found["numpy"][1], state["numpy"][1])
    assert torch.equal(found["cpu"], state["cpu"])


@pytest.mark.parametrize("slot", ["optimizer.pt", "global_step1/mp_rank_00_model_states.pt", "training_args.bin"])
def test_the_trainer_loads_nothing_of_it(checkpoint, trainer, made, slot):
    run = trainer(max_steps=2)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    craft(checkpoint / slot, made)
    with pytest.raises(UntrustedPickleError, match=f"{slot} names {COMMAND}"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert not made.exists()
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_the_last_checkpoint_is_checked_too(checkpoint, trainer, made):
    run = trainer(max_steps=2, output_dir=str(checkpoint.parent))
    craft(checkpoint / "scheduler.pt", made)
    with pytest.raises(UntrustedPickleError, match=f"scheduler.pt names {COMMAND}"):
        run.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_checked_too(checkpoint, trainer, made):
    """A trainer_state.json may name any folder."""
    run = trainer(max_steps=2)
    run.state.best_model_checkpoint = str(checkpoint)
    craft(checkpoint / "pytorch_model.bin", made)
    with pytest.raises(UntrustedPickleError, match=f"pytorch_model.bin names {COMMAND}"):
        run._load_best_model()


def test_a_checkpoint_of_its_own_is_resumed(trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "output_dir": str(tmp_path)}
    whole = trainer(**options)
    whole.train()
    resumed = trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())


def test_the_reader_is_torchs_own(tmp_path, made):
    """An archive with two data.pkl, of which zip readers may take either: what is checked is what torch loads."""
    path = tmp_path / "optimizer.pt"
    torch.save({"a": 1}, path)
    buffer = io.BytesIO()
    torch.save(Command(made), buffer)
    with zipfile.ZipFile(buffer) as other, zipfile.ZipFile(path, "a") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        (data,) = [other.read(name) for name in other.namelist() if name.endswith("data.pkl")]
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, data)
    with suppress(RuntimeError, pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    ran = made.exists()
    assert bool(check_pickles(tmp_path)) >= ran
