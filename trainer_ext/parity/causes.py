"""Why two runs differ: a catalogue of known faults, each told by what it does to the numbers of a record.

`diagnose` asks the causes of the quantity that differed first, in their order; the first whose sign is in the numbers
is the diagnosis. A sign is a function of the evidence that says what it saw, or nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer_ext.parity.differences import Difference
from trainer_ext.parity.evidence import Evidence
from trainer_ext.parity.evidence import arguments as differing_arguments
from trainer_ext.parity.signs import arithmetic, data, run
from trainer_ext.parity.trajectory import Trajectory

HF, TORCH = "https://github.com/huggingface", "https://github.com/pytorch/pytorch"
LIGHTNING, DEEPSPEED = "https://github.com/Lightning-AI/pytorch-lightning", "https://github.com/deepspeedai/DeepSpeed"


@dataclass(frozen=True)
class Cause:
    """One way in which a run goes wrong.

    Attributes:
        name: What it is called.
        quantity: What it is seen in first; a beginning of `Difference.quantity`.
        sign: What the numbers show of it, or None.
        mend: What to do.
        known: A public report of it, or of its kind.
    """

    name: str
    quantity: str
    sign: Callable[[Evidence], str | None]
    mend: str
    known: str


@dataclass(frozen=True)
class Diagnosis:
    """The likely cause of a first difference.

    Attributes:
        cause: Its name in `CAUSES`; `unknown` where no sign was found.
        saw: What the numbers show.
        mend: What to do.
        known: A public report of it; empty where there is none.
        arguments: The arguments in which the two runs differ besides, as `name: a / b`.
    """

    cause: str
    saw: str
    mend: str = ""
    known: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def thread(self) -> str:
        """The report as people write it, such as `huggingface/transformers#47688`."""
        owner, name, _, number = self.known.split("/")[-4:]
        return f"{owner}/{name}#{number}"

    def __str__(self) -> str:
        text = f"Likely cause: {self.cause}. {self.saw}." if self.cause != UNKNOWN else f"{self.saw}."
        text += f" {self.mend}" if self.mend else ""
        text += f" Known as {self.known}" if self.known else ""
        return text + (f"\nArguments that differ: {'; '.join(self.arguments)}." if self.arguments else "")


UNKNOWN = "unknown"
CAUSES = (
    Cause("a resume began the data anew", "batch", data.data_begun_anew,
          "Skip the batches that were trained, and restore the sampler's epoch.", f"{HF}/accelerate/pull/4071"),
    Cause("a resume trained other rows", "batch", data.first_after_resume,
          "Restore the sampler's state and epoch with the checkpoint.", f"{HF}/accelerate/pull/4071"),
    Cause("the sampler is not reseeded for each epoch", "batch", data.epoch_repeated,
          "Call set_epoch on the sampler at the start of each epoch.", f"{TORCH}/issues/31771"),
    Cause("every rank trains the same rows", "batch", data.ranks_alike,
          "Shard the data over the ranks.", f"{HF}/transformers/pull/11254"),
    Cause("one rank has a seed of its own", "batch", data.one_rank_differs,
          "Seed the sampler alike on every rank.", "https://github.com/mlcommons/training/pull/625"),
    Cause("rows are left out", "batch", data.rows_missing,
          "Look for drop_last, a last window that is cut, or a micro-batch that is skipped.", f"{LIGHTNING}/issues/19987"),
    Cause("rows are counted twice", "batch", data.rows_twice,
          "Cut the rows that a loader repeats to even out the ranks.", f"{TORCH}/issues/25162"),
    Cause("the same rows in another order within the step", "batch", data.same_rows_of_step,
          "The sum is the same but for rounding; dropout masks fall on other rows.", f"{HF}/transformers/issues/11389"),
    Cause("the same samples in another order: the sampler's seed", "batch", data.other_order,
          "Give both runs one seed (and data_seed).", f"{HF}/transformers/issues/11389"),
    Cause("other inputs: dataset, tokenizer or truncation", "batch", data.no_common_rows,
          "Compare a few rows of both runs by eye.", f"{HF}/transformers/issues/11389"),
    Cause("labels are moved against their inputs", "labels", data.labels_permuted,
          "Look at what sorts or shifts one column alone.", f"{HF}/transformers/issues/47394"),
    Cause("other labels for the same inputs", "labels", data.labels_differ,
          "Look for a label shift done twice or not at all, another label map, or another -100 mask.",
          f"{HF}/transformers/issues/47394"),
    Cause("the batch is split otherwise", "micro_batches", data.split_differs,
          "Give both the same micro-batch and accumulation, or compare with a tolerance.",
          f"{HF}/transformers/issues/24725"),
    Cause("weights of lower precision", "initial_weights", arithmetic.coarser_dtype,
          "Keep float32 masters: an update below 2^-8 of a weight is lost in bfloat16.",
          "https://github.com/pytorch/ao/pull/1124"),
    Cause("a new head, drawn with another seed", "initial_weights", arithmetic.few_weights_differ,
          "Set the seed before the model is made.", f"{HF}/trl/pull/4887"),
    Cause("another checkpoint or another seed", "initial_weights", arithmetic.weights_differ,
          "Set the seed before the model is made, and load the same weights.", f"{HF}/trl/pull/4887"),
    Cause("a resume without the RNG state", "rng", data.first_after_resume,
          "Save and restore the random generators with the checkpoint.", f"{HF}/transformers/issues/17032"),
    Cause("dropout is off in one of them", "rng", arithmetic.draws_nothing,
          "Compare the models' dropout, and whether train() was called.", f"{HF}/transformers/issues/31412"),
    Cause("other dropout masks: another seed, or random numbers drawn besides", "rng", arithmetic.same_but_rng,
          "Seed both after the model is made and before the first step.", f"{HF}/transformers/issues/31412"),
    Cause("the loss is not a number", "loss", arithmetic.not_finite,
          "Stock Trainer logs such a step as the average of the others (logging_nan_inf_filter) and trains on.",
          f"{HF}/trl/issues/6702"),
    Cause("items are counted instead of class weights", "denominator", arithmetic.counts_items,
          "Divide by the sum of the labels' weights.", f"{HF}/transformers/issues/24725"),
    Cause("the denominator is that of one rank or one micro-batch", "denominator", arithmetic.part_of_the_step,
          "Sum it over the micro-batches of the step and over the ranks.", f"{HF}/transformers/issues/24725"),
    Cause("a wrong normaliser", "denominator", arithmetic.denominator_ratio,
          "Divide by the sum of the weights of all labels of the step that are not -100.",
          f"{HF}/transformers/issues/24725"),
    Cause("a resume without the weights", "loss", data.first_after_resume,
          "Load the checkpoint's weights before the first step.", f"{LIGHTNING}/issues/2613"),
    Cause("a resume without the optimizer's state", "loss", data.second_after_resume,
          "Load the optimizer's state with the checkpoint.", f"{LIGHTNING}/issues/2613"),
    Cause("the loss is not divided by the whole step's items", "loss", arithmetic.scaled_by_parts,
          "Divide each micro-batch's summed loss by the items of all micro-batches and ranks.",
          f"{HF}/transformers/issues/47688"),
    Cause("a mean of means", "loss", arithmetic.mean_of_means,
          "Add up numerators and denominators over the step, and divide once.", f"{HF}/transformers/issues/24725"),
    Cause("bfloat16 arithmetic", "loss", arithmetic.coarser_dtype,
          "Keep float32 masters, or compare with bf16's tolerance.", "https://github.com/pytorch/ao/pull/1124"),
    Cause("weights were changed otherwise than by this step's gradient", "loss", arithmetic.update_differs,
          "Look at the optimizer's arithmetic and for code that writes weights.", f"{HF}/transformers/issues/35504"),
    Cause("another loss", "loss", arithmetic.first_loss_differs,
          "Compare class weights, label smoothing and the loss function.", f"{HF}/transformers/issues/13255"),
    Cause("the gradient is not a number", "grad_norm", arithmetic.not_finite,
          "Look for an infinite logit or a division by 0; the loss itself is finite.", f"{HF}/trl/issues/6702"),
    Cause("clipping inside the accumulation", "grad_norm", arithmetic.clipped_early,
          "Clip once, after the last micro-batch.", f"{HF}/transformers/issues/1563"),
    Cause("gradients averaged over the ranks twice, or not at all", "grad_norm", arithmetic.scaled_by_ranks,
          "DDP, FSDP and DeepSpeed average: multiply a loss that is divided by the whole step's items by the ranks.",
          "https://github.com/meta-pytorch/torchtune/pull/2172"),
    Cause("the gradient is scaled by the micro-batches", "grad_norm", arithmetic.scaled_by_parts,
          "Divide the loss, not what is logged of it.", f"{HF}/transformers/issues/47688"),
    Cause("gradients of the step before are kept", "grad_norm", arithmetic.gradient_kept,
          "Call zero_grad after each step.", f"{TORCH}/issues/47175"),
    Cause("part of the gradient is missing or counted otherwise", "grad_norm", arithmetic.gradient_ratio,
          "Look for detached outputs, frozen or unused parameters, and ranks that do not synchronise.",
          f"{HF}/transformers/pull/3519"),
    Cause("clipping at another norm", "clipped_grad_norm", arithmetic.clip_differs,
          "Compare max_grad_norm, and whether clipping sees all parameters.", f"{LIGHTNING}/issues/9330"),
    Cause("a resume without the schedule", "learning_rate", run.schedule_begun_anew,
          "Load the scheduler's state with the checkpoint.", f"{LIGHTNING}/pull/11322"),
    Cause("a lost rate of a parameter group", "learning_rate", run.groups_alike,
          "Set each group's rate as a multiple of its own.", f"{DEEPSPEED}/pull/8171"),
    Cause("the schedule advances several steps a step", "learning_rate", run.schedule_multiple,
          "Step the schedule once per optimizer step, whatever the ranks and micro-batches.",
          f"{HF}/transformers/pull/24088"),
    Cause("the schedule is a step off", "learning_rate", run.schedule_shifted,
          "Step the optimizer first, then the schedule.", f"{HF}/transformers/pull/1136"),
    Cause("another learning rate", "learning_rate", run.rate_ratio,
          "Compare learning rate, warmup and the number of steps.", f"{HF}/transformers/pull/24088"),
    Cause("decay reaches 1-D parameters", "weight_decay", run.decays_vectors,
          "Give norms and biases a group without decay, by shape rather than by name.",
          f"{HF}/transformers/issues/42754"),
    Cause("matrices without decay", "weight_decay", run.matrices_undecayed,
          "Look at the pattern that excludes them.", f"{HF}/transformers/issues/42754"),
    Cause("another weight decay", "weight_decay", run.decay_differs,
          "Compare weight_decay; optimizers have other defaults.", f"{DEEPSPEED}/issues/5214"),
    Cause("another optimizer, or other settings", "optimizer[", run.setting_differs,
          "Compare betas, eps and the optimizer's class.", f"{HF}/transformers/issues/35504"),
    Cause("evaluation in training mode", "evaluation ", run.evaluated_training,
          "Call model.eval() before evaluating.", "https://github.com/IBM/pytorch-seq2seq/issues/33"),
    Cause("rows evaluated twice", "evaluation ", run.evaluated_twice,
          "Cut the rows that a loader repeats.", f"{TORCH}/issues/25162"),
    Cause("rows left out of the evaluation", "evaluation ", run.evaluated_part,
          "Look for drop_last in the evaluation's loader.", f"{TORCH}/issues/25162"),
    Cause("a resume without the optimizer's state", "evaluation ", run.first_update_after_resume,
          "Load the optimizer's state with the checkpoint.", f"{LIGHTNING}/issues/2613"),
    Cause("weights were changed otherwise than by this step's gradient", "evaluation ", run.evaluated_other_weights,
          "Look at the optimizer's arithmetic and for code that writes weights.", f"{HF}/transformers/issues/35504"),
    Cause("eval_loss is a mean of batch means", "evaluation ", run.only_eval_loss,
          "Add up numerators and denominators over the whole split.", f"{HF}/transformers/issues/39241"),
    Cause("the metrics are computed otherwise", "evaluation ", run.only_metrics,
          "Compare the metric and the predictions that it is fed.", f"{TORCH}/issues/25162"),
    Cause("the evaluation after the last step is left out", "evaluations", run.last_not_evaluated,
          "Trainers of other versions differ in it: evaluate once more after train().", f"{HF}/transformers/issues/43935"),
    Cause("evaluated after other steps", "evaluations", run.evaluated_elsewhere,
          "Compare eval_strategy, eval_steps and eval_delay.", f"{HF}/transformers/issues/10131"),
    Cause("one run takes fewer steps", "steps", run.steps_differ,
          "Compare epochs, drop_last, and what happens to the last, shorter window.", f"{LIGHTNING}/issues/19987"),
    Cause("nothing was trained", "weights left unchanged", run.nothing_trained,
          "Look whether the optimizer holds the model's parameters.", f"{HF}/transformers/pull/3519"),
)  # fmt: skip


def diagnose(reference: Trajectory, candidate: Trajectory, difference: Difference) -> Diagnosis:
    """The likely cause of the first difference between two runs."""
    evidence = Evidence(reference, candidate, difference)
    for cause in CAUSES:
        if difference.quantity.startswith(cause.quantity) and (saw := cause.sign(evidence)) is not None:
            return Diagnosis(cause.name, saw, cause.mend, cause.known, differing_arguments(evidence))
    what = "A number that is not finite" if _not_finite(difference) else "No known cause has these numbers"
    return Diagnosis(UNKNOWN, what, arguments=differing_arguments(evidence))


def _not_finite(difference: Difference) -> bool:
    value = difference.candidate
    return isinstance(value, float) and not math.isfinite(value)
