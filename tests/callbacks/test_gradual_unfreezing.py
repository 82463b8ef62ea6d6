"""Blocks that join the training from the top: held against plain torch. Ranks: test_gradual_unfreezing_on_ranks.py."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.callbacks.unfreezing_worker import (
    CLIP,
    RATE,
    SAVED,
    STEPS,
    adam_steps,
    by_hand,
    gap,
    joined_after,
    level,
    made,
    moves,
    run,
)
from tests.conftest import logged, tiny_model
from trainer_ext.callbacks import gradual_unfreezing
from trainer_ext.callbacks.gradual_unfreezing import GradualUnfreezing


def check(out, callback, *, every=2, layers=1, **options):
    """That a run is the one by hand: its weights, its norms, what moves and what does not."""
    trainer, seen = run(out, callback, **options)
    expected, norms = by_hand(every, layers)
    assert len(seen) == STEPS + 1
    reach = [min(3, joined_after(step, every, layers)) for step in range(STEPS)]
    assert moves(seen) == [[list(range(top + 1)), True] for top in reach]
    assert max(gap(a, b) for a, b in zip(seen, expected, strict=True)) < 1e-12
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-12)
    assert all(norm > 2 * CLIP for norm in norms)
    return trainer, seen


@pytest.mark.parametrize(
    ("options", "every", "layers"),
    [({}, 2, 1), ({"layers": 2}, 2, 2), ({"every": 3}, 3, 1), ({"every": 1, "layers": 2}, 1, 2)],
)
def test_it_is_the_run_by_hand(tmp_path, options, every, layers):
    trainer, _ = check(tmp_path, GradualUnfreezing(**options), every=every, layers=layers)
    trained = [sum(joined_after(step, every, layers) >= place for step in range(STEPS)) for place in range(4)]
    assert adam_steps(trainer) == [(place, steps) for place, steps in enumerate(trained) if steps]
    assert not any(p._backward_hooks for p in trainer.model.parameters())


def test_in_the_stock_trainer_with_accumulation(tmp_path):
    """Its loss over micro-batches is another, so that a run by hand would be too; what moves and what stays is the same."""
    trainer, seen = run(
        tmp_path, GradualUnfreezing(), cls=Trainer, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    assert moves(seen) == [[list(range(min(3, step // 2) + 1)), True] for step in range(STEPS)]
    assert adam_steps(trainer) == [(0, 9), (1, 7), (2, 5), (3, 3)]


@pytest.mark.parametrize("options", [{}, {"every": 2}])
def test_a_resumed_run_is_the_whole_one(tmp_path, options):
    whole, seen = run(tmp_path, GradualUnfreezing(**options))
    saved = tmp_path / f"checkpoint-{SAVED}"
    kept = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    still = [name for name, _ in made().named_parameters() if level(name) > 1]
    assert len(kept) == len(list(made().parameters())) - len(still)  # no moments of what is kept still
    resumed, again = run(tmp_path, GradualUnfreezing(**options), resume=str(saved))
    assert [gap(a, b) for a, b in zip(again, seen[SAVED:], strict=True)] == [0] * (STEPS - SAVED + 1)
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
    assert adam_steps(resumed) == adam_steps(whole)


def test_a_second_training_begins_anew(tmp_path):
    callback = GradualUnfreezing()
    trainer, _ = run(tmp_path, callback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.args.max_steps = 1
    trainer.train()
    changed = {level(name) for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {0}


# Mutations: each is seen by the check above


class Flips(TrainerCallback):
    """As it is often written: frozen at first, and made trainable when the optimizer is there already."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(level(name) == 0)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(level(name) <= joined_after(state.global_step))


class Decays(GradualUnfreezing):
    """Leaves gradients of zero, on which an optimizer still decays the weights."""

    def on_pre_optimizer_step(self, *args, **kwargs):
        pass


class OneStepLate(GradualUnfreezing):
    def _reach(self, state):
        return max(0, state.global_step - 1) // 2


@pytest.mark.parametrize("callback", [Flips, Decays, OneStepLate, TrainerCallback])
def test_what_joins_late_or_never_or_does_not_keep_still_is_seen(tmp_path, callback):
    with pytest.raises(AssertionError):
        check(tmp_path, callback())


def test_a_norm_of_what_is_kept_still_is_seen(tmp_path, monkeypatch):
    own = gradual_unfreezing._on_gradient
    monkeypatch.setattr(gradual_unfreezing, "_on_gradient", lambda parameter, is_still: own(parameter, lambda: False))
    with pytest.raises(AssertionError):
        check(tmp_path, GradualUnfreezing())


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 0}, "layers=0"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"every": 0}, "every=0"),
        ({"every": "step"}, "every='step'"),
        ({"every": True}, "every=True"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=f"GradualUnfreezing.{says}"):
        GradualUnfreezing(**options)


def test_models_and_optimizers_that_cannot(trainer):
    frozen = tiny_model()
    frozen.bert.embeddings.requires_grad_(False)
    frozen.bert.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="everything below the head has requires_grad=False"):
        trainer(model=frozen, callbacks=[GradualUnfreezing()]).train()
    model = tiny_model()
    of_the_head = torch.optim.AdamW(model.classifier.parameters(), lr=RATE)
    with pytest.raises(ValueError, match="AdamW does not hold bert.embeddings.word_embeddings.weight, .* Pass an opt"):
        trainer(model=model, optimizers=(of_the_head, None), callbacks=[GradualUnfreezing()]).train()
    options = {"arguments_class": TrainingArguments, "remove_unused_columns": False}
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        trainer(Trainer, model=torch.nn.Linear(8, 2), **options, callbacks=[GradualUnfreezing()]).train()
