"""`LeanStepMixin`: what the stock step finds out anew each time, found out once.

On a small model these are a third of what `Trainer` adds to a plain loop (`benchmarks/overhead.py`), and their answers
do not change from step to step: how many parameters the model has (for `total_flos`), whether every module is in training
mode, and whether accelerate's optimizer wrapper finds the package `lomo_optim` on the disk. The numbers of a training are
the stock ones.
"""

import functools
from typing import TYPE_CHECKING, Any

import accelerate.optimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

PLAIN = (nn.Module.train, PreTrainedModel.train, DistributedDataParallel.train)  # these set the mode, and no more


class LeanStepMixin(_TrainerBase):
    """Put before a `Trainer` class among the bases, it makes that class's step shorter."""

    _counted: tuple[Any, int] = (None, 0)  # a model, and its parameters without embeddings
    _listed: tuple[Any, list[nn.Module]] = (None, [])  # a model, and its modules; none where one has a mode of its own

    def create_accelerator_and_postprocess(self) -> None:
        """The stock set-up; from then on the process remembers that `lomo_optim` is there, or is not."""
        super().create_accelerator_and_postprocess()
        if not hasattr(accelerate.optimizer.is_lomo_available, "cache_info"):
            accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The stock estimate, six for each parameter and token, with the parameters counted once."""
        model: Any = self.model
        name = getattr(model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(model, "num_parameters"):
            return 0
        if self._counted[0] is not model:
            self._counted = model, model.num_parameters(exclude_embeddings=True)
        return 6 * inputs[name].numel() * self._counted[1]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The stock step, which leaves the modules alone where all of them are in training mode already."""
        if self._listed[0] is not model:
            modules = list(model.modules())
            self._listed = model, modules if all(type(module).train in PLAIN for module in modules) else []
        modules = self._listed[1]
        if not modules or not all(module.training and "train" not in vars(module) for module in modules):
            return super().training_step(model, *args, **kwargs)
        vars(model)["train"] = lambda mode=True: model
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            del vars(model)["train"]
