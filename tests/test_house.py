"""The house: what may import what, and how dense the code may be. ruff holds the rest."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ["gpt.py", "lora_minimal.py", "train.py"]
SOURCES = [ROOT / name for name in CORE]
SOURCES += sorted(ROOT.glob("data/*.py")) + sorted(ROOT.glob("lab/*.py"))
BENCHES = sorted(ROOT.glob("bench/**/*.py")) + sorted(ROOT.glob("notebooks/*.py"))
OURS = {"gpt", "lora_minimal", "train", "data", "lab", "bench"}
MAY_LOOK_UP = {"save_pretrained", "from_pretrained", "save_lora", "load_lora"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CHANGES = {"append", "extend", "update", "pop", "setdefault", "add", "remove", "clear"}
CHANGES |= {"__setitem__", "setattr", "write", "print", "say"}

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
each_python = pytest.mark.parametrize(
    "path", SOURCES + BENCHES, ids=lambda path: str(path.relative_to(ROOT))
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def levels():
    """{module: level} of the drawing in docs/house.md."""
    drawing = (ROOT / "docs" / "house.md").read_text(encoding="utf-8").split("```")[1]
    found = {}
    level = None
    for line in drawing.splitlines():
        match = re.match(r"level (\d) ", line)
        if match:
            level = int(match[1])
            line = line[match.end():]
        for name in re.findall(r"[a-z][a-z0-9_.]*", line):
            found[name] = level
    return found


def imports_of(tree):
    """(imported module of ours, name of the function around it or None) for every import."""
    found = []

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Import):
                found.extend((alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.extend((module, function) for module in modules_of(child))
            visit(child, inside)

    visit(tree, None)
    return [(name, function) for name, function in found if name.split(".")[0] in OURS]


def modules_of(node):
    """The modules of `from module import name`, where a name may be a module of a package."""
    names = []
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        is_module = (ROOT / (submodule.replace(".", "/") + ".py")).exists()
        names.append(submodule if is_module else node.module)
    return set(names)


def test_the_drawing_names_every_module():
    modules = {module_name(path) for path in SOURCES} - {"lab"}
    assert modules == levels().keys()


@each_source
def test_imports_go_down(path):
    level = levels()
    own = module_name(path)
    if own == "lab":
        return
    for imported, function in imports_of(tree_of(path)):
        if level[own] == 2 and function in MAY_LOOK_UP:
            assert imported in ("lab.peft_files", "lab.gpt2_files")
            continue
        is_data = own.startswith("data") and imported.startswith("data")
        together = level[own] == 3 or is_data
        lower = level[imported] < level[own]
        assert lower or together and level[imported] == level[own], f"{own} imports {imported}"


def test_only_data_of_level_2_imports_level_1():
    level = levels()
    for path in SOURCES:
        own = module_name(path)
        if level.get(own) != 2 or own.startswith("data"):
            continue
        for imported, function in imports_of(tree_of(path)):
            assert function in MAY_LOOK_UP or level[imported] == 2, f"{own} imports {imported}"


def test_lab_has_no_import_cycle():
    graph = {}
    for path in SOURCES:
        graph[module_name(path)] = {
            imported for imported, function in imports_of(tree_of(path)) if function is None
        }
    done = set()

    def visit(module, above):
        assert module not in above, f"a cycle: {[*above, module]}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, [*above, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_lora_minimal_imports_torch_and_the_standard_library_only():
    tree = tree_of(ROOT / "lora_minimal.py")
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names <= {"torch", "math", "sys", "collections", "contextlib", "weakref"}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" not in functions


def test_the_functions_that_look_up_have_two_lines():
    for name in ("gpt.py", "lora_minimal.py"):
        for node in ast.walk(tree_of(ROOT / name)):
            if isinstance(node, ast.FunctionDef) and node.name in MAY_LOOK_UP:
                statements = node.body[1:]      # without the docstring
                assert 2 <= len(statements) <= 3


@each_python
def test_no_comprehension_is_inside_another_or_has_two_loops(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if child is not node]
            nested = any(isinstance(child, COMPREHENSIONS) for child in inner)
            assert len(node.generators) == 1 and not nested, f"line {node.lineno}"


@each_python
def test_no_expression_is_used_as_a_statement(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr):
            folded = isinstance(node.value, ast.IfExp | ast.BoolOp | ast.Tuple)
            assert not folded, f"line {node.lineno}"


@each_python
def test_no_lambda_has_effects(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Lambda):
            continue
        for child in ast.walk(node.body):
            assert not isinstance(child, ast.NamedExpr), f"line {node.lineno}"
            if isinstance(child, ast.Call):
                assert not isinstance(node.body, ast.Tuple), f"line {node.lineno}"
                name = getattr(child.func, "attr", getattr(child.func, "id", ""))
                assert name not in CHANGES, f"line {node.lineno} calls {name}"


@each_python
def test_lines_are_narrow(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    widths = sorted(len(line) for line in lines if line)
    assert widths[-1] <= 100
    assert len(lines) < 20 or widths[int(0.9 * len(widths))] <= 88
