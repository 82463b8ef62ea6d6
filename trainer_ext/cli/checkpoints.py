"""`trainer-ext verify` and `export`: what is in a checkpoint, and out of it."""

from pathlib import Path
from typing import Annotated

import typer

from trainer_ext.cli.mistakes import users_mistakes


def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or the output folder of a run.")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Take this one checkpoint as it is now: write its manifest anew.")
    ] = False,
) -> None:
    """Hold checkpoints against what was saved: every file that is missing, added or changed is named."""
    with users_mistakes():
        from trainer_ext.checkpoints import resume
        from trainer_ext.checkpoints.manifest import write_manifest
        from trainer_ext.plain_text import printable

        found = resume.verdicts(folder)
        if accept:
            if list(found) != [folder]:
                raise ValueError(f"--accept is for one checkpoint, and {folder} has {len(found)}: name it.")
            write_manifest(folder)
    for path, wrong in found.items():
        typer.echo(
            f"{printable(str(path))}: {'as it was saved' if not wrong else 'accepted as it is' if accept else 'wrong'}"
        )
        for finding in wrong:
            typer.echo(f"  {finding}")
    if any(found.values()) and not accept:
        raise typer.Exit(1)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder checkpoint-N, of any engine.")],
    out: Annotated[Path, typer.Argument(help="The folder to write: new, empty, or an earlier export.")],
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", "--max_shard_size", help="Of a file, such as 200MB; bounds the memory.")
    ] = "5GB",
    averages: Annotated[
        bool, typer.Option("--averages", help="The averages of EMACallback in the place of the weights.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A folder with config.json and tokenizer, where the checkpoint has none."),
    ] = None,
) -> None:
    """Turn a checkpoint (plain, DDP, ZeRO, FSDP) into a folder for from_pretrained, and verify it by loading."""
    with users_mistakes():
        from trainer_ext.checkpoints.export import export as run_export

        found = run_export(checkpoint, out, max_shard_size=max_shard_size, averages=averages, described_by=model)
    typer.echo(f"{found.tensors} tensors ({found.source}), equal after loading: {found.folder}")
