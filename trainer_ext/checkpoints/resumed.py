"""A trainer's check of the checkpoint that it is about to load: the same answer on all ranks."""

from pathlib import Path

from transformers import TrainingArguments

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.checkpoints.trusted import UntrustedPickleError, require_trusted


def require_trusted_on_all_ranks(folder: Path, args: TrainingArguments) -> None:
    """Raise on every rank where a rank finds a pickle in a checkpoint that does more than hold state.

    Each rank reads the folder itself, since hosts may have different ones: a collective, to be called by all.

    Raises:
        UntrustedPickleError: With what the first of these ranks found.
    """
    try:
        require_trusted(folder, arguments=argument_types(args))
        problem = None
    except UntrustedPickleError as error:
        problem = str(error)
    if problem := next((found for found in of_all_ranks(problem) if found is not None), None):
        raise UntrustedPickleError(problem)


def argument_types(args: TrainingArguments) -> set[str]:
    """The types that these arguments consist of, which a training_args.bin of the same class names."""
    return {f"{one.__module__}.{one.__qualname__}" for one in map(type, [args, *vars(args).values()])}
