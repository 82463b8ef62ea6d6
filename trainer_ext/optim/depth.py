"""Where in the network a parameter stands: read from how the modules are nested, never from a list of names.

Blocks are the elements of the outermost numbered lists whose elements hold two or more matrices. In a list of n blocks
they are the layers 1 to n; what the same module registers before the list, every `nn.Embedding` beside it and a
normalisation of these is layer 0, and what comes after it (final norm, pooler) stands above the last. A list whose
elements are stages, each with a list of its own whose shapes change from stage to stage, is counted block by block.

Depth aligns the lists at their tops. With L blocks in the longest list, block i of a list of n has depth L - n + i, what
stands before it L - n, and what stands above it or outside the base model (the head) L + 1. So a decoder's top is as near
to the output as its encoder's, and a tower beside a taller one gets what it would get alone. In a model with one list:
embeddings 0, blocks 1 to L, all above L + 1, as BEiT counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

NORMALISATION = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        depth: 0 (input) to L + 1 (output), the lists of blocks aligned at their tops.
        layer: The block's number in its own list from 1; 0 before the list, None above it and in the head.
    """

    depth: int
    layer: int | None


@dataclass(frozen=True)
class Depths:
    """The places of all parameters.

    Attributes:
        layers: L, the number of blocks in the longest list.
        of: The place of each parameter; of a tied one, the lowest of its places.
    """

    layers: int
    of: dict[nn.Parameter, Place]

    def distance(self, parameter: nn.Parameter) -> int:
        """How far `parameter` is from the head: L + 1 - depth."""
        return self.layers + 1 - self.of[parameter].depth


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter: ZeRO-3 leaves an empty vector in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def base_model(model: nn.Module) -> nn.Module:
    """What `model.base_model_prefix` names; `model` itself where it has no such part."""
    if callable(unwrap := getattr(model, "get_base_model", None)):  # what PEFT wrapped
        model = unwrap()
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return base if isinstance(base, nn.Module) else model


def head_parameters(model: nn.Module, depths: Depths | None = None) -> set[nn.Parameter]:
    """The parameters outside the base model; where it is the whole model, those above the last block."""
    inside = set(base_model(model).parameters())
    outside = set(model.parameters()) - inside
    if not outside and depths is not None:
        return {parameter for parameter, place in depths.of.items() if place.layer is None}
    return outside


def find_depths(model: nn.Module) -> Depths | None:
    """The depth of every parameter of `model`, or None where it has no list of blocks."""
    base = base_model(model)
    if not any(_stacks(base)):
        base = model
    stacks = {id(stack): _elements(stack) for stack in _stacks(base)}
    if not stacks:
        return None
    layers = max(elements[-1][-1] for elements in stacks.values())
    walk = _Walk(layers, stacks)
    walk.visit(base)
    for parameter in model.parameters():
        walk.of.setdefault(parameter, Place(layers + 1, None))
    return Depths(layers, walk.of)


class _Walk:
    """One walk down the modules that hold stacks; it fills `of`."""

    def __init__(self, layers: int, stacks: dict[int, list[list[int]]]) -> None:
        self.layers = layers
        self.stacks = stacks
        self.of: dict[nn.Parameter, Place] = {}

    def visit(self, module: nn.Module) -> None:
        """Place everything in `module`, which holds a stack somewhere."""
        lengths = [self.stacks[id(part)][-1][-1] for part in module.modules() if id(part) in self.stacks]
        before, above = Place(self.layers - max(lengths), 0), Place(self.layers + 1, None)
        for parameter in module.parameters(recurse=False):  # class tokens and positions; a scalar scales the output
            self._put(parameter, before if whole_shape(parameter) else above)
        beside = {len(self.stacks[id(c)]): c for c in module.children() if id(c) in self.stacks}
        passed, previous = False, None
        for name, child in module.named_children():
            if id(child) in self.stacks:
                self._number(child, child)
                passed = True
            elif any(id(part) in self.stacks for part in child.modules()):
                self.visit(child)
                passed = True
            elif isinstance(child, nn.ModuleList) and len(child) in beside:  # one element for each block
                self._number(child, beside[len(child)], last=passed)
            else:
                of_inputs = isinstance(child, NORMALISATION) and (
                    "embedding" in name or isinstance(previous, nn.Embedding)
                )
                self._fill(child, before if of_inputs or not passed else above, before)
            previous = child

    def _number(self, listed: nn.Module, stack: nn.Module, *, last: bool = True) -> None:
        """Place a list's elements; what a stage holds besides its blocks goes to its first block or its last."""
        elements = self.stacks[id(stack)]
        top = elements[-1][-1]
        for element, numbers in zip(listed.children(), elements, strict=True):
            blocks = _inner(element) if listed is stack and _is_staged(stack) else None
            if blocks is None:
                self._fill(element, self._block(numbers[-1] if last else numbers[0], top))
                continue
            for number, block in zip(numbers, blocks.children(), strict=True):
                self._fill(block, self._block(number, top))
            passed = False
            for child in element.children():
                passed = passed or any(part is blocks for part in child.modules())
                self._fill(child, self._block(numbers[-1] if passed else numbers[0], top), unplaced_only=True)
            self._fill(element, self._block(numbers[0], top), unplaced_only=True)

    def _block(self, number: int, top: int) -> Place:
        return Place(self.layers - top + number, number)

    def _fill(
        self, module: nn.Module, place: Place, embedding: Place | None = None, *, unplaced_only: bool = False
    ) -> None:
        for part in module.modules():
            here = embedding if embedding is not None and isinstance(part, nn.Embedding) else place
            for parameter in part.parameters(recurse=False):
                if not (unplaced_only and parameter in self.of):
                    self._put(parameter, here)

    def _put(self, parameter: nn.Parameter, place: Place) -> None:
        found = self.of.get(parameter)
        if found is None or place.depth < found.depth:
            self.of[parameter] = place


def _stacks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of blocks below `module`."""
    for child in module.children():
        if _is_stack(child):
            yield child
        else:
            yield from _stacks(child)


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential) and (len(module) < 2 or len({type(part) for part in module}) > 1):
        return False
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    return any(next(block.children(), None) is not None and _matrices(block) >= 2 for block in module)


def _elements(stack: nn.Module) -> list[list[int]]:
    """The numbers of the blocks in each element: one each, or those of a stage; an activation between two takes none."""
    staged, number = _is_staged(stack), 0
    elements = []
    for element in stack.children():
        blocks = _inner(element) if staged else None
        size = int(any(True for _ in element.parameters())) if blocks is None else len(list(blocks.children()))
        elements.append(list(range(number + 1, number + size + 1)) or [number])
        number += size
    return elements


def _is_staged(stack: nn.Module) -> bool:
    """Whether the elements are stages: each a mere container, or of other shapes than the next (experts are not)."""
    stages = list(stack.children())
    inner = [found for found in map(_inner, stages) if found is not None]
    if len(inner) < len(stages):
        return False
    mere = all(_count(stage) == _count(blocks) for stage, blocks in zip(stages, inner, strict=True))
    return mere or _shapes(next(inner[0].children())) != _shapes(next(inner[-1].children()))


def _inner(element: nn.Module) -> nn.Module | None:
    """The list of blocks of one class in a stage, or the stage itself where it is such a list."""
    found = [element] if _is_stack(element) else list(_stacks(element))
    alike = [blocks for blocks in found if len({type(block) for block in blocks.children()}) == 1]
    return max(alike, key=_count, default=None)


def _matrices(module: nn.Module) -> int:
    return sum(len(whole_shape(parameter)) >= 2 for parameter in module.parameters())


def _count(module: nn.Module) -> int:
    return sum(whole_shape(parameter).numel() for parameter in module.parameters())


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(whole_shape(parameter)) for parameter in module.parameters())
