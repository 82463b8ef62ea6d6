"""How a model computes attention: as it was told, or what is fastest in training on this machine.

PyTorch's fused attention has no kernel for dropout on a CPU: `scaled_dot_product_attention` then takes its arithmetic apart
with more passes over the scores than the model's own "eager" code.
"""

from typing import Any

from torch import nn

AUTO = "auto"
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


def set_attention(model: nn.Module, implementation: str, *, on_cpu: bool) -> None:
    """Have `model` compute attention by `implementation`, a name of transformers or `auto`.

    `auto` is eager attention for a model with dropout in its attention that trains on a CPU, and else what the model has.

    Raises:
        ValueError: The model has no such implementation, or is none of transformers.
    """
    chooses: Any = getattr(model, "set_attn_implementation", None)
    if implementation == AUTO:
        if not (on_cpu and chooses is not None and _drops_attention(model)):
            return
        implementation = "eager"
    if chooses is None:
        raise ValueError(
            f"attn_implementation={implementation!r}: {type(model).__name__} is no model of transformers, which has a "
            "choice. Leave it out."
        )
    try:
        chooses(implementation)
    except (ValueError, ImportError) as error:
        raise ValueError(f"attn_implementation={implementation!r}: {error}") from error


def _drops_attention(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return any(getattr(config, name, None) for name in DROPOUTS)
