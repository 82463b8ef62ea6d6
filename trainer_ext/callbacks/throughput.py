"""How fast a training runs and where its time goes, with each log.

A hook before the model's forward sees the batches; the Trainer's events tell the phases. Nothing waits for the device or
for another rank until the Trainer logs: then every rank's numbers are gathered once, and sums over all ranks are put
into the log.
"""

import resource
import sys
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.callbacks.flops import FlopCounter, measured_peak
from trainer_ext.callbacks.log_entry import add_to_log

PHASES = ("data", "forward_backward", "optimizer", "evaluation", "saving", "other")
OUTSIDE = ("evaluation", "saving")  # of what rates are per second of

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class Counts:
    """What one rank did since a moment. `real` may be on the device, so that adding to it waits for nothing."""

    samples: int = 0
    padded: int = 0
    real: Tensor | int = 0
    flops: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def add(self, other: "Counts") -> None:
        self.samples += other.samples
        self.padded += other.padded
        self.real = int(self.real) + int(other.real)
        self.flops += other.flops
        self.seconds = {phase: self.seconds[phase] + other.seconds[phase] for phase in PHASES}


class Throughput(TrainerCallback):
    """Adds to each log of the training loss what was done since the one before, and to the last log that of the whole run.

    - `samples_per_second`, `padded_tokens_per_second`, `tokens_per_second`: sums over all ranks per second of training,
      which is all time but that of evaluating and saving. Padded tokens are the elements of `input_ids` (or rows times
      places of `inputs_embeds`), tokens those of them where a mask of that shape is not 0. Without either there are none.
    - `padding_share`: the share of the padded tokens that are padding, from 0 to 1.
    - `flops_per_second`, `flops_utilization`: floating-point operations of forward and backward over all ranks per
      second of training, and their share of what the devices can do. Operations are counted on the first real
      micro-batch of each shape (`flops.FlopCounter`), those of gradient checkpointing's second forward too. What a
      device can do is measured once on each rank, when training begins: the best of a few square matrix products in
      the training's dtype. It is a measured peak, not the one of the data sheet. Left out of a compiled model, whose
      backward pass cannot be counted.
    - `seconds_data`, `seconds_forward_backward`, `seconds_optimizer`, `seconds_evaluation`, `seconds_saving`,
      `seconds_other`: the mean over ranks of each phase. They are the host's: a GPU works on behind it, so that only
      their sum is exact there.
    - `peak_memory_bytes_rank_0` and so on: `torch.cuda.max_memory_allocated`, without CUDA the process's largest resident
      set so far.

    A micro-batch is what the first forward with gradients in it gets. Rows that a loader repeats to even out the ranks
    are counted, for they are computed. Ranks that share a batch (tensor, context or sequence parallel) each count it.
    """

    def __init__(self) -> None:
        self._hook: Any = None
        self._counter: FlopCounter | None = None
        self._peak = 0.0  # 0: operations are not counted
        self._begin()

    def _begin(self) -> None:
        self._window, self._total = Counts(), Counts()  # since the last log, and up to it
        self._flops_of: dict[Shapes, int] = {}
        self._counted: Shapes = ()
        self._in_step = self._seen = False
        self._last = perf_counter()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        self._end()
        self._begin()
        compiled = args.torch_compile or any(module._compiled_call_impl for module in model.modules())
        self._peak = 0.0 if compiled else measured_peak(_dtype(args, model), args.device)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        hook = torch.compiler.disable(self._see) if compiled else self._see
        self._hook = model.register_forward_pre_hook(hook, with_kwargs=True)
        self._last = perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._lap("data")
        self._in_step = True

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._end_micro_batch()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._end_micro_batch()
        self._in_step = False
        self._lap("forward_backward")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._lap("optimizer")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._lap("evaluation")

    def on_save(self, *_: Any, **__: Any) -> None:
        self._lap("saving")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        at_the_end = "train_runtime" in logs
        if self._hook is None or not ("loss" in logs or at_the_end):
            return
        self._lap("other")
        self._total.add(self._window)
        add_to_log(state, logs, self._values(self._total if at_the_end else self._window))
        self._window = Counts()
        self._lap("other")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end()

    def _end(self) -> None:
        """Take the hook away; and the counter, where a step ended with an error."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def _lap(self, phase: str) -> None:
        now = perf_counter()
        self._window.seconds[phase] += now - self._last
        self._last = now

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._in_step or self._seen or not torch.is_grad_enabled():
            return
        self._seen = True
        named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        self._count_rows(tensors)
        if not self._peak:
            return
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if shapes in self._flops_of:
            self._window.flops += self._flops_of[shapes]
        else:
            self._counted, self._counter = shapes, FlopCounter()
            self._counter.__enter__()

    def _count_rows(self, tensors: dict[str, Tensor]) -> None:
        ids = tensors.get("input_ids", tensors.get("inputs_embeds"))
        rows = next((tensor for tensor in (ids, *tensors.values()) if tensor is not None and tensor.ndim), None)
        self._window.samples += 0 if rows is None else len(rows)
        if ids is None or ids.ndim < 2:
            return
        places, mask = ids.shape[:2], tensors.get("attention_mask")
        self._window.padded += places.numel()
        masked = mask is not None and mask.shape == places
        self._window.real += mask.count_nonzero() if masked and mask is not None else places.numel()

    def _end_micro_batch(self) -> None:
        self._seen = False
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops_of[self._counted] = self._counter.flops
            self._window.flops += self._counter.flops
            self._counter = None

    def _values(self, counts: Counts) -> dict[str, float]:
        """What is logged of `counts` of all ranks: a collective."""
        own = (counts.samples, counts.padded, int(counts.real), counts.flops, self._peak)
        own_seconds = [counts.seconds[phase] for phase in PHASES]
        ranks = of_all_ranks((own, own_seconds, _peak_memory()))
        samples, padded, real, flops, peak = (
            sum(numbers) for numbers in zip(*(rank[0] for rank in ranks), strict=True)
        )
        training = [sum(rank[1]) - sum(rank[1][PHASES.index(phase)] for phase in OUTSIDE) for rank in ranks]
        elapsed = max(training)
        if not samples or not elapsed > 0:
            return {}
        values = {"samples_per_second": samples / elapsed}
        if padded:
            values["padded_tokens_per_second"] = padded / elapsed
            values["tokens_per_second"] = real / elapsed
            values["padding_share"] = 1 - real / padded
        if peak:
            values["flops_per_second"] = flops / elapsed
            values["flops_utilization"] = flops / elapsed / peak
        for phase, seconds in zip(PHASES, zip(*(rank[1] for rank in ranks), strict=True), strict=True):
            values[f"seconds_{phase}"] = sum(seconds) / len(ranks)
        return values | {f"peak_memory_bytes_rank_{i}": rank[2] for i, rank in enumerate(ranks)}


def _dtype(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    """What matrices are multiplied in."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _peak_memory() -> int:
    """This process's, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
