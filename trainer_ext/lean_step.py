"""`LeanStepMixin`: what the stock step finds out anew each time, found out once, and one pass over the gradient for all.

On a small model these are most of what `Trainer` adds to a plain loop (`benchmarks/overhead.py`), and their answers
do not change from step to step: which modules and parameters the model has, how many (for `total_flos`), whether every
module is in training mode, whether the package `lomo_optim` is on the disk, and whether SageMaker splits the model. The
norms of the gradients that clipping needs go to `gradient_norms`, for who else wants to know of them. The numbers of a
training are the stock ones, to the bit.
"""

import functools
from contextlib import ExitStack
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import accelerate.optimizer
import torch
import transformers.trainer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

if TYPE_CHECKING:  # the mixin calls a Trainer's methods through super() and self, and is none itself
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

PLAIN = (nn.Module.train, PreTrainedModel.train, DistributedDataParallel.train)  # these set the mode, and no more
WHOLE = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)  # every rank has all of each gradient
ASKED_IN_EACH_STEP = (  # of the disk, and of the environment
    (accelerate.optimizer, "is_lomo_available"),
    (transformers.trainer, "is_sagemaker_mp_enabled"),
)
in_training_mode = attrgetter("training")


class Listed(NamedTuple):
    """What a walk through a model found.

    Attributes:
        model: The one that was walked through.
        modules: What `model.modules()` gives.
        parameters: What `model.parameters()` gives.
        plain: Whether `train` of each module does no more than torch's own.
    """

    model: Any
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    plain: bool


NOTHING = Listed(None, [], [], False)


class LeanStepMixin(_TrainerBase):
    """Put before a `Trainer` class among the bases, it makes that class's step shorter.

    Attributes:
        gradient_norms: Shape (parameters with a gradient,), float: the 2-norm of each before clipping, in the model's
            order, from when the step has been clipped; None where the engine clips, or gradients lie on several devices.
    """

    gradient_norms: Tensor | None = None
    _counted: tuple[Any, int] = (None, 0)  # a model, and its parameters without embeddings
    _listed: Listed = NOTHING

    def create_accelerator_and_postprocess(self) -> None:
        """The stock set-up; from then on the process remembers the answers to `ASKED_IN_EACH_STEP`."""
        super().create_accelerator_and_postprocess()
        for module, name in ASKED_IN_EACH_STEP:
            if not hasattr(question := getattr(module, name), "cache_info"):
                setattr(module, name, functools.cache(question))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The stock estimate, six for each parameter and token, with the parameters counted once."""
        model: Any = self.model
        name = getattr(model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(model, "num_parameters"):
            return 0
        if self._counted[0] is not model:
            self._counted = model, model.num_parameters(exclude_embeddings=True)
        return 6 * inputs[name].numel() * self._counted[1]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The stock epoch, in which the model is walked through once, and again when a module of it is given another or a
        parameter."""
        self._forget_what_is_listed()
        with ExitStack() as epoch:
            epoch.callback(self._forget_what_is_listed)
            for register in (register_module_module_registration_hook, register_module_parameter_registration_hook):
                epoch.callback(register(self._forget_what_is_listed).remove)
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The stock step, which leaves the modules alone where all of them are in training mode already."""
        listed = self._list(model)
        if not listed.plain or "train" in vars(model) or not all(map(in_training_mode, listed.modules)):
            return super().training_step(model, *args, **kwargs)
        vars(model)["train"] = lambda mode=True: model
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            del vars(model)["train"]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = self._norm_of_whole_gradients(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self._norm_of_whole_gradients(model, None)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _get_learning_rate(self) -> float:
        """The stock rate, read after the optimizer's step: what comes next clears the gradients, now without a walk."""
        model = self._listed.model
        if model is not None and self._has_whole_gradients() and type(model).zero_grad is nn.Module.zero_grad:
            vars(model).setdefault("zero_grad", functools.partial(self._zero_grad, model))
        return super()._get_learning_rate()

    def _zero_grad(self, model: nn.Module, set_to_none: bool = True) -> None:
        """Stands for `model.zero_grad` once."""
        del vars(model)["zero_grad"]
        if not set_to_none:
            model.zero_grad(set_to_none=False)
            return
        for parameter in self._list(model).parameters:
            parameter.grad = None

    def _has_whole_gradients(self) -> bool:
        return self.accelerator.distributed_type in WHOLE and self.accelerator.scaler is None

    def _norm_of_whole_gradients(self, model: nn.Module, largest: float | None) -> Tensor | None:
        """What `torch.nn.utils.clip_grad_norm_` does and returns, with the norms kept; None where it takes another way.

        Args:
            model: After its backward pass.
            largest: What the norm is clipped to; None leaves the gradient as it is.
        """
        self.gradient_norms = None
        if not self._has_whole_gradients():
            return None
        parameters = [p for p in self._list(model).parameters if p.grad is not None]
        gradients = [cast(Tensor, p.grad) for p in parameters]
        kinds = {(type(gradient), gradient.device, gradient.dtype) for gradient in gradients}
        if len(kinds) != 1 or DTensor in next(iter(kinds)) or any(gradient.is_sparse for gradient in gradients):
            return None
        self.gradient_norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(self.gradient_norms)
        if largest is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def _list(self, model: nn.Module) -> Listed:
        if self._listed.model is not model:
            modules = list(model.modules())
            plain = all(type(module).train in PLAIN and "train" not in vars(module) for module in modules)
            self._listed = Listed(model, modules, list(model.parameters()), plain)
        return self._listed

    def _forget_what_is_listed(self, *_: Any) -> None:
        self._listed = NOTHING
