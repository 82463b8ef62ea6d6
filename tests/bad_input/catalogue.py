"""What users get wrong on the command line, and what they are told: a row each.

`command` is typed in a folder that holds the good `data` (pairs of two classes), `model` (a classifier of two),
`run` (with `checkpoint-2`), the records `manual` and `trainer`, and the entry's own `files`.
`says` is what the message has in it; `..` stands for anything. Nothing is left out of it that a user needs: the value,
where it came from, and what to do.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tests.bad_input.laid_out import PAIRS, jsonl, link, parquet, without

TRAIN = "train --model model --output-dir out"
TRAIN_ON = f"{TRAIN} --dataset data"
MANUAL = "manual --model model --dataset data --output-dir out"
PARITY = "parity run --model model --dataset data --output-dir out"
ROWS = [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in PAIRS]
CSV = "sentence,label\na b,0\nb c,1\n"


class Entry(NamedTuple):
    what: str
    command: str
    says: str
    files: Mapping = MappingProxyType({})


def data(what, content, says, name="bad.jsonl", options=""):
    """A data set that is wrong."""
    return Entry(what, f"{TRAIN} --dataset {name}{options}", says, {name: content})


DATA = [
    data("an empty file", "", "dataset file 'bad.jsonl' has no rows."),
    data("a header alone", "sentence,label\n", "dataset file 'bad.csv' has no rows.", "bad.csv"),
    data(
        "JSON lines that break off",
        jsonl(ROWS[0])[:-9],
        "dataset file 'bad.jsonl' cannot be read as .jsonl: JSON parse error:",
    ),
    data(
        "JSON that is no table",
        '{"a": {"b": 1}}',
        "dataset 'bad.json': none of labels, label, label_ids is there as the label",
        "bad.json",
    ),
    data(
        "JSON of lists alone",
        "[[1, 2], [3, 4]]",
        "dataset 'bad.json': none of labels, label, label_ids is there as the label",
        "bad.json",
    ),
    data(
        "deeply nested JSON",
        "[" * 100_000 + "]" * 100_000,
        "dataset file 'bad.json' cannot be read as .json: Reached object decoding",
        "bad.json",
    ),
    data(
        "a picture named .csv",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00",
        "dataset file 'bad.csv' cannot be read as .csv: 'utf-8' codec can't decode",
        "bad.csv",
    ),
    data(
        "text that is not UTF-8",
        "sentence,label\nd\u00e9j\u00e0,0\nvu,1\n".encode("latin-1"),
        "dataset file 'bad.csv' cannot be read as .csv: 'utf-8' codec can't decode",
        "bad.csv",
    ),
    data(
        "text in UTF-16",
        CSV.encode("utf-16"),
        "dataset file 'bad.csv' cannot be read as .csv: 'utf-8' codec can't decode",
        "bad.csv",
    ),
    data(
        "a NUL in the header",
        "sentence\0,label\na,0\nb,1\n",
        "dataset file 'bad.csv' cannot be read as .csv: An error occurred while",
        "bad.csv",
    ),
    data(
        "a row with too many cells",
        CSV + "a,b,c,1\n",
        "dataset file 'bad.csv' cannot be read as .csv: Error tokenizing data. C",
        "bad.csv",
    ),
    data(
        "a parquet file that breaks off",
        parquet(sentence=["a", "b"], label=[0, 1])[:-20],
        "dataset file 'bad.parquet' cannot be read as .parquet: Parquet magic bytes",
        "bad.parquet",
    ),
    data(
        "a CSV file named .parquet",
        CSV,
        "dataset file 'bad.parquet' cannot be read as .parquet: Parquet magic bytes",
        "bad.parquet",
    ),
    data(
        "an ending that is not known",
        CSV,
        "dataset file 'bad.txt': its name must end in one of .jsonl, .json, .csv,",
        "bad.txt",
    ),
    data("no ending", CSV, "dataset file 'bad': its name must end in one of .jsonl, .json, .csv, .tsv,", "bad"),
    data(
        "no label column",
        jsonl({"sentence": "a"}, {"sentence": "b"}),
        "dataset 'bad.jsonl': none of labels, label, label_ids is there as the",
    ),
    data(
        "two label columns",
        jsonl({"sentence": "a", "label": 0, "labels": 1}),
        "dataset 'bad.jsonl': both labels and label could be the label column,",
    ),
    data(
        "no text column",
        jsonl({"n": 1, "label": 0}, {"n": 2, "label": 1}),
        "dataset 'bad.jsonl': which columns are the text? It has ['n', 'label'],",
    ),
    data(
        "three text columns",
        jsonl({"a": "x", "b": "y", "c": "z", "label": 0}),
        "dataset 'bad.jsonl': which columns are the text? It has ['a', 'b', 'c',",
    ),
    data(
        "a text column that is not there",
        jsonl(*ROWS),
        "dataset 'bad.jsonl': text columns ['sentence9'] must be one or two of its",
        options=" --text-columns sentence9",
    ),
    data(
        "three text columns asked for",
        jsonl(*ROWS),
        "dataset 'bad.jsonl': text columns ['a', 'b', 'c'] must be one or two of",
        options=" --text-columns a b c",
    ),
    data(
        "a label column that is not there",
        jsonl(*ROWS),
        "dataset 'bad.jsonl': none of y is there as the label column, among",
        options=" --label-column y",
    ),
    data(
        "a missing text",
        jsonl(*ROWS, {"sentence1": None, "sentence2": "a", "label": 0}),
        "dataset 'bad.jsonl': its train split has no text in 'sentence1' at row 5.",
    ),
    data(
        "a missing label",
        jsonl(*ROWS, {**ROWS[0], "label": None}),
        "dataset 'bad.jsonl': its train split has no label in 'label' at row 5.",
    ),
    data(
        "a missing label in CSV",
        CSV + "c d,\n",
        "dataset 'bad.csv': its train split has no label in 'label' at row 2. Write",
        "bad.csv",
    ),
    data(
        "labels that are fractions",
        jsonl(*ROWS, {**ROWS[0], "label": 0.5}),
        "dataset 'bad.jsonl': the labels in 'label' of its train split are",
    ),
    data(
        "a label that is not a number",
        parquet(sentence=["a", "b"], label=[0.0, float("nan")]),
        "dataset 'bad.parquet': the labels in 'label' of its train split are",
        "bad.parquet",
    ),
    data(
        "a label below 0",
        jsonl(*ROWS, {**ROWS[0], "label": -1}),
        "dataset 'bad.jsonl': its train split has the label -1 at row 5, outside",
    ),
    data(
        "a class number left out",
        jsonl(*ROWS, {**ROWS[0], "label": 3}),
        "dataset 'bad.jsonl': its train split has the label 3 at row 5, outside",
    ),
    data(
        "a huge label",
        jsonl(*ROWS, {**ROWS[0], "label": 2**62}),
        "dataset 'bad.jsonl': its train split has the label 4611686018427387904 at",
    ),
    data(
        "a label beyond 64 bits",
        jsonl(*ROWS, {**ROWS[0], "label": 2**80}),
        "dataset 'bad.jsonl': the labels in 'label' of its train split are",
    ),
    data(
        "one class alone",
        jsonl(*[row for row in ROWS if row["label"]]),
        "dataset 'bad.jsonl': every label of its train split is '1': there is nothing",
    ),
    data(
        "text labels with an empty one",
        "sentence,label\na,yes\nb,no\nc,  \n",
        "dataset 'bad.csv': its train split has no label at row 2, but ' '. Mend or",
        "bad.csv",
    ),
    data(
        "labels of both kinds",
        jsonl({**ROWS[0], "label": "yes"}, {**ROWS[1], "label": 1}),
        "dataset 'bad.jsonl': the label column 'label' holds Json(decode=True);",
    ),
    data(
        "labels that are lists",
        jsonl({**ROWS[0], "label": [0]}, {**ROWS[1], "label": [1]}),
        "dataset 'bad.jsonl': the labels in 'label' of its train split are",
    ),
    data(
        "labels that are objects",
        jsonl({**ROWS[0], "label": {"a": 0}}, {**ROWS[1], "label": {"a": 1}}),
        "dataset 'bad.jsonl': the label column 'label' holds {'a': Value('int64')};",
    ),
    data(
        "texts that are lists",
        jsonl({"sentence": ["a"], "label": 0}, {"sentence": ["b"], "label": 1}),
        "dataset 'bad.jsonl': which columns are the text? It has ['sentence',",
    ),
    data(
        "the same column twice",
        "sentence,sentence,label\na,b,0\nb,c,1\n",
        "dataset file 'bad.csv' cannot be read as .csv: column 'sentence' is there",
        "bad.csv",
    ),
    data(
        "the label column twice",
        "sentence,label,label\na,0,1\nb,1,0\n",
        "dataset file 'bad.csv' cannot be read as .csv: column 'label' is there 2",
        "bad.csv",
    ),
    data(
        "more classes than the model has",
        jsonl(*ROWS, {**ROWS[0], "label": 2}),
        "model 'model' has a head for 2 labels, and the data has 3: 0, 1, 2. Start",
    ),
    data(
        "a terminal escape among the labels",
        jsonl(*[{**ROWS[0], "label": name} for name in ("\x1b[2J", "a", " ")]),
        "dataset 'bad.jsonl': its train split has no label at row 2, but ' '. Mend",
    ),
    Entry(
        "a data file that is not there",
        f"{TRAIN} --dataset nowhere.jsonl",
        "dataset 'nowhere.jsonl': there is no such file or folder.",
    ),
    Entry(
        "a data folder that is not there",
        f"{TRAIN} --dataset ./nowhere",
        "dataset './nowhere': there is no such file or folder.",
    ),
    Entry(
        "a data folder without a split",
        f"{TRAIN} --dataset folder",
        "dataset folder 'folder' has no train.* of .jsonl, .json, .csv, .tsv,",
        {"folder/rows.jsonl": jsonl(*ROWS)},
    ),
    Entry(
        "a data folder without train",
        f"{TRAIN} --dataset folder",
        "dataset 'folder': no train split; it has test.",
        {"folder/test.jsonl": jsonl(*ROWS)},
    ),
    Entry(
        "one split twice",
        f"{TRAIN} --dataset data",
        "dataset folder: data/train.csv, data/train.jsonl are all its train split;",
        {"data/train.csv": CSV},
    ),
    Entry(
        "a validation label that train has not",
        TRAIN_ON,
        "dataset 'data': its validation split has the label 2 at row 0, outside",
        {"data/validation.jsonl": jsonl({**ROWS[0], "label": 2})},
    ),
    Entry(
        "a validation split without the text",
        TRAIN_ON,
        "dataset 'data': its validation split has no text column 'sentence1'; it",
        {"data/validation.jsonl": jsonl({"text": "a", "label": 0})},
    ),
    Entry("a data name that is empty", f"{TRAIN} --dataset ''", "dataset '': the name is empty."),
    Entry(
        "a data name that is no name",
        f"{TRAIN} --dataset a/b/c/d",
        "dataset 'a/b/c/d': there is no such file or folder, and it is no hub name.",
    ),
    Entry(
        "a data name with a password",
        f"{TRAIN} --dataset https://me:hunter2@host/rows.csv",
        "dataset 'https://***@host/rows.csv': there is no such file or folder.",
    ),
    Entry(
        "a corpus that is not in the cache",
        f"{TRAIN} --dataset no-owner/no-corpus",
        "dataset 'no-owner/no-corpus' is neither a local path nor readable from the",
    ),
    Entry(
        "a link that leads round",
        f"{TRAIN} --dataset loop.jsonl",
        "dataset 'loop.jsonl': there is no such file or folder.",
        {"loop.jsonl": link("loop.jsonl")},
    ),
]

MODELS = [
    Entry(
        "a model folder that is not there",
        "train --dataset data --output-dir out --model ./nowhere",
        "model './nowhere': there is no such checkpoint folder.",
    ),
    Entry(
        "a model folder without a configuration",
        "train --dataset data --output-dir out --model data",
        "model 'data': the folder has no config.json, so it is no checkpoint.",
    ),
    Entry(
        "a model that is a file",
        "train --dataset data --output-dir out --model ./data/train.jsonl",
        "model './data/train.jsonl': there is no such checkpoint folder.",
    ),
    Entry(
        "a model that is not in the cache",
        "train --dataset data --output-dir out --model no-owner/no-model",
        "model 'no-owner/no-model' is no local folder and cannot be loaded as",
    ),
    Entry(
        "a model name that is empty",
        "train --dataset data --output-dir out --model ''",
        "model '': the name is empty.",
    ),
    Entry(
        "a model name that climbs",
        "train --dataset data --output-dir out --model a/../../b",
        "model 'a/../../b' is no local folder and cannot be loaded as",
    ),
    Entry(
        "a configuration that is no JSON",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoTokenizer: It looks like the config",
        {"model/config.json": "{"},
    ),
    Entry(
        "a configuration that is a list",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoTokenizer:",
        {"model/config.json": "[]"},
    ),
    Entry(
        "a configuration of no known kind",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoConfig: The checkpoint you are",
        {"model/config.json": '{"model_type": "brt"}'},
    ),
    Entry(
        "a configuration that asks for its own code",
        TRAIN_ON,
        "model 'model' comes with code of its own, which is not run. Load it in a",
        {
            "model/config.json": json.dumps(
                {
                    "model_type": "own",
                    "auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"},
                }
            ),
            "model/own.py": "open('was_run', 'w')\n",
        },
    ),
    Entry(
        "weights that break off",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoModelForSequenceClassification:",
        {"model/model.safetensors": b"\x10\0\0\0\0\0\0\0{"},
    ),
    Entry(
        "weights that are text",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoModelForSequenceClassification:",
        {"model/model.safetensors": "not weights"},
    ),
    Entry(
        "no weights",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoModelForSequenceClassification:",
        {"model/model.safetensors": without},
    ),
    Entry(
        "no tokenizer",
        TRAIN_ON,
        "model 'model' has no vocabulary: save its tokenizer into the same folder.",
        {"model/tokenizer.json": without, "model/tokenizer_config.json": without},
    ),
    Entry(
        "a tokenizer that is no JSON",
        TRAIN_ON,
        "model 'model' cannot be loaded as AutoTokenizer: Expecting property name",
        {"model/tokenizer.json": "{"},
    ),
    Entry(
        "weights that are a harmful pickle",
        TRAIN_ON,
        "model 'model': its weights are a pickle that does more than hold tensors.",
        {"model/model.safetensors": without, "model/pytorch_model.bin": b"cos\nsystem\n(S'touch was_run'\ntR."},
    ),
    Entry(
        "texts longer than the model reads",
        f"{TRAIN} --dataset long.jsonl",
        "model 'model' reads 16 tokens, and dataset 'long.jsonl' has a row of 40.",
        {"long.jsonl": jsonl({"sentence": "a " * 40, "label": 0}, {"sentence": "b", "label": 1})},
    ),
]

OPTIONS = [
    Entry(
        "an option that is misspelt",
        f"{TRAIN_ON} --lerning-rate 1",
        "--lerning-rate is not an option; did you mean --learning-rate?",
    ),
    Entry("an option of nothing", f"{TRAIN_ON} --frobnicate", "--frobnicate is not an option"),
    Entry("a word too many", f"{TRAIN_ON} stray", "stray is not an option"),
    Entry("a command that is not there", "trian", "No such command 'trian'. Did you mean 'train'?"),
    Entry(
        "a number that is text",
        f"{TRAIN_ON} --epochs many",
        "Invalid value for '--epochs': Input should be a valid number, unable to",
    ),
    Entry(
        "a number with a comma",
        f"{TRAIN_ON} --weight-decay 0,01",
        "argument --weight_decay/--weight-decay: invalid float value: '0,01'",
    ),
    Entry("an option without its value", f"{TRAIN_ON} --loss", "Option '--loss' requires an argument."),
    Entry(
        "one option by two names",
        f"{TRAIN_ON} --epochs 1 --num-train-epochs 2",
        "--epochs and --num-train-epochs are both given.",
    ),
    Entry(
        "a learning rate that is not a number",
        f"{TRAIN_ON} --learning-rate nan",
        "learning_rate=nan must be a finite number, 0 or more",
    ),
    Entry(
        "a learning rate below 0",
        f"{TRAIN_ON} --learning-rate=-1",
        "learning_rate=-1.0 must be a finite number, 0 or more",
    ),
    Entry(
        "no batch",
        f"{TRAIN_ON} --batch-size 0",
        "Invalid value for '--batch-size': Input should be greater than or equal to",
    ),
    Entry(
        "no accumulation",
        f"{TRAIN_ON} --accumulation 0",
        "Invalid value for '--accumulation': Input should be greater than or equal",
    ),
    Entry(
        "epochs below 0",
        f"{TRAIN_ON} --epochs=-1",
        "num_train_epochs=-1.0 must be 0 or more where max_steps is not given",
    ),
    Entry("a seed below 0", f"{TRAIN_ON} --seed=-1", "seed=-1 must lie in 0..2**32 - 1"),
    Entry(
        "a seed that is too large",
        f"{TRAIN_ON} --seed 99999999999999999999",
        "seed=99999999999999999999 must lie in 0..2**32 - 1",
    ),
    Entry(
        "a length without room for text",
        f"{TRAIN_ON} --max-length 0",
        "max_length=0 leaves no room for text: 0 tokens of every row are special.",
    ),
    Entry(
        "a loss that is misspelt",
        f"{TRAIN_ON} --loss dise",
        "loss 'dise' is not known. Choices: asymmetric, bce, cross_entropy, focal,",
    ),
    Entry(
        "a loss that cannot be imported",
        f"{TRAIN_ON} --loss nowhere.loss",
        "loss 'nowhere.loss': cannot import it (ModuleNotFoundError: No module",
    ),
    Entry(
        "a loss that a module does not have",
        f"{TRAIN_ON} --loss math:dice",
        "loss 'math:dice': cannot import it (AttributeError: module 'math' has no",
    ),
    Entry(
        "a loss that is none",
        f"{TRAIN_ON} --loss math:pi",
        "loss 'math:pi' is not usable: a loss is called as loss(logits, labels, *,",
    ),
    Entry(
        "an import path that is no path",
        f"{TRAIN_ON} --loss ..",
        "loss '..': cannot import it (TypeError: the 'package' argument is required",
    ),
    Entry(
        "a module that fails while it is imported",
        f"{TRAIN_ON} --loss broken_on_import:loss",
        "loss 'broken_on_import:loss': cannot import it (ZeroDivisionError:",
        {"broken_on_import.py": "1 / 0\n"},
    ),
    Entry(
        "a module that is no Python",
        f"{TRAIN_ON} --loss no_python_at_all:loss",
        "loss 'no_python_at_all:loss': cannot import it (SyntaxError: invalid",
        {"no_python_at_all.py": "def\n"},
    ),
    Entry(
        "a sum of losses that is no JSON",
        f"{TRAIN_ON} --loss '{{focal: 1}}'",
        "loss='{focal: 1}' is not valid JSON: Expecting property name enclosed in",
    ),
    Entry(
        "a sum of losses with a weight that is text",
        f'{TRAIN_ON} --loss \'{{"focal": "x"}}\'',
        "a sum of losses with weights {'focal': 'x'}: a weight is a finite number.",
    ),
    Entry(
        "options of a loss that are no JSON",
        f"{TRAIN_ON} --loss focal --loss-kwargs gamma=2",
        "loss_kwargs='gamma=2' must be a dict, or a JSON object on the command line",
    ),
    Entry(
        "an option that a loss has not",
        f"{TRAIN_ON} --loss focal --loss-kwargs '{{\"gama\": 2}}'",
        "loss_kwargs={'gama': 2} do not fit the loss: Focal.__call__() got an",
    ),
    Entry(
        "a loss for other labels",
        f"{TRAIN_ON} --loss bce --disable-tqdm true",
        "labels of shape (8,) for logits of shape (8, 2): the loss needs one for",
    ),
    Entry(
        "class weights by a name that is not known",
        f"{TRAIN_ON} --class-weights balance",
        "class_weights='balance' is not known. Choices: balanced, effective_number,",
    ),
    Entry(
        "too many class weights",
        f"{TRAIN_ON} --class-weights '[1, 2, 3]'",
        "class_weights has 3 weights [1, 2, 3]; the model has 2 labels.",
    ),
    Entry(
        "a class weight that is not a number",
        f"{TRAIN_ON} --class-weights '[1, NaN]'",
        "class_weights[1] is nan: a weight is a finite number (of float32), 0 or",
    ),
    Entry(
        "a class weight below 0",
        f"{TRAIN_ON} --class-weights '[1, -1]'",
        "class_weights[1] is -1: a weight is a finite number (of float32), 0 or",
    ),
    Entry(
        "class weights that are text",
        f"{TRAIN_ON} --class-weights '[1, \"x\"]'",
        "class_weights=[1, 'x'] must be numbers: could not convert string to float:",
    ),
    Entry(
        "a class weight for no class",
        f"{TRAIN_ON} --class-weights '{{\"7\": 2}}'",
        "class_weights names the label '7'; the labels are 0, 1.",
    ),
    Entry(
        "class weights that break off",
        f"{TRAIN_ON} --class-weights '[1, 2'",
        "class_weights='[1, 2' is not valid JSON: Expecting ',' delimiter: line 1",
    ),
    Entry(
        "class weights that are all 0",
        f"{TRAIN_ON} --class-weights '[0, 0]'",
        "class_weights=[0, 0]: all weights are 0, so that nothing would be learnt.",
    ),
    Entry(
        "a reduction that is not known",
        f"{TRAIN_ON} --loss-reduction sum",
        "loss_reduction='sum' must be one of weighted_mean, mean",
    ),
    Entry(
        "an optimizer that is misspelt",
        f"{TRAIN_ON} --optim adamv",
        "optim='adamv' is not known; choose a name of transformers, muon, or an",
    ),
    Entry(
        "an optimizer that cannot be imported",
        f"{TRAIN_ON} --optim nowhere.Adam",
        "optim 'nowhere.Adam': cannot import it (ModuleNotFoundError: No module",
    ),
    Entry("an optimizer that is none", f"{TRAIN_ON} --optim math.pi", "optim='math.pi' is no torch.optim.Optimizer"),
    Entry(
        "an option that an optimizer has not",
        f"{TRAIN_ON} --optim torch.optim.NAdam --optim-args momentun=1",
        "optim_args: NAdam has no momentun; it takes lr, betas, eps, weight_decay,",
    ),
    Entry(
        "a schedule that is misspelt",
        f"{TRAIN_ON} --lr-scheduler-type cosin",
        "lr_scheduler_type='cosin' must be one of linear, cosine,",
    ),
    Entry(
        "an option that a schedule has not",
        f"{TRAIN_ON} --lr-scheduler-type one_cycle --lr-scheduler-kwargs '{{\"x\": 1}}'",
        "lr_scheduler_kwargs: x=1: one_cycle takes pct_start, anneal_strategy,",
    ),
    Entry(
        "options of a schedule that are no JSON",
        f"{TRAIN_ON} --lr-scheduler-kwargs '{{x'",
        "lr_scheduler_kwargs='{x' cannot be read as JSON: Expecting property name",
    ),
    Entry(
        "a decay above 1",
        f"{TRAIN_ON} --layerwise-lr-decay 2",
        "layerwise_lr_decay=2.0 must be above 0 and at most 1 (1 is off)",
    ),
    Entry(
        "a multiplier of a head below 0",
        f"{TRAIN_ON} --head-lr-multiplier=-1",
        "head_lr_multiplier=-1.0 must be a finite number above 0",
    ),
    Entry(
        "a pattern that freezes nothing",
        f"{TRAIN_ON} --freeze 'bertt.*'",
        "freeze: 'bertt.*' matches no parameter of BertForSequenceClassification",
    ),
    Entry(
        "layers that are not there", f"{TRAIN_ON} --freeze layers:9", "freeze: 'layers:9' is more than the 1 layers of"
    ),
    Entry(
        "rules that are no JSON",
        f"{TRAIN_ON} --param-group-rules '[{{'",
        "param_group_rules is not valid JSON: Expecting property name enclosed in",
    ),
    Entry(
        "rules in a file that is not there",
        f"{TRAIN_ON} --param-group-rules rules.json",
        "param_group_rules='rules.json' is neither JSON nor a file.",
    ),
    Entry(
        "a rule that matches nothing",
        f'{TRAIN_ON} --param-group-rules \'[{{"match": "x", "weight_decay": 0}}]\'',
        'param_group_rules: rule_1 {"match": "x", "weight_decay": 0} matches no',
    ),
    Entry(
        "a rule with a condition that is not known",
        f'{TRAIN_ON} --param-group-rules \'[{{"mtch": "*", "weight_decay": 0}}]\'',
        "param_group_rules[0]: 'mtch' is no key of a rule; choose from match,",
    ),
    Entry(
        "a column of weights that is not there",
        f"{TRAIN_ON} --sample-weight-column w --disable-tqdm true",
        "sample_weight_column='w': the batch has no such column (it has labels,",
    ),
    Entry(
        "a metric that is not given",
        f"{TRAIN_ON} --metric-for-best-model aurok",
        "metric_for_best_model=aurok: choose one of loss, accuracy,",
    ),
    Entry(
        "an evaluation strategy that is misspelt",
        f"{TRAIN_ON} --eval-strategy sometimes",
        "argument --eval_strategy/--eval-strategy: invalid choice: 'sometimes'",
    ),
    Entry(
        "the best model without evaluations",
        f"{TRAIN_ON} --load-best-model-at-end",
        "--load_best_model_at_end requires the save and eval strategy to match,",
    ),
    Entry(
        "a reporter that is not installed",
        f"{TRAIN_ON} --report-to weights_and_bases",
        "weights_and_bases is not supported, only azure_ml, comet_ml, mlflow,",
    ),
    Entry(
        "half precision that the machine has not",
        f"{TRAIN_ON} --use-cpu --fp16 --bf16",
        "At most one of fp16 and bf16 can be True, but not both",
    ),
    Entry(
        "FSDP without a launcher",
        f"{TRAIN_ON} --fsdp full_shard",
        "FSDP is asked for and there is no accelerator: accelerate would train",
    ),
    Entry(
        "FSDP with a word that is not known",
        f"{TRAIN_ON} --fsdp fullshard",
        "FSDP is asked for and there is no accelerator: accelerate would train",
    ),
    Entry(
        "an FSDP config that is not there",
        f"{TRAIN_ON} --fsdp full_shard --fsdp-config nowhere.json",
        "FSDP is asked for and there is no accelerator: accelerate would train",
    ),
    Entry(
        "an FSDP config that is no JSON",
        f"{TRAIN_ON} --fsdp full_shard --fsdp-config bad.json",
        "FSDP is asked for and there is no accelerator: accelerate would train",
        {"bad.json": "{"},
    ),
    Entry(
        "a DeepSpeed config that is not there",
        f"{TRAIN_ON} --deepspeed nowhere.json",
        "deepspeed='nowhere.json' cannot be read as JSON: No such file or directory",
    ),
    Entry(
        "a DeepSpeed config that is no JSON",
        f"{TRAIN_ON} --deepspeed bad.json",
        "deepspeed='bad.json' cannot be read as JSON: Expecting property name",
        {"bad.json": "{zero: 3}"},
    ),
    Entry(
        "a DeepSpeed config that is a list",
        f"{TRAIN_ON} --deepspeed bad.json",
        "deepspeed='bad.json' is no JSON object, but list",
        {"bad.json": "[]"},
    ),
    Entry(
        "an accelerator config that is not there",
        f"{TRAIN_ON} --accelerator-config nowhere.json",
        "accelerator_config='nowhere.json' cannot be read as JSON: No such file or",
    ),
    Entry(
        "a log level that is not known",
        f"{TRAIN_ON} --log-level loud",
        "argument --log_level/--log-level: invalid choice: 'loud' (choose from",
    ),
    Entry(
        "the output folder is a file",
        "train --dataset data --model model --output-dir file",
        "output_dir file is a file; name a folder.",
        {"file": "x"},
    ),
    Entry(
        "the output folder lies in a file",
        "train --dataset data --model model --output-dir file/out",
        "output_dir file/out cannot be made: Not a directory. Name another folder.",
        {"file": "x"},
    ),
    Entry(
        "the output folder cannot be made",
        "train --dataset data --model model --output-dir /proc/out",
        "output_dir /proc/out cannot be made: No such file or directory. Name",
    ),
    Entry(
        "the output folder's name is too long",
        f"train --dataset data --model model --output-dir {'x' * 300}",
        "output_dir",
    ),
    Entry(
        "a link in the output folder leads out",
        TRAIN_ON,
        "out/all_results.json is a link to ../elsewhere.json, and what is written",
        {"out/all_results.json": link("../elsewhere.json")},
    ),
    Entry(
        "drop what is all there is",
        f"{TRAIN_ON} --batch-size 64 --dataloader-drop-last true",
        "20 training rows are less than one batch of 64, and",
    ),
]

RESUMED = [
    Entry(
        "no checkpoint to go on from",
        f"{TRAIN_ON} --resume-from-checkpoint true",
        "resume_from_checkpoint=true: there is no checkpoint in out.",
    ),
    Entry(
        "a checkpoint that is not there",
        f"{TRAIN_ON} --resume-from-checkpoint run/checkpoint-9",
        "resume_from_checkpoint=run/checkpoint-9: that is no checkpoint folder (it",
    ),
    Entry(
        "a checkpoint that is none",
        f"{TRAIN_ON} --resume-from-checkpoint data",
        "resume_from_checkpoint=data: that is no checkpoint folder (it has no",
    ),
    Entry(
        "a checkpoint that changed",
        f"{TRAIN_ON} --resume-from-checkpoint run/checkpoint-2",
        "run/checkpoint-2 is not as it was saved: model.safetensors has 3 bytes,",
        {"run/checkpoint-2/model.safetensors": "rot"},
    ),
    Entry(
        "a checkpoint with a file missing",
        f"{TRAIN_ON} --resume-from-checkpoint run/checkpoint-2",
        "run/checkpoint-2 is not as it was saved: optimizer.pt is missing. Where",
        {"run/checkpoint-2/optimizer.pt": without},
    ),
    Entry(
        "a manifest that breaks off",
        f"{TRAIN_ON} --resume-from-checkpoint run/checkpoint-2",
        "run/checkpoint-2 is not as it was saved: manifest.json is damaged",
        {"run/checkpoint-2/manifest.json": '{"version": 1, '},
    ),
    Entry(
        "no checkpoint of a run is good",
        f"{TRAIN_ON.replace('dir out', 'dir run')} --resume-from-checkpoint true",
        "No checkpoint in run is as it was saved. checkpoint-2: scheduler.pt has 3",
        {"run/checkpoint-2/scheduler.pt": "rot"},
    ),
    Entry(
        "another loss than the checkpoint's",
        f"{TRAIN_ON} --resume-from-checkpoint run/checkpoint-2 --loss focal",
        "run/checkpoint-2 was trained with another loss (loss: CrossEntropy, now",
    ),
    Entry(
        "a checkpoint with a harmful pickle",
        f"{TRAIN_ON} --resume-from-checkpoint bad/checkpoint-2",
        "bad/checkpoint-2 is not loaded: bad/checkpoint-2/optimizer.pt is not what",
        {
            "bad/checkpoint-2/trainer_state.json": "{}",
            "bad/checkpoint-2/optimizer.pt": b"cos\nsystem\n(S'touch was_run'\ntR.",
        },
    ),
    Entry("verify what is not there", "verify nowhere", "nowhere: there is no such folder."),
    Entry(
        "verify what is no run", "verify data", "data is no checkpoint (it has no manifest.json), and has no folder"
    ),
    Entry("verify a file", "verify data/train.jsonl", "data/train.jsonl: there is no such folder."),
    Entry("accept a whole run", "verify --accept run", "--accept is for one checkpoint, and run has 1: name it."),
    Entry("export what is not there", "export nowhere exported", "nowhere: there is no such checkpoint folder."),
    Entry(
        "export into the checkpoint",
        "export run/checkpoint-2 run/checkpoint-2/exported",
        "run/checkpoint-2/exported and the checkpoint run/checkpoint-2 lie in one",
    ),
    Entry(
        "export into a folder with other files",
        "export run/checkpoint-2 data",
        "data holds other files than an export's; name a new folder, or empty this",
    ),
    Entry(
        "export over a file",
        "export run/checkpoint-2 file",
        "file is a file or a link; name a folder to write.",
        {"file": "x"},
    ),
    Entry(
        "export through a link",
        "export run/checkpoint-2 linked",
        "linked is a file or a link; name a folder to write.",
        {"linked": link("data")},
    ),
    Entry(
        "export a folder without weights",
        "export data exported",
        "data has no config.json, by which the model is built. Give --model FOLDER",
    ),
    Entry(
        "export a checkpoint that changed",
        "export run/checkpoint-2 exported",
        "run/checkpoint-2 is not as it was saved: config.json has 2 bytes, and was",
        {"run/checkpoint-2/config.json": "{}"},
    ),
    Entry(
        "export averages that are not there",
        "export run/checkpoint-2 exported --averages",
        "run/checkpoint-2 has no ema.safetensors: it was trained without",
    ),
    Entry(
        "a size that is none",
        "export run/checkpoint-2 exported --max-shard-size big",
        "max_shard_size='big' is no size of a file; write one such as 200MB or 5GB.",
    ),
    Entry(
        "a size of 0",
        "export run/checkpoint-2 exported --max-shard-size 0MB",
        "max_shard_size='0MB' is no size of a file; write one such as 200MB or 5GB.",
    ),
    Entry(
        "a description that is not there",
        "export run/checkpoint-2 exported --model nowhere",
        "nowhere has no config.json, by which the model is built. Give --model",
    ),
    Entry(
        "export a harmful pickle",
        "export other exported",
        "other/pytorch_model.bin is not what torch.save writes (a zip archive with",
        {
            "other/config.json": '{"architectures": ["Own"], "model_type": "bert"}',
            "other/trainer_state.json": "{}",
            "other/pytorch_model.bin": b"cos\nsystem\n(S'touch was_run'\ntR.",
        },
    ),
    Entry(
        "an index that climbs",
        "export other exported",
        "other/model.safetensors.index.json names '../model/model.safetensors',",
        {
            "other/config.json": "{}",
            "other/trainer_state.json": "{}",
            "other/model.safetensors.index.json": '{"weight_map": {"w": "../model/model.safetensors"}}',
        },
    ),
    Entry(
        "an index that is no index",
        "export other exported",
        "other/model.safetensors.index.json is no index of weights: TypeError: list",
        {"other/config.json": "{}", "other/trainer_state.json": "{}", "other/model.safetensors.index.json": "[]"},
    ),
    Entry(
        "DeepSpeed's latest that climbs",
        "export other exported",
        "other is not loaded: other/latest names '../run', which is no folder",
        {"other/config.json": "{}", "other/trainer_state.json": "{}", "other/latest": "../run"},
    ),
]

PARITIES = [
    Entry(
        "a mode that is misspelt",
        f"{PARITY} --modes sngle",
        "mode 'sngle' is not known. Choices: single, gaN, ragged, ddpN, zero0,",
    ),
    Entry("no mode", f"{PARITY} --modes ,", "--modes names no mode."),
    Entry(
        "a batch that a mode cannot split",
        f"{PARITY} --modes ga4 --batch-size 6",
        "mode 'ga4' splits the batch of a step into 4 micro-batches, and batch size",
    ),
    Entry(
        "one process for several",
        f"{PARITY} --modes ddp --processes 1",
        "Invalid value for '--processes': Input should be greater than or equal to",
    ),
    Entry("a dtype that is not compared", f"{PARITY} --dtype float16", "--dtype float16: choose float32 or float64."),
    Entry(
        "what the reference has not",
        f"{PARITY} --lr-scheduler-type cosine",
        "the manual loop, the reference, does not implement",
    ),
    Entry(
        "a calibration that is not there",
        f"{PARITY} --calibration nowhere.json",
        "calibration nowhere.json: No such file or directory.",
    ),
    Entry(
        "a calibration that is no JSON",
        f"{PARITY} --calibration bad.json",
        "calibration bad.json: Expecting property name enclosed in double quotes:",
        {"bad.json": "{"},
    ),
    Entry(
        "a calibration that is something else",
        f"{PARITY} --calibration bad.json",
        "calibration bad.json: it is not what `trainer-ext parity calibrate` writes.",
        {"bad.json": "[]"},
    ),
    Entry(
        "a calibration without numbers",
        f"{PARITY} --calibration bad.json",
        "calibration bad.json: it is not what `trainer-ext parity calibrate` writes.",
        {"bad.json": '{"multiple": 10, "tolerance": {"relative": "x", "weights": 1}}'},
    ),
    Entry(
        "a calibration that holds nothing to anything",
        f"{PARITY} --calibration bad.json",
        "calibration bad.json: it is not what `trainer-ext parity calibrate` writes.",
        {"bad.json": '{"multiple": 10, "tolerance": {"relative": NaN, "weights": Infinity}}'},
    ),
    Entry(
        "two dtypes to calibrate",
        "parity calibrate --model model --dataset data --output-dir out --dtype float32,float64",
        "--dtype float32,float64: noise is measured in one, float32 or float64.",
    ),
    Entry(
        "the manual loop with a schedule of its own",
        f"{MANUAL} --lr-scheduler-type cosine",
        "the manual loop, the reference, does not implement",
    ),
    Entry(
        "the manual loop with a loss of its own",
        f"{MANUAL} --loss focal",
        "the manual loop, the reference, does not implement loss=focal",
    ),
    Entry(
        "a record that is not there",
        "parity compare nowhere trainer",
        "nowhere has no trajectory.jsonl: it is not a record of `trainer-ext",
    ),
    Entry(
        "a record of nothing",
        "parity compare bad trainer",
        "bad: its schema is None; this version reads 3. Record the run again.",
        {"bad/trajectory.jsonl": ""},
    ),
    Entry(
        "a record of another version",
        "parity compare bad trainer",
        "bad: its schema is 1; this version reads 3. Record the run again.",
        {"bad/trajectory.jsonl": '{"schema": 1}\n'},
    ),
    Entry(
        "a record that is no object",
        "parity compare bad trainer",
        "bad: its schema is None; this version reads 3. Record the run again.",
        {"bad/trajectory.jsonl": "[]\n"},
    ),
    Entry(
        "a record with a line of no kind",
        "parity compare bad trainer",
        "bad: a line is not what a recorder writes (KeyError: 'no'). Record the run",
        {"bad/trajectory.jsonl": '{"schema": 3, "path": "x"}\n{"kind": "no"}\n'},
    ),
    Entry(
        "a record whose weights broke",
        "parity compare manual trainer",
        "manual/weights.safetensors cannot be read: Error while deserializing",
        {"manual/weights.safetensors": "rot"},
    ),
    Entry(
        "a tolerance that is none",
        "parity compare manual trainer --tolerance close",
        "--tolerance close: give bitwise, a number from 0, or a calibration.json.",
    ),
    Entry(
        "a tolerance below 0",
        "parity compare manual trainer --tolerance=-1",
        "--tolerance -1: give bitwise, a number from 0, or a calibration.json.",
    ),
    Entry(
        "a tolerance in a file that is not there",
        "parity compare manual trainer --tolerance nowhere.json",
        "calibration nowhere.json: No such file or directory.",
    ),
    Entry(
        "a report into a file",
        "parity compare manual trainer --output-dir file",
        "output_dir file is a file; name a folder.",
        {"file": "x"},
    ),
    Entry(
        "record nothing",
        "parity record --output new",
        "no command is given. Put it after `--`, as in `-- torchrun script.py ...`.",
    ),
    Entry(
        "record a program that is no launch",
        "parity record --output new -- bash script.sh",
        "'bash' is no launcher that is known. Begin the command with deepspeed,",
    ),
    Entry(
        "record over a record",
        "parity record --output manual -- python script.py",
        "--output manual is taken: name a new folder, or pass --resumed where the",
        {"script.py": ""},
    ),
    Entry(
        "go on with no record",
        "parity record --output new --resumed -- python script.py",
        "--resumed: new has no trajectory.jsonl to go on with.",
        {"script.py": ""},
    ),
    Entry(
        "record a script that is not there",
        "parity record --output new -- python nowhere.py",
        "there is no script 'nowhere.py' in HERE.",
    ),
]

OTHERS = [
    Entry(
        "rehearse nothing", "rehearse", "no command is given. Put it after `--`, as in `-- torchrun script.py ...`."
    ),
    Entry(
        "rehearse a program that is no launch",
        "rehearse -- bash script.sh",
        "'bash' is no launcher that is known. Begin the command with deepspeed,",
    ),
    Entry(
        "rehearse python alone",
        "rehearse -- python",
        "'python ' names no script: give one, or -m MODULE, without options of",
    ),
    Entry(
        "rehearse a script that is not there",
        "rehearse --processes 1 -- python nowhere.py",
        "there is no script 'nowhere.py' in HERE.",
    ),
    Entry(
        "one step",
        "rehearse --steps 1 -- torchrun script.py",
        "Invalid value for '--steps': Input should be greater than or equal to 2.",
    ),
    Entry(
        "no processes",
        "rehearse --processes 0 -- torchrun script.py",
        "Invalid value for '--processes': Input should be greater than or equal to",
    ),
    Entry(
        "two processes of python",
        "rehearse --processes 2 -- python script.py",
        "python starts one process, and 2 are asked for: begin the command with",
        {"script.py": ""},
    ),
    Entry(
        "no time",
        "rehearse --timeout 0 -- torchrun script.py",
        "Invalid value for '--timeout': Input should be greater than or equal to 1.",
        {"script.py": ""},
    ),
    Entry(
        "an accelerate config that is not there",
        "rehearse -- accelerate launch --config_file nowhere.yaml script.py",
        "The passed configuration file `nowhere.yaml` does not exist. Please pass",
        {"script.py": ""},
    ),
    Entry(
        "an accelerate config that is no YAML",
        "rehearse -- accelerate launch --config_file bad.yaml script.py",
        "accelerate.commands.launch cannot read the config of '--config_file",
        {"script.py": "", "bad.yaml": "a: [1,"},
    ),
    Entry(
        "an accelerate config that is a list",
        "rehearse -- accelerate launch --config_file bad.yaml script.py",
        "accelerate.commands.launch cannot read the config of '--config_file",
        {"script.py": "", "bad.yaml": "- 1\n"},
    ),
    Entry(
        "an accelerate config with a key that is not known",
        "rehearse -- accelerate launch --config_file bad.yaml script.py",
        "The config file at bad.yaml had unknown keys (['fsdp_cofig']), please try",
        {"script.py": "", "bad.yaml": "distributed_type: FSDP\nfsdp_cofig: {}\n"},
    ),
    Entry(
        "an accelerate config that runs code",
        "rehearse -- accelerate launch --config_file bad.yaml script.py",
        "accelerate.commands.launch cannot read the config of '--config_file",
        {"script.py": "", "bad.yaml": "a: !!python/object/apply:os.system ['touch was_run']\n"},
    ),
    Entry(
        "an accelerate config that is empty",
        "rehearse -- accelerate launch --config_file bad.yaml script.py",
        "accelerate.commands.launch cannot read the config of '--config_file",
        {"script.py": "", "bad.yaml": ""},
    ),
    Entry(
        "a DeepSpeed config of a script that is not there",
        "rehearse -- deepspeed script.py --deepspeed nowhere.json",
        "DeepSpeed config nowhere.json: [Errno 2] No such file or directory:",
        {"script.py": ""},
    ),
    Entry(
        "a DeepSpeed config of a script that is no JSON",
        "rehearse -- deepspeed script.py --deepspeed bad.json",
        "DeepSpeed config bad.json: Expecting property name enclosed in double",
        {"script.py": "", "bad.json": "{"},
    ),
    Entry(
        "a DeepSpeed config of a script with a list",
        "rehearse -- deepspeed script.py --deepspeed bad.json",
        "DeepSpeed config bad.json: it, or its zero_optimization, is no JSON object.",
        {"script.py": "", "bad.json": '{"zero_optimization": []}'},
    ),
    Entry(
        "a stage that is text",
        "rehearse -- deepspeed script.py --deepspeed bad.json",
        "DeepSpeed config bad.json: zero_optimization.stage is 'three'; choose one",
        {"script.py": "", "bad.json": '{"zero_optimization": {"stage": "three"}}'},
    ),
    Entry(
        "the CPU by accelerate's own word",
        "rehearse -- accelerate launch --cpu script.py",
        "--cpu has `accelerate launch` drop DeepSpeed and FSDP: leave it out; a",
        {"script.py": ""},
    ),
    Entry(
        "hosts kept of deepspeed",
        "rehearse --keep-hosts -- deepspeed script.py",
        "--keep-hosts rehearses one host's part, and deepspeed starts every host",
        {"script.py": ""},
    ),
    Entry(
        "the groups of no model",
        "groups nowhere/model",
        "model 'nowhere/model' has no configuration that can be read: We couldn't",
    ),
    Entry(
        "the groups of a file that is no configuration",
        "groups bad.json",
        "model 'bad.json' has no configuration that can be read: It looks like the",
        {"bad.json": "{"},
    ),
    Entry(
        "the groups of a list",
        "groups bad.json",
        "model 'bad.json' has no configuration that can be read: Unrecognized model",
        {"bad.json": "[]"},
    ),
    Entry(
        "the groups of a model of no class",
        "groups model --model-class BertForNothing",
        "'BertForNothing' is no model of transformers; name one such as",
    ),
    Entry(
        "the groups of a class that is no model",
        "groups model --model-class BertConfig",
        "'BertConfig' is no model of transformers; name one such as",
    ),
    Entry(
        "the groups with a decay of 0",
        "groups model --layerwise-lr-decay 0",
        "layerwise_lr_decay=0.0 must be above 0 and at most 1 (1 is off)",
    ),
    Entry(
        "the groups with a pattern of nothing",
        "groups model --freeze nothing.*",
        "freeze: 'nothing.*' matches no parameter of BertForSequenceClassification",
    ),
    Entry(
        "the groups of a configuration with numbers that cannot be",
        "groups bad.json",
        "model 'bad.json' cannot be made as BertModel: Trying to create tensor with",
        {"bad.json": '{"model_type": "bert", "hidden_size": -5, "architectures": ["BertModel"]}'},
    ),
    Entry("a schedule of no name", "schedule cosin", "lr_scheduler_type='cosin' must be one of linear, cosine,"),
    Entry(
        "a schedule of no steps",
        "schedule linear --steps 0",
        "Invalid value for '--steps': Input should be greater than or equal to 1.",
    ),
    Entry(
        "a schedule of a metric",
        "schedule reduce_lr_on_plateau",
        "reduce_lr_on_plateau follows a metric, so that its course is not known",
    ),
    Entry(
        "an option without a value",
        "schedule one_cycle --option pct_start",
        "--option pct_start: write key=value, such as num_cycles=2.",
    ),
    Entry(
        "an option of another kind",
        "schedule cosine --option num_cycles=many",
        "lr_scheduler_kwargs: num_cycles='many' must be a number",
    ),
    Entry(
        "a picture of no kind", "schedule linear --plot curve.txt", "--plot curve.txt must end in .svg, .png, .pdf."
    ),
    Entry(
        "a picture into no folder",
        "schedule linear --plot nowhere/curve.svg",
        "--plot nowhere/curve.svg: there is no folder nowhere; make it, or name",
    ),
    Entry(
        "a config of no name",
        "configs zero9",
        "config 'zero9' is not known. Choices: ddp, ddp_multinode, deepspeed_zero2,",
    ),
]

ENTRIES = [*DATA, *MODELS, *OPTIONS, *RESUMED, *PARITIES, *OTHERS]
