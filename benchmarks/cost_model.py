"""What a step costs on 8, 64 and 1,024 GPUs: computed from formulas and assumptions, not measured.

A model's shape and a number of GPUs go in; seconds of arithmetic, bytes that a GPU sends, and bytes that it holds come out,
for each engine, beside what `trainer_ext` itself sends in a step.

    python benchmarks/cost_model.py

Writes `benchmarks/results/cost_model.json`.
"""

import json
import math
from dataclasses import dataclass

from pairs import RESULTS

PEAK, UTILISATION = 989e12, 0.40  # FLOP/s
NODE, INSIDE, BETWEEN = 8, 450e9, 50e9  # GPUs; bytes/s that a GPU can send within a node, and out of it
HOP = 10e-6  # seconds until a small message is at its neighbour
GPUS = (8, 64, 1024)
ASSUMPTIONS = (
    "H100 SXM: 989 TFLOP/s in bf16 without sparsity and 450 GB/s each way over NVLink (NVIDIA's data sheet), of which "
    "arithmetic reaches 40% (38 to 43% in training Llama 3, arXiv:2407.21783)",
    "8 GPUs a node, one 400 Gb/s InfiniBand port a GPU between nodes",
    "FLOPs: 6 a token and matrix parameter, and 12 x layers x hidden x length a token for attention (PaLM, "
    "arXiv:2204.02311, appendix B)",
    "rings, in which a GPU sends (n-1)/n of what is gathered or scattered and twice that of what is all-reduced; their "
    "slowest link sets the pace",
    "Adam with float32 states; DDP holds all in float32 (bf16 by autocast), FSDP2 too, in shards that it gathers in bf16; "
    "ZeRO trains bf16 weights with float32 masters (arXiv:1910.02054)",
    "activations without recomputing, with fused attention: 34 bytes x tokens x hidden x layers (arXiv:2205.05198); logits "
    "and buffers of the engines are left out",
    "a small all-reduce takes 2 log2(n) hops of 10 microseconds",
)


@dataclass(frozen=True)
class Shape:
    """A transformer's sizes, and one GPU's share of a step.

    Attributes:
        kind: `bert`, `gpt2` or `llama`, which differ in what a layer has.
        inner: Width of the feed-forward layer.
        rows: Of a GPU in a step, each of `length` tokens.
    """

    kind: str
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    length: int
    rows: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def matrices(self) -> int:
        """Parameters that every token is multiplied with: those of the layers and, of a language model, of its head."""
        inner = (3 if self.kind == "llama" else 2) * self.hidden * self.inner
        head = 0 if self.kind == "bert" else self.vocabulary * self.hidden
        return self.layers * (4 * self.hidden**2 + inner) + head

    @property
    def parameters(self) -> int:
        """All of them; GPT-2's head is its embedding."""
        hidden, layers = self.hidden, self.layers
        if self.kind == "llama":
            return self.matrices + self.vocabulary * hidden + (2 * layers + 1) * hidden
        biases_and_norms = layers * (9 * hidden + self.inner)
        if self.kind == "gpt2":
            return self.matrices + self.length * hidden + biases_and_norms + 2 * hidden
        pooler_and_head = hidden**2 + hidden + 2 * hidden + 2
        return self.matrices + (self.vocabulary + 512 + 2 + 2) * hidden + biases_and_norms + pooler_and_head

    @property
    def flops(self) -> float:
        """Of the forward and backward pass of one GPU's share."""
        return self.tokens * (6 * self.matrices + 12 * self.layers * self.hidden * self.length)

    @property
    def activations(self) -> int:
        return 34 * self.tokens * self.hidden * self.layers


@dataclass(frozen=True)
class Engine:
    """Bytes a parameter.

    Attributes:
        whole: Held on every GPU.
        sharded: Held once over all GPUs.
        all_reduced: Sent by an all-reduce in each step.
        scattered: Gathered or reduce-scattered in each step.
        collectives: Small all-reduces of `trainer_ext` on the way of a step, besides `SIGNAL`'s.
    """

    whole: int
    sharded: int
    all_reduced: int
    scattered: int
    collectives: tuple[int, ...]


# Bytes of what trainer_ext all-reduces in a step: the denominator of the loss (`exact_loss.py`), whether a gradient is not
# finite (`non_finite_guard.py`; ZeRO finds that out itself), and a signal (`stop_on_signal.py`, while the step is on).
DENOMINATOR, GUARD, SIGNAL = 8, 4, 4
ENGINES = {
    "DDP": Engine(16, 0, 4, 0, (DENOMINATOR, GUARD)),
    "ZeRO-1": Engine(4, 12, 0, 4, (DENOMINATOR,)),
    "ZeRO-2": Engine(2, 14, 0, 4, (DENOMINATOR,)),
    "ZeRO-3": Engine(0, 16, 0, 6, (DENOMINATOR,)),
    "FSDP2": Engine(0, 16, 0, 6, (DENOMINATOR, GUARD)),
}
SHAPES = {
    "BERT-base, 110 M parameters": Shape("bert", 12, 768, 3072, 30522, 128, 32),
    "GPT, 1.3 B parameters": Shape("gpt2", 24, 2048, 8192, 50257, 2048, 2),
    "Llama, 7 B parameters": Shape("llama", 32, 4096, 11008, 32000, 4096, 1),
}


def sent(engine: Engine, parameters: int, gpus: int) -> float:
    """Bytes that a GPU sends in a step."""
    return (2 * engine.all_reduced + engine.scattered) * parameters * (gpus - 1) / gpus


def held(engine: Engine, shape: Shape, gpus: int) -> float:
    """Bytes that a GPU holds: weights, gradients, the optimizer's state and activations."""
    return (engine.whole + engine.sharded / gpus) * shape.parameters + shape.activations


def seconds_of_arithmetic(shape: Shape) -> float:
    return shape.flops / (PEAK * UTILISATION)


def seconds_of_sending(sent_bytes: float, gpus: int) -> float:
    return sent_bytes / (INSIDE if gpus <= NODE else BETWEEN)


def seconds_of_ours(engine: Engine, gpus: int) -> float:
    """What `trainer_ext` adds to the way of a step; the signal's all-reduce goes on beside it."""
    return len(engine.collectives) * 2 * math.log2(gpus) * HOP


def table(title: str, shape: Shape) -> dict[str, object]:
    heads = ["", "GPUs", "arithmetic", "sent by a GPU", "sending", "step: all hidden to none", "held by a GPU"]
    rows = [[*heads, "trainer_ext sends", "takes", "of the step"]]
    for name, engine in ENGINES.items():
        for gpus in GPUS:
            volume, arithmetic = sent(engine, shape.parameters, gpus), seconds_of_arithmetic(shape)
            sending, ours = seconds_of_sending(volume, gpus), seconds_of_ours(engine, gpus)
            cells = [f"{1e3 * arithmetic:,.1f} ms", f"{volume / 1e9:.2f} GB", f"{1e3 * sending:,.1f} ms"]
            cells += [f"{1e3 * max(arithmetic, sending):,.1f} to {1e3 * (arithmetic + sending):,.1f} ms"]
            cells += [f"{held(engine, shape, gpus) / 1e9:.1f} GB", f"{sum(engine.collectives) + SIGNAL} bytes"]
            cells += [f"{1e3 * ours:.2f} ms", f"{ours / max(arithmetic, sending):.2%}"]
            rows.append([name, f"{gpus:,}", *cells])
    share = f"{shape.rows} rows of {shape.length} tokens a GPU"
    return {"title": f"{title}, {share}", "rows": rows}


def main() -> None:
    found = {"assumptions": ASSUMPTIONS, "tables": [table(title, shape) for title, shape in SHAPES.items()]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost_model.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
