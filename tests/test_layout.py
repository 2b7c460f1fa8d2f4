"""The layers: which folder may import which, which file may name a plug-in, and that everything public has a docstring."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY

from utils import plugins
from utils.config.stages import UNDEFENDED

FOLDERS = ("utils", "data", "model", "loss", "engine", "defenses", "benchmark")
SCRIPTS = ("ASD.py", "test.py")
SOURCES = sorted([*SCRIPTS, *(str(p.relative_to(REPOSITORY)) for f in FOLDERS for p in (REPOSITORY / f).rglob("*.py"))])
MAY_IMPORT = {
    "utils": {"utils"},
    "data": {"data", "utils"},
    "model": {"model", "utils"},
    "loss": {"loss"},
    "engine": {"engine", "data", "model", "loss", "utils"},
    "ASD": {"engine", "data", "model", "loss", "utils"},
    "defenses": {"defenses", "ASD", "engine", "data", "model", "loss", "utils"},
    "test": {"engine", "data", "model", "utils"},
    "benchmark": {"benchmark", "ASD", "engine", "data", "model", "loss", "utils"},
}
OUTSIDE = {
    "utils": {"torch", "numpy", "yaml", "tqdm", "matplotlib"},
    "data": {"torch", "torchvision", "numpy", "PIL"},
    "model": {"torch", "torchvision"},
    "loss": {"torch"},
    "engine": {"torch"},
    "ASD": {"torch"},
    "defenses": {"torch"},
    "test": {"torch"},
    "benchmark": {"torch", "torchvision", "numpy", "PIL"},
}
KINDS = {kind: plugins.package_of(kind) for kind in ("attacks", "datasets", "defenses", "networks", "transforms")}
PLUGINS = {name for package in KINDS.values() for name in plugins.names(package)} - {UNDEFENDED}
WORDS = {"asd", "blend", "folder", "normalize", "resize", "shapes", "sig"}  # English, or a codec: alone or as a YAML key a name


def parse(source: str) -> ast.Module:
    """Return the syntax tree of one file."""
    return ast.parse((REPOSITORY / source).read_text(encoding="utf-8"))


def module_name(source: str) -> str:
    """Turn `data/attacks/badnets.py` into `data.attacks.badnets`."""
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree: ast.AST, choices: bool = True) -> set[str]:
    """Return every module that a file imports, also inside functions and through strings. `from a import b` counts as a.b
    if that is a file. Strings that count: arguments of importing functions, names of packages inside a folder, and kinds of
    plug-ins; with `choices`, also the kinds that `Choices` declares."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which folder they mean"
            assert node.module is not None
            out |= {f"{node.module}.{alias.name}" for alias in node.names if is_own(f"{node.module}.{alias.name}")}
            out.add(node.module)
        elif isinstance(node, ast.Call):
            called, texts = ast.unparse(node.func).rpartition(".")[2], set(literals(node))
            if called in ("import_module", "__import__", "find_spec", "run_module"):
                out |= {text.rstrip(".") for text in texts} - {""}
            elif called == "package_of" or (called == "Choices" and choices):
                out |= {plugins.package_of(kind) for kind in texts & KINDS.keys()}
    packages = {text.rstrip(".") for text in literals(tree) if re.fullmatch(r"\w+(\.\w+)+\.?", text)}
    return out | {name for name in packages if (REPOSITORY / name.replace(".", "/") / "__init__.py").is_file()}


def literals(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a file, those of f-strings piece by piece, without docstrings."""
    idle = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in idle:
            yield node.value


def strays(tree: ast.Module, folder: str) -> set[str]:
    """Return the forbidden imports of a file in a folder. Modules that run as commands may import everything, as ASD.py may."""
    commands = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"]
    rest = [node for node in tree.body if node not in commands]
    out = set()
    for part, own in ((rest, MAY_IMPORT[folder]), (commands, MAY_IMPORT[folder] | MAY_IMPORT["ASD"])):
        for name in imported(ast.Module(list(part), []), choices=folder != "utils"):
            top = name.partition(".")[0]
            if top not in (own if is_own(top) else OUTSIDE[folder] | sys.stdlib_module_names):
                out.add(name)
    return out


def named_plugins(tree: ast.AST) -> set[str]:
    """Return the plug-ins that a file names in a string or imports."""
    out = {name.rpartition(".")[2] for name in imported(tree) if name.rpartition(".")[0] in KINDS.values()}
    for text in literals(tree):
        for name in PLUGINS:
            pattern = rf"dataset: {name}\b|\b{name}: {{" if name in WORDS else rf"(?<!\w){name}(?!\w)"
            if text == name or re.search(pattern, text):
                out.add(name)
    return out


def is_own(name: str) -> bool:
    """Return whether a dotted name is a module of this repository."""
    path = REPOSITORY / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def load(source: str) -> ModuleType:
    """Import a source file; test.py by its path, because the standard library has a module of that name."""
    if source != "test.py":
        return importlib.import_module(module_name(source))
    spec = importlib.util.spec_from_file_location("repository_test", REPOSITORY / source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_file_is_seen() -> None:
    """The rules below cover the whole project: both scripts and all folders; there is no other code at the top."""
    assert {module_name(s).partition(".")[0] for s in SOURCES} == set(MAY_IMPORT)
    assert {p.name for p in REPOSITORY.glob("*.py")} == set(SCRIPTS)
    assert len(SOURCES) > 20


@pytest.mark.parametrize("source", SOURCES)
def test_folders_import_only_what_lies_below_them(source: str) -> None:
    """utils imports nothing of the project; data, model and loss do not import one another; only the scripts import
    everything."""
    assert strays(parse(source), module_name(source).partition(".")[0]) == set()


@pytest.mark.parametrize(
    ("folder", "line", "caught"),
    [
        ("data", "def f():\n    from model.classifier import Classifier", True),
        ("data", 'importlib.import_module("model.classifier")', True),
        ("data", '__import__(f"model.{name}")', True),
        ("data", 'x = plugins.load("model.networks", name).build(settings)', True),
        ("data", 'PACKAGE = "model.networks"', True),
        ("data", 'x = f"model.networks.{name}"', True),
        ("data", 'x = plugins.load(plugins.package_of("networks"), name)', True),
        ("data", 'NETWORKS = Choices(kind="networks")', True),
        ("model", 'x = plugins.names("data.attacks")', True),
        ("utils", 'x = plugins.settings("data.transforms", name)', True),
        ("utils", 'x = plugins.package_of(kind="attacks")', True),
        ("loss", 'importlib.import_module("utils.config.schema")', True),
        ("data", 'if __name__ == "__main__":\n    from benchmark import run', True),
        ("data", 'if __name__ == "__main__":\n    from model.classifier import Classifier', False),
        ("data", 'PACKAGE = "data.attacks"', False),
        ("model", 'x = plugins.load("model.networks", name)', False),
        ("utils", 'NETWORKS = Choices(kind="networks")', False),
        ("ASD", 'x = plugins.load("model.networks", name)', False),
        ("data", 'x = "data.placement"', False),
        ("utils", '"""As plugins.load("model.networks", name) does."""', False),
    ],
)
def test_an_import_by_text_is_an_import(folder: str, line: str, caught: bool) -> None:
    """The rule above also finds imports through the name of a package or of a kind of plug-ins, in any form."""
    assert bool(strays(ast.parse(line), folder)) == caught


CORE = [s for s in SOURCES if module_name(s).rpartition(".")[0] not in KINDS.values() and not s.startswith("benchmark")]


@pytest.mark.parametrize("source", CORE)
def test_only_its_own_file_names_a_plugin(source: str) -> None:
    """A plug-in's file declares what the core must know about it; no other file has its name."""
    allowed = {"asd"} if source == "utils/config/__init__.py" else set()  # the default of `defense`
    assert named_plugins(parse(source)) == allowed


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('if config.dataset.name == "folder": pass', {"folder"}),
        ('x = {"cifar-?100": "cifar100"}', {"cifar100"}),
        ('fail(f"{key}: choose another, e.g. resnet18_cifar")', {"resnet18_cifar"}),
        ('fail("use {resize: {size: 256}, center_crop: {size: 224}}")', {"resize", "center_crop"}),
        ("from data.attacks import badnets", {"badnets"}),
        ("from data.attacks.badnets import BLOCK", {"badnets"}),
        ('fail(f"{path}: is a folder: resize it")', set()),
        ('def f():\n    """As badnets does."""', set()),
    ],
)
def test_a_plugins_name_is_found(line: str, found: set[str]) -> None:
    """The rule above finds a name in a comparison, a table, an example in a message and an import, but not in comments."""
    assert named_plugins(ast.parse(line)) == found


def test_no_circular_imports() -> None:
    """Every file can be imported with only the files below it: there are no circular imports."""
    below = {module_name(s): {n for n in imported(parse(s), choices=False) if is_own(n)} for s in SOURCES}
    while below:
        free = {name for name, needs in below.items() if not needs & (below.keys() - {name})}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


def own_methods(kind: type) -> list[tuple[str, object]]:
    """Return the public methods of a class that are not described by a base class outside the project."""
    inherited = {name for base in kind.__mro__[1:] for name in vars(base)}
    return [
        (name, item)
        for name, item in vars(kind).items()
        if not name.startswith("_") and name not in inherited and isinstance(item, (property, type(own_methods)))
    ]


def is_settings_table(kind: type) -> bool:
    """Return whether a class is a settings table in which every key has help or is itself a table."""
    if not dataclasses.is_dataclass(kind):
        return False
    fields = dataclasses.fields(kind)
    return all(f.metadata.get("help") or dataclasses.is_dataclass(f.default_factory) for f in fields)


@pytest.mark.parametrize("source", SOURCES)
def test_everything_public_has_a_docstring(source: str) -> None:
    """Every module, public function, class and method has a docstring; a settings table may describe its keys instead."""
    module = load(source)
    assert inspect.getdoc(module), source
    for name, item in vars(module).items():
        if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(item):
            assert item.__doc__, f"{source}: {name}"
        elif inspect.isclass(item):
            assert is_settings_table(item) or (item.__doc__ and not item.__doc__.startswith(f"{name}(")), f"{source}: {name}"
            for method, function in own_methods(item):
                assert function.__doc__, f"{source}: {name}.{method}"


MOST_PARAMETERS = 5  # besides self
MORE_PARAMETERS: set[str] = set()  # the exceptions


def functions_with_more(tree: ast.AST) -> set[str]:
    """Return the names of the functions of a file that have more than MOST_PARAMETERS parameters."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            names = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg}
            if len(names - {"self", "cls"}) > MOST_PARAMETERS:
                out.add(node.name)
    return out


@pytest.mark.parametrize("source", SOURCES)
def test_functions_have_few_parameters(source: str) -> None:
    """No function or method has more than five parameters, except those in MORE_PARAMETERS."""
    allowed = {name.partition(": ")[2] for name in MORE_PARAMETERS if name.partition(": ")[0] == source}
    assert functions_with_more(parse(source)) == allowed


def test_parameters_of_all_kinds_count() -> None:
    """Positional, keyword-only and variable parameters count, also in methods and nested functions; self does not."""
    assert functions_with_more(ast.parse("def f(a, b, /, c, *d, e, **g): pass")) == {"f"}
    assert functions_with_more(ast.parse("class A:\n    def f(self, a, b, c, d, e): pass")) == set()
    assert functions_with_more(ast.parse("def f():\n    def g(a, b, c, d, e, h): pass")) == {"g"}


REPORTS_FAILURES = "utils/reporting/best_effort.py"  # of plots, TensorBoard and parts of the benchmark


@pytest.mark.parametrize("source", SOURCES)
def test_no_bare_except(source: str) -> None:
    """A handler of all exceptions raises again, except where the failure of a part is itself the report."""
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f"{source}:{node.lineno}"
        kinds = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        if kinds & {"Exception", "BaseException"} and not (source == REPORTS_FAILURES and kinds == {"Exception"}):
            assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"{source}:{node.lineno}"


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_run_from_text(source: str) -> None:
    """No source file calls exec, eval or pickle's loaders, and torch.load is always called with `weights_only`."""
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("exec", "eval", "pickle.load", "pickle.loads", "yaml.unsafe_load"), f"{source}:{node.lineno}"
        if called == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"{source}:{node.lineno}"
        if called.endswith(("np.load", "numpy.load")):
            assert "allow_pickle=True" not in ast.unparse(node), f"{source}:{node.lineno}"


def test_files_lie_where_the_tests_expect_them() -> None:
    """The tested repository is the imported one."""
    assert Path(str(importlib.import_module("ASD").__file__)).resolve() == REPOSITORY / "ASD.py"
