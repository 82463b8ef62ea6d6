"""The source of the package, its examples, benchmarks and tests: nothing in it unpickles, evaluates text, or runs code that
comes with a model or a file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("trainer_ext", "examples", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# Calls by the end of their dotted name, and what makes them safe.
FORBIDDEN = {
    "pickle.load", "pickle.loads", "cPickle.load", "cPickle.loads", "dill.load", "dill.loads", "cloudpickle.load",
    "cloudpickle.loads", "joblib.load", "pandas.read_pickle", "pd.read_pickle", "marshal.load", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval",
    "exec", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip
# Tests that make the attacks, and those of what others pickle: what each of them needs.
MEANT = {
    "tests/checkpoints/engines_run.py": {"os.system"},
    "tests/checkpoints/test_trusted.py": {"os.system", "pickle.loads", "torch.load"},
    "tests/optim/test_schedules.py": {"pickle.loads", "torch.load"},
}
# What a name must be told, and where an unpickler of its own stands, which makes empty classes and nothing else.
UNPICKLER = "trainer_ext/checkpoints/inert.py"


def dotted(node):
    """`a.b.c` of an attribute, or `a` of a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def unsafe(source, file="a.py"):
    """What a module does that could run what it reads, by line."""
    found, renamed = [], {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            renamed |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            renamed |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, point, rest = dotted(node).partition(".")
            name = f"{renamed.get(first, first)}{point}{rest}"
            if name in FORBIDDEN:
                found.append((node.lineno, name))
            if name in ("pickle.Unpickler", "pickle._Unpickler") and file != UNPICKLER:
                found.append((node.lineno, name))
        if isinstance(node, ast.Call):
            told = {keyword.arg: keyword.value for keyword in node.keywords}
            first, point, rest = dotted(node.func).partition(".")
            name = f"{renamed.get(first, first)}{point}{rest}"
            if name == "torch.load" and not is_true(told.get("weights_only")):
                found.append((node.lineno, name))
            if name.endswith("np.load") and is_true(told.get("allow_pickle")):
                found.append((node.lineno, name))
            remote = told.get("trust_remote_code")
            asks = name.endswith(".from_pretrained") and name.split(".")[-2].lower().startswith("auto")
            if asks and remote is None and file.startswith("trainer_ext"):  # transformers asks whoever sits there
                found.append((node.lineno, "trust_remote_code"))
            if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
                found.append((node.lineno, "trust_remote_code"))
            if name.startswith("subprocess.") and is_true(told.get("shell")):
                found.append((node.lineno, "shell=True"))
    return sorted(set(found))


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def test_the_package_has_sources():
    assert len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_run_that_is_read(path):
    file = str(path.relative_to(ROOT))
    assert {name for _, name in unsafe(path.read_text(), file)} == MEANT.get(file, set())


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "pickle.load(file)",
        "import pickle as p\np.loads(data)",
        "from pickle import loads as read\nread(data)",
        "f = pickle.loads",
        "class Own(pickle.Unpickler): pass",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=asked)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)",
    ],
)
def test_the_scan_sees(source):
    assert unsafe(source)


def test_the_scan_sees_what_would_ask():
    assert unsafe("AutoConfig.from_pretrained(name)", "trainer_ext/a.py") == [(1, "trust_remote_code")]


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "json.load(file)",
        "yaml.safe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_the_scan_lets_pass(source):
    assert not unsafe(source)
