"""From a model's name to a classifier and its tokenizer: hub name, local path, or the tiny BERT of the sample.

The tiny BERT is a checkpoint folder like any other, made once: its tokenizer knows the sample's words,
its weights are random. Everything after that is `from_pretrained`.
"""

import hashlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trainer_ext import sample
from trainer_ext.data import SAMPLE
from trainer_ext.hub import require_hub

TINY = "tiny"
HUB_DEFAULT = "bert-base-uncased"
TINY_BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "initializer_range": 0.16,  # at BERT's own 0.02 so small a model stays with the majority class
}
TINY_TRAINING = {  # what random weights need, as defaults of the command line
    "learning_rate": 2e-3,
    "num_train_epochs": 6.0,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
}


def default_model(dataset: str) -> str:
    """The model where none was named: the tiny BERT for the sample, BERT base for everything else."""
    return TINY if dataset == SAMPLE else HUB_DEFAULT


def checkpoint_folder(model: str) -> str:
    """What `from_pretrained` is given for `model`.

    Raises:
        ValueError: A path that is no checkpoint folder.
        ConnectionError: A hub name, and the hub does not answer.
    """
    if model == TINY:
        return str(tiny_checkpoint())
    if not model.strip():
        raise ValueError(f"model {model!r}: the name is empty.")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {model!r}: the folder has no config.json, so it is no checkpoint.")
        return str(path)
    if path.exists() or path.is_absolute() or model.startswith("."):
        raise ValueError(f"model {model!r}: there is no such checkpoint folder.")
    require_hub(f"model {model!r}")
    return model


def load_tokenizer(model: str) -> Any:
    """The tokenizer of `model`; where it has no padding token, the end of a text is one.

    Raises:
        ValueError: `model` has no tokenizer, or one that cannot pad.
    """
    tokenizer = _loaded(AutoTokenizer, model)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where no file is
        raise ValueError(f"model {model!r} has no vocabulary: save its tokenizer into the same folder.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model {model!r}: its tokenizer has no padding token. Set its pad_token and save it.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str,
    label_names: list[str],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    dropout: bool = True,
) -> Any:
    """A sequence classifier with these labels; a head that the checkpoint does not have is drawn from `seed`.

    Args:
        model: As `checkpoint_folder` takes it.
        label_names: The classes, in the order of their labels.
        seed: Seeds torch before loading.
        dtype: Of the weights.
        dropout: False sets every dropout probability of the configuration to 0.

    Raises:
        ValueError: `model` cannot be loaded as a classifier, or has a head for another number of labels.
    """
    torch.manual_seed(seed)
    config = _loaded(AutoConfig, model)
    own_labels = config.num_labels
    config.problem_type = "single_label_classification"
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    if not dropout:
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
    try:
        # The tiny BERT's head is as random as a new one, and takes any number of labels.
        options = {"ignore_mismatched_sizes": True} if model == TINY else {}
        return _loaded(AutoModelForSequenceClassification, model, config=config, dtype=dtype, **options)
    except ValueError as error:
        if isinstance(error.__cause__, RuntimeError) and own_labels != len(label_names):
            raise ValueError(
                f"model {model!r} has a head for {own_labels} labels, and the data has {len(label_names)}: "
                f"{', '.join(label_names[:10])}. Start from a checkpoint without a head, or mend the labels."
            ) from error
        raise


def _loaded(auto: Any, model: str, **options: Any) -> Any:
    folder = checkpoint_folder(model)
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"model {model!r}: its weights are a pickle that does more than hold tensors. Take one with model.safetensors."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {model!r} comes with code of its own, which is not run. Load it in a script of yours, and give the "
                "model to CustomTrainer."
            ) from error
        origin = "" if Path(folder).is_dir() else "is no local folder and "
        raise ValueError(f"model {model!r} {origin}cannot be loaded as {auto.__name__}: {error}") from error


def tiny_checkpoint() -> Path:
    """The tiny BERT's checkpoint folder, below the Hugging Face home; made the first time, never half.

    Its name is a digest of the code that makes it, so that another version of the recipe has another folder.
    """
    recipe = b"".join(Path(source).read_bytes() for source in (__file__, sample.__file__))
    name = f"tiny-bert-{hashlib.sha256(recipe).hexdigest()[:12]}"
    folder = Path(huggingface_hub.constants.HF_HOME) / "trainer_ext" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        _save_tiny(made)
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster: its folder holds the same bytes
            if not folder.is_dir():
                raise
    return folder


def _save_tiny(folder: Path) -> None:
    tokenizer = _sample_tokenizer()
    torch.manual_seed(2)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY_BERT)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sample_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the sample is one token; others fall into letters. No trainer: its order of ties is by chance."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = {row[column] for row in sample.sample_rows("train") for column in ("sentence1", "sentence2")}
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = sorted(set("".join(words)))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *sorted(words.difference(letters))]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
