"""The house: which folder may import which, and that everything public says what it is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY

FOLDERS = ("utils", "data", "model", "loss", "engine", "benchmark")
SCRIPTS = ("ASD.py", "test.py")
SOURCES = sorted([*SCRIPTS, *(str(p.relative_to(REPOSITORY)) for f in FOLDERS for p in (REPOSITORY / f).rglob("*.py"))])
MAY_IMPORT = {
    "utils": {"utils"},
    "data": {"data", "utils"},
    "model": {"model", "utils"},
    "loss": {"loss"},
    "engine": {"engine", "data", "model", "loss", "utils"},
    "ASD": {"engine", "data", "model", "loss", "utils"},
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
    "test": {"torch"},
    "benchmark": {"torch", "torchvision", "numpy", "PIL"},
}


def parse(source: str) -> ast.Module:
    """Return the syntax tree of one file."""
    return ast.parse((REPOSITORY / source).read_text(encoding="utf-8"))


def module_name(source: str) -> str:
    """Turn `data/attacks/badnets.py` into `data.attacks.badnets`."""
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(source: str) -> set[str]:
    """Return every module that a file imports, also inside functions; `from a import b` counts as a.b if that is a file."""
    out = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative imports hide which folder they mean"
            assert node.module is not None
            out |= {f"{node.module}.{alias.name}" for alias in node.names if is_own(f"{node.module}.{alias.name}")}
            out.add(node.module)
    return out


def is_own(name: str) -> bool:
    """Return whether a dotted name is a module of this repository."""
    path = REPOSITORY / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def load(source: str) -> ModuleType:
    """Import a source file; test.py by its path, for its name is also one of the standard library's."""
    if source != "test.py":
        return importlib.import_module(module_name(source))
    spec = importlib.util.spec_from_file_location("repository_test", REPOSITORY / source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_file_is_seen() -> None:
    """The rules below hold for the whole project: both scripts and the folders, and no other code at the top."""
    assert {module_name(s).partition(".")[0] for s in SOURCES} == set(MAY_IMPORT)
    assert {p.name for p in REPOSITORY.glob("*.py")} == set(SCRIPTS)
    assert len(SOURCES) > 20


@pytest.mark.parametrize("source", SOURCES)
def test_folders_import_only_what_lies_below_them(source: str) -> None:
    """utils stands on nothing of the project, data, model and loss never on one another, only the scripts on all of it."""
    folder = module_name(source).partition(".")[0]
    for name in imported(source):
        top = name.partition(".")[0]
        if is_own(top):
            assert top in MAY_IMPORT[folder], f"{source} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in OUTSIDE[folder], f"{source} imports {name}"


def test_no_circular_imports() -> None:
    """Every file can be read with the files below it alone: the imports form no circle."""
    below = {module_name(s): {n for n in imported(s) if is_own(n)} for s in SOURCES}
    while below:
        free = {name for name, needs in below.items() if not needs & (below.keys() - {name})}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in free}


def own_methods(kind: type) -> list[tuple[str, object]]:
    """Return the public methods of a class that no base from outside the project describes already."""
    inherited = {name for base in kind.__mro__[1:] for name in vars(base)}
    return [
        (name, item)
        for name, item in vars(kind).items()
        if not name.startswith("_") and name not in inherited and isinstance(item, (property, type(own_methods)))
    ]


def tells_its_keys(kind: type) -> bool:
    """Return whether a class is a table of settings in which every key has its line of help or is itself a table."""
    if not dataclasses.is_dataclass(kind):
        return False
    fields = dataclasses.fields(kind)
    return all(f.metadata.get("help") or dataclasses.is_dataclass(f.default_factory) for f in fields)


@pytest.mark.parametrize("source", SOURCES)
def test_everything_public_has_a_docstring(source: str) -> None:
    """Every module, public function, class and method says what it is; a settings table may say it key by key."""
    module = load(source)
    assert inspect.getdoc(module), source
    for name, item in vars(module).items():
        if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(item):
            assert item.__doc__, f"{source}: {name}"
        elif inspect.isclass(item):
            assert tells_its_keys(item) or (item.__doc__ and not item.__doc__.startswith(f"{name}(")), f"{source}: {name}"
            for method, function in own_methods(item):
                assert function.__doc__, f"{source}: {name}.{method}"


REPORTS_FAILURES = "utils/best_effort.py"  # of pictures, TensorBoard and parts of the benchmark: the rest is done all the same


@pytest.mark.parametrize("source", SOURCES)
def test_no_bare_except(source: str) -> None:
    """A handler of every exception raises again, but where the failure of a part is itself what is reported."""
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f"{source}:{node.lineno}"
        kinds = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        if kinds & {"Exception", "BaseException"} and not (source == REPORTS_FAILURES and kinds == {"Exception"}):
            assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"{source}:{node.lineno}"


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_run_from_text(source: str) -> None:
    """No source calls exec, eval or pickle's own loaders, and torch.load is always told to load weights only."""
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
    """The repository that is tested is the one that is imported."""
    assert Path(str(importlib.import_module("ASD").__file__)).resolve() == REPOSITORY / "ASD.py"
