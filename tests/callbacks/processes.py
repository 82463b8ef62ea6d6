"""Ranks in processes of their own, forked from one server that has imported everything: starting them takes a moment."""

import multiprocessing
import os
import traceback

from trainer_ext.rehearsal import on_cpu
from trainer_ext.rehearsal.processes import free_port
from trainer_ext.shared_buffers import remove_at_exit

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deepspeed", "transformers.trainer", "trainer_ext.trainer", "tests.conftest"])

# What `accelerate launch` and `deepspeed` tell the ranks, and the DeepSpeed config.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
AUTO = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")


def zero(stage, **more):
    """A config of ZeRO in which a tiny model's matrices are large enough to be split."""
    split = {"stage": stage, "stage3_param_persistence_threshold": 100}
    return {**dict.fromkeys(AUTO, "auto"), "zero_optimization": split, **more}


def settle_on_cpu(deepspeed=None):
    """In a rank, before anything asks accelerate: have FSDP2 and DeepSpeed run on the CPU."""
    if deepspeed or "ACCELERATE_USE_FSDP" in os.environ:
        os.environ.update(on_cpu.ENVIRONMENT)
        on_cpu.install()
        remove_at_exit()


def run_ranks(target, ranks, *arguments, environment=None, timeout=120):
    """Call `target(*arguments)` on every rank of a gloo group to be; what each returned, or its error.

    Args:
        target: A function of a module.
        ranks: Processes; one of them is still told to be rank 0 of one.
        environment: Variables besides those of `torchrun`.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        variables = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {}),
        }  # fmt: skip
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(theirs, variables, target, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        found = [pipe.recv() if pipe.poll(timeout) else ("error", "no answer in time") for pipe in pipes]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    errors = "\n".join(value for kind, value in found if kind == "error")
    assert not errors, errors
    return [value for _, value in found]


def exit_code(target, *arguments, timeout=120):
    """Call `target(*arguments)` in one process, which may not come to its end; its exit code."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
    return process.exitcode


def _rank(pipe, variables, target, arguments):
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("returned", target(*arguments)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
