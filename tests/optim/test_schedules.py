"""Every schedule: its closed form, ratios between groups, transformers' own for one group, and a resume."""

import json
import pickle
from dataclasses import replace
from itertools import chain, pairwise
from math import cos, pi, sqrt

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from tests.conftest import logged, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.optim.multipliers import MULTIPLIERS
from trainer_ext.optim.plateaus import PLATEAUS
from trainer_ext.optim.schedules import NAMES, build_schedule, group_rates

STEPS, WARMUP, RATE = 40, 8, 0.02
RATIOS = (1.0, 0.1, 1e-6)


def down(step):
    """The share of the way from the end of the warmup to the end of the run."""
    return (step - WARMUP) / (STEPS - WARMUP)


def climbing(after):
    return lambda step: step / WARMUP if step < WARMUP else after(step)


def stable_then(decay):
    return climbing(lambda step: 1.0 if step < 30 else 0.1 + 0.9 * decay((step - 30) / 10))


def ramp(step, points, shape):
    """The value at `step` between the points (step, value), whose pieces have a shape."""
    for (a, low), (b, high) in pairwise(points):
        if step <= b:
            return low + (high - low) * shape((step - a) / (b - a))
    raise AssertionError


def half_cosine(way):
    return (1 - cos(pi * way)) / 2


CLOSED_FORMS = {
    ("linear",): climbing(lambda step: 1 - down(step)),
    ("cosine",): climbing(lambda step: cos(pi / 2 * down(step)) ** 2),
    ("cosine", ("num_cycles", 1.5)): climbing(lambda step: cos(pi * 1.5 * down(step)) ** 2),
    ("cosine_with_restarts", ("num_cycles", 2)): climbing(
        lambda step: cos(pi / 2 * (2 * down(step) - (down(step) >= 0.5))) ** 2
    ),
    ("polynomial",): climbing(lambda step: 1 - down(step) * (1 - 1e-7 / RATE)),
    ("polynomial", ("power", 2.0), ("lr_end", 0.002)): climbing(lambda step: 0.1 + 0.9 * (1 - down(step)) ** 2),
    ("constant",): lambda step: 1.0,
    ("constant_with_warmup",): climbing(lambda step: 1.0),
    ("inverse_sqrt",): climbing(lambda step: sqrt(WARMUP / step)),
    ("inverse_sqrt", ("timescale", 20)): climbing(lambda step: sqrt(20 / (step + 12))),
    ("cosine_with_min_lr", ("min_lr", 0.005)): climbing(lambda step: 0.25 + 0.75 * cos(pi / 2 * down(step)) ** 2),
    ("cosine_with_min_lr", ("min_lr_rate", 0.1)): climbing(lambda step: 0.1 + 0.9 * cos(pi / 2 * down(step)) ** 2),
    ("cosine_warmup_with_min_lr", ("min_lr_rate", 0.1)): lambda step: (
        (step + 1) / WARMUP if step < WARMUP else 0.1 + 0.9 * cos(pi / 2 * down(step + 1)) ** 2
    ),
    ("cosine_warmup_with_min_lr", ("min_lr", 0.002), ("warmup_lr_rate", 0.3)): lambda step: (
        0.3 + 0.7 * step / 7 if step < WARMUP else 0.1 + 0.9 * cos(pi / 2 * down(step + 1)) ** 2
    ),
    ("warmup_stable_decay",): climbing(lambda step: 1.0 if step < 36 else cos(pi / 2 * (step - 36) / 4) ** 2),
    ("warmup_stable_decay", ("num_decay_steps", 10), ("decay_type", "linear"), ("min_lr_ratio", 0.1)): lambda step: (
        0.1 + 0.9 * step / WARMUP if step < WARMUP else stable_then(lambda way: 1 - way)(step)
    ),
    ("warmup_stable_decay", ("num_decay_steps", 0.25), ("decay_type", "1-sqrt"), ("warmup_type", "cosine"),
     ("num_stable_steps", 22)): lambda step: (
        half_cosine(step / WARMUP) if step < WARMUP else 1.0 if step < 30 else 1 - sqrt((step - 30) / 10)
    ),
    ("one_cycle",): lambda step: ramp(step, [(0, 1 / 25), (WARMUP, 1), (39, 1 / 25e4)], half_cosine),
    ("one_cycle", ("anneal_strategy", "linear"), ("div_factor", 10), ("final_div_factor", 100),
     ("three_phase", True)): lambda step: ramp(
        step, [(0, 0.1), (WARMUP, 1), (2 * WARMUP, 0.1), (39, 0.001)], lambda way: way
    ),
}  # fmt: skip


def named(case):
    return case[0], dict(case[1:])


def optimizer(*rates):
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates], lr=RATE)


def rates(name, options, *group_rates, warmup=WARMUP, build=build_schedule):
    """The rate of every group in every step."""
    driven = optimizer(*group_rates)
    if build is build_schedule:
        schedule = build(name, driven, warmup_steps=warmup, total_steps=STEPS, options=options)
    else:
        schedule = build(driven)
    found = []
    for _ in range(STEPS):
        found.append([group["lr"] for group in driven.param_groups])
        driven.step()
        schedule.step()
    return found


def test_every_schedule_of_transformers_is_here():
    assert {kind.value for kind in SchedulerType} | {"one_cycle"} == set(NAMES)
    assert {case[0] for case in CLOSED_FORMS} == set(MULTIPLIERS)
    assert {*MULTIPLIERS, *PLATEAUS} == set(NAMES)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
def test_a_schedule_is_its_closed_form(case):
    name, options = named(case)
    for step, (rate,) in enumerate(rates(name, options, RATE)):
        assert rate == pytest.approx(RATE * CLOSED_FORMS[case](step), rel=1e-12, abs=1e-17), step


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=str)
def test_groups_keep_their_ratios_at_every_step(case):
    name, options = named(case)
    for step in rates(name, options, *(RATE * ratio for ratio in RATIOS)):
        assert step == pytest.approx([step[0] * ratio for ratio in RATIOS], rel=1e-13)


@pytest.mark.parametrize("case", [case for case in CLOSED_FORMS if case[0] != "one_cycle"], ids=str)
@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps:UserWarning")
def test_one_group_is_driven_as_transformers_drives_it(case):
    name, options = named(case)
    stock = {**options, "num_decay_steps": 10 if options else 4} if name == "warmup_stable_decay" else options
    expected = rates(name, options, RATE, build=lambda driven: get_scheduler(name, driven, WARMUP, STEPS, stock))
    assert rates(name, options, RATE) == expected


@pytest.mark.parametrize(
    "options", [{}, {"pct_start": 0.01}, {"pct_start": 0.25, "three_phase": True, "anneal_strategy": "linear"}]
)
def test_one_cycle_is_torchs_for_one_group(options):
    def torchs(driven):
        return OneCycleLR(driven, max_lr=RATE, total_steps=STEPS, cycle_momentum=False, **options)

    expected = rates("one_cycle", options, RATE, build=torchs)
    found = rates("one_cycle", options, RATE, warmup=0)
    assert list(chain(*found)) == pytest.approx(list(chain(*expected)), rel=1e-12)


def test_torchs_one_cycle_flattens_rates():
    """What the multiplier is for: the stock one gives every group the same rate."""
    found = rates("", {}, *RATIOS, build=lambda driven: OneCycleLR(driven, RATE, STEPS, cycle_momentum=False))
    assert len(set(found[12])) == 1


@pytest.mark.parametrize("name", MULTIPLIERS)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 2), (0, 2), (3, 3)])
def test_short_runs(name, warmup, total):
    options = {"min_lr_rate": 0.1} if "min_lr" in name else {}
    schedule = build_schedule(name, optimizer(RATE), warmup_steps=warmup, total_steps=total, options=options)
    for step in range(total + 3):
        assert 0 <= schedule.lr_lambdas[0](step) <= 1


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_past_its_end_a_run_keeps_its_last_multiplier(name):
    options = {"min_lr_rate": 0.1} if "min_lr" in name else {}
    schedule = build_schedule(name, optimizer(RATE), warmup_steps=2, total_steps=10, options=options)
    at = schedule.lr_lambdas[0]
    if name != "inverse_sqrt":  # knows no end
        assert at(10) == at(11) == at(50)


METRICS = [3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 1.1, 1.2, 1.3, 0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.7, 0.8, 0.9] * 3
PLATEAU_OPTIONS = {
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.3, "min_lr": 1e-4},
    "greedy": {"patience": 1, "factor": 0.5, "min_lr": 1e-3, "max_lr": 0.05, "reset_start": 3},
}


def following(schedule, driven, metrics=METRICS):
    found = []
    for metric in metrics:
        schedule.step(metric)
        found.append([group["lr"] for group in driven.param_groups])
    return found


@pytest.mark.parametrize("name", PLATEAUS)
def test_following_a_metric_keeps_ratios_too(name):
    def run(*group_rates, build):
        driven = optimizer(*group_rates)
        return following(build(driven), driven)

    def ours(driven):
        return build_schedule(name, driven, warmup_steps=0, total_steps=STEPS, options=PLATEAU_OPTIONS[name])

    def stock(driven):
        return get_scheduler(name, driven, 0, STEPS, PLATEAU_OPTIONS[name])

    found = run(*(RATE * ratio for ratio in RATIOS), build=ours)
    expected = run(RATE, build=stock)
    assert len({rate for (rate,) in expected}) > 3
    for step, (rate,) in zip(found, expected, strict=True):
        assert step == pytest.approx([rate * ratio for ratio in RATIOS], rel=1e-12)
    flattened = run(*(RATE * ratio for ratio in RATIOS), build=stock)
    assert min(step[2] / step[0] for step in flattened) != pytest.approx(RATIOS[2], rel=0.5) or (
        max(step[2] / step[0] for step in flattened) != pytest.approx(RATIOS[2], rel=0.5)
    )


@pytest.mark.parametrize("name", PLATEAUS)
@pytest.mark.parametrize("stop", range(0, 20, 3))
def test_following_a_metric_goes_on_after_a_resume(name, stop):
    def fresh():
        driven = optimizer(RATE, RATE / 3)
        options = PLATEAU_OPTIONS[name]
        return build_schedule(name, driven, warmup_steps=0, total_steps=STEPS, options=options), driven

    whole = following(*fresh())
    schedule, driven = fresh()
    following(schedule, driven, METRICS[:stop])
    kept = pickle.loads(pickle.dumps((schedule.state_dict(), driven.state_dict())))
    schedule, driven = fresh()
    driven.load_state_dict(kept[1])
    schedule.load_state_dict(kept[0])
    assert following(schedule, driven, METRICS[stop:]) == whole[stop:]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("wsd", {}, "lr_scheduler_type='wsd' must be one of linear, .*one_cycle, reduce_lr_on_plateau, greedy"),
        ("one_cycle", {"pct_strat": 0.3}, "pct_strat=0.3: one_cycle takes pct_start, anneal_strategy, div_factor,"),
        ("linear", {"num_cycles": 1}, "num_cycles=1: linear takes no options"),
        ("reduce_lr_on_plateau", {"patient": 1}, "patient=1: reduce_lr_on_plateau takes mode, factor, patience,"),
        ("one_cycle", {"anneal_strategy": "cosine"}, "anneal_strategy='cosine' must be one of cos, linear"),
        ("one_cycle", {"three_phase": 1}, "three_phase=1 must be a bool"),
        ("cosine", {"num_cycles": "2"}, "num_cycles='2' must be a number"),
        ("greedy", {"min_lr": [1e-3, 1e-4]}, "min_lr=.*must be a number"),
        ("one_cycle", {"div_factor": 0}, "division by zero"),
        ("one_cycle", {"pct_start": 0.2}, "pct_start=0.2 and warmup_steps=8 both say"),
        ("cosine_with_min_lr", {}, "give one of min_lr .* and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-3, "min_lr_rate": 0.1}, "give one of min_lr"),
        ("polynomial", {"lr_end": 1.0}, "lr_end=1.0 must be below the learning rate, 0.02"),
        ("warmup_stable_decay", {"min_lr_ratio": -1.0}, "the multiplier of step 0 is|the multiplier of step 40 is"),
        ("greedy", {"min_lr": 0.1}, "between min_lr=0.1 and max_lr=1.0, and the learning rate is 0.02"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_option_is_one_clear_error(name, options, said):
    with pytest.raises(ValueError, match=said):
        build_schedule(name, optimizer(RATE), warmup_steps=WARMUP, total_steps=STEPS, options=options)


def test_arguments_take_the_names_and_report_all_findings(arguments):
    assert arguments(lr_scheduler_type="cosine").lr_scheduler_type is SchedulerType.COSINE
    with pytest.raises(ValueError, match="lr_scheduler_type='ones' must be one of .*; learning_rate=-1"):
        arguments(lr_scheduler_type="ones", learning_rate=-1)
    with pytest.raises(ValueError, match="div=1: one_cycle takes pct_start"):
        arguments(lr_scheduler_type="one_cycle", lr_scheduler_kwargs={"div": 1})
    with pytest.raises(ValueError, match="requires an eval strategy"):
        arguments(lr_scheduler_type="greedy")


def test_arguments_keep_a_name_of_ours(arguments, tmp_path):
    made = arguments(lr_scheduler_type="one_cycle", lr_scheduler_kwargs={"div_factor": 10.0})
    again = [
        pickle.loads(pickle.dumps(made)),
        replace(made),
        CustomTrainingArguments(**json.loads(made.to_json_string()) | {"accelerator_config": None}),
    ]
    for found in again:
        assert found.lr_scheduler_type == "one_cycle"
        assert found.lr_scheduler_kwargs == {"div_factor": 10.0}
    torch.save(made, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).lr_scheduler_type == "one_cycle"


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_the_command_line_takes_the_names(tmp_path, name):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--lr_scheduler_type", name]
    (args,) = HfArgumentParser(CustomTrainingArguments).parse_args_into_dataclasses(words)
    assert args.lr_scheduler_type == name
    words += ["--lr_scheduler_kwargs", '{"pct_start": 0.5}' if name == "one_cycle" else '{"num_cycles": 2}']
    (args,) = HfArgumentParser(CustomTrainingArguments).parse_args_into_dataclasses(words)
    assert len(args.lr_scheduler_kwargs) == 1


def two_rates():
    """A model and an optimizer whose head learns ten times as fast."""
    model = tiny_model()
    head = list(model.classifier.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    groups = [{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-2, "name": "head"}]
    return model, torch.optim.AdamW(groups, lr=1e-3)


@pytest.mark.parametrize("name", ["one_cycle", "warmup_stable_decay", "cosine"])
def test_a_resume_takes_the_same_steps_and_every_rate_is_logged(trainer, tmp_path, name):
    def run(**options):
        model, made = two_rates()
        return trainer(
            model=model, optimizers=(made, None), lr_scheduler_type=name, max_steps=6, warmup_steps=2,
            output_dir=str(tmp_path), save_strategy="steps", save_steps=2, **options,
        )  # fmt: skip

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for key in ("learning_rate", "learning_rate_0", "learning_rate_head"):
        assert len(logged(whole, key)) == 6
        assert logged(resumed, key) == logged(whole, key)
    assert logged(whole, "learning_rate_0") == logged(whole, "learning_rate")
    assert logged(whole, "learning_rate_head") == pytest.approx([10 * x for x in logged(whole, "learning_rate")])
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_rate_is_logged_once(trainer):
    run = trainer(lr_scheduler_type="one_cycle")
    run.train()
    assert not any(key.startswith("learning_rate_") for entry in run.state.log_history for key in entry)
    assert group_rates(optimizer(RATE, RATE)) == {}


def test_a_plateau_is_followed_in_training(trainer):
    model, made = two_rates()
    run = trainer(
        model=model, optimizers=(made, None), evaluation=trainer().train_dataset, eval_strategy="steps", eval_steps=1,
        lr_scheduler_type="reduce_lr_on_plateau", max_steps=5,
        lr_scheduler_kwargs={"patience": 0, "threshold": 10.0, "threshold_mode": "abs", "factor": 0.5},
    )  # fmt: skip
    run.train()
    assert logged(run, "learning_rate") == [1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4]
    assert logged(run, "learning_rate_head") == [1e-2, 1e-2, 5e-3, 2.5e-3, 1.25e-3]


def test_plain_training_arguments_will_do(trainer):
    run = trainer(CustomTrainer, arguments_class=TrainingArguments, lr_scheduler_type="warmup_stable_decay")
    run.train()
    assert logged(run, "learning_rate") == [1e-3, 1e-3, 1e-3]  # a tenth of three steps is the last one, not begun yet


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_command_shows_and_draws_a_schedule(call, tmp_path, ending):
    plot = tmp_path / f"plot.{ending}"
    found = call(
        "schedule", "one_cycle", "--steps", 50, "--warmup", 10, "--option", "div_factor=10", "--option",
        "anneal_strategy=linear", "--plot", plot,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    lines = {line.split("│")[1].strip(): line for line in found.output.splitlines() if line.startswith("│")}
    assert "0.100000" in lines["0"]
    assert "1.000000" in lines["10"]
    assert "5e-05" in lines["10"]
    assert "49" in lines
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cosin"], "'cosin' must be one of linear, cosine"),
        (["cosine", "--option", "num_cycles"], "--option num_cycles: write key=value"),
        (["cosine", "--option", "cycles=2"], "cosine takes num_cycles"),
        (["greedy"], "greedy follows a metric"),
        (["cosine", "--plot", "out.doc"], "--plot out.doc must end in .svg, .png, .pdf"),
    ],
)
def test_the_command_says_what_is_wrong(call, words, said):
    found = call("schedule", *words)
    assert found.exit_code == 2
    assert said in found.output
