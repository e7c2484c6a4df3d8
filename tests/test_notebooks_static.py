"""The form of the notebooks, without running them: in reading order, run from top to bottom, outputs stored, links to the package alive.

Each check takes a notebook and returns the problems it found; the last test shows each check a notebook with one thing wrong.
"""

import ast
import importlib
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_project import machine_paths

import minigen

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))

MAX_LINES, MAX_BYTES, MIN_STORED = 25, 300_000, 0.5
MISSING = object()
HEADER = ("You will be able to", "Needs", "Hardware", "Time")


def code_cells(notebook) -> list[tuple[str, nbformat.NotebookNode]]:
    return [(f"cell {index}", cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def name_problems(names: list[str]) -> list[str]:
    problems = [f"{name}: not NN_topic.ipynb" for name in names if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", name)]
    numbers = sorted(name[:2] for name in names)
    if numbers[:1] != ["00"] or len({*numbers}) < len(numbers):
        problems.append(f"numbers are {numbers}; each once, from 00 on, is meant")
    return problems


def header_problems(notebook) -> list[str]:
    """The first cell has a title and says what one will be able to do, what comes before, on which hardware, in what time."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown":
        return ["the first cell is not markdown"]
    problems = [] if re.match(r"# \S", first.source) else ["the first cell does not begin with a title, '# ...'"]
    problems += [f"the first cell does not say {words!r}" for words in HEADER if not re.search(rf"\b{words}\b", first.source)]
    if notebook.metadata.get("minigen", {}).get("needs") == "cuda" and "GPU" not in first.source:
        problems.append("metadata says needs: cuda, the first cell names no GPU")
    return problems


def execution_problems(notebook) -> list[str]:
    """Restart and run all leaves the counts 1, 2, ..., N; anything else was run in another order, or not at all."""
    counts = [cell.execution_count for _, cell in code_cells(notebook)]
    problems = [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}; restart and run all"]
    problems += [f"{name}: outputs without a count" for name, cell in code_cells(notebook) if cell.outputs and cell.execution_count is None]
    return problems


def output_problems(notebook) -> list[str]:
    problems = ["metadata.widgets: run nbstripout --keep-output --keep-count"] if "widgets" in notebook.metadata else []
    for name, cell in code_cells(notebook):
        if "raises-exception" not in tags(cell):
            problems += [f"{name}: stored {output.output_type}" for output in cell.outputs if output.output_type == "error"]
            problems += [f"{name}: stored stderr" for output in cell.outputs if output.get("name") == "stderr"]
    return problems


def stored_problems(notebook) -> list[str]:
    """nbval compares nothing in a cell without stored output, so enough cells must have one."""
    cells = [cell for _, cell in code_cells(notebook)]
    least = notebook.metadata.get("minigen", {}).get("stored", MIN_STORED)
    stored = sum(bool(cell.outputs) for cell in cells)
    return [] if stored >= least * len(cells) else [f"{stored} of {len(cells)} code cells have stored output; at least {least:.0%} are meant"]


def size_problems(notebook) -> list[str]:
    lines = [(name, len(cell.source.splitlines())) for name, cell in code_cells(notebook)]
    problems = [f"{name}: {count} lines, at most {MAX_LINES} are meant" for name, count in lines if count > MAX_LINES]
    if (size := len(nbformat.writes(notebook).encode("utf-8"))) > MAX_BYTES:
        problems.append(f"{size} bytes, at most {MAX_BYTES} are meant")
    return problems


def path_problems(notebook) -> list[str]:
    """No path of one machine, in what is written or in what was printed."""
    problems = []
    for index, cell in enumerate(notebook.cells):
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), output.get("evalue", ""), "\n".join(output.get("traceback", []))]
            texts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
        problems += [f"cell {index}: {found}" for text in texts for found in machine_paths(text)]
    return problems


def look_up(path: str) -> object:
    """What `minigen.x.y` stands for, or MISSING where there is no such thing."""
    here, parts = minigen, path.split(".")
    for depth, name in enumerate(parts[1:], start=2):
        if not hasattr(here, name):
            try:
                importlib.import_module(".".join(parts[:depth]))
            except ImportError:
                return MISSING
        here = getattr(here, name, MISSING)
    return here


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def names_of_minigen(source: str, aliases: dict[str, str]) -> set[str]:
    """Dotted paths into the package: what a cell imports from it, and the modules' attributes it uses. Adds to aliases, cell by cell."""
    used, tree = set(), ast.parse(TransformerManager().transform_cell(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minigen":
                    used.add(alias.name)
                    aliases[alias.asname or "minigen"] = alias.name if alias.asname else "minigen"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minigen":
            for alias in node.names:
                if alias.name != "*":
                    used.add(f"{node.module}.{alias.name}")
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for name in bound & set(aliases):
        del aliases[name]
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := dotted(node)):
            root, *rest = path.split(".")
            if root in aliases and root not in arguments:
                base = aliases[root]
                while rest and isinstance(look_up(base), ModuleType):  # as far as modules go; objects may have attributes of their own
                    base = f"{base}.{rest.pop(0)}"
                    used.add(base)
    return used


def link_problems(notebook) -> list[str]:
    """Every `from minigen import NAME` and `minigen.NAME` exists."""
    problems, aliases = [], {}
    for name, cell in code_cells(notebook):
        try:
            used = names_of_minigen(cell.source, aliases)
        except SyntaxError as error:
            problems += [] if "raises-exception" in tags(cell) else [f"{name}: {error}"]
            continue
        problems += [f"{name}: {path} does not exist" for path in sorted(used) if look_up(path) is MISSING]
    return problems


EVERYWHERE = [execution_problems, output_problems, size_problems, path_problems, link_problems]


def test_notebooks_are_numbered_in_reading_order():
    assert NOTEBOOKS, f"no notebook in {FOLDER.name}/"
    assert name_problems([path.name for path in NOTEBOOKS]) == []


@pytest.mark.parametrize("check", [header_problems, stored_problems, *EVERYWHERE], ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, check):
    assert check(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solution(path, check):
    assert check(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path, following", list(pairwise(NOTEBOOKS)), ids=lambda path: path.stem)
def test_notebook_leads_to_the_next(path, following):
    written = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    assert re.findall(r"\*\*Next\*\*: (.*)", written) == [f"[notebook {following.name[:2]}]({following.name})."]


def test_file_on_disk_is_small():
    sizes = {path.name: path.stat().st_size for path in NOTEBOOKS + SOLUTIONS}
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


# ---------------------------------------------------------------------------------------- the checks can fail


def good_notebook():
    header = "# Title\n\n**You will be able to** see.\n\n**Needs** 00. **Hardware** a laptop. **Time** 1 min."
    printed = new_output("stream", name="stdout", text="3\n")
    cells = [
        new_code_cell("import minigen\nfrom minigen import generator", execution_count=1),
        new_code_cell("%matplotlib inline\nprint(3)", execution_count=2, outputs=[printed]),
    ]
    return new_notebook(cells=[new_markdown_cell(header), *cells], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def test_good_notebook_passes_every_check():
    assert [problem for check in [header_problems, stored_problems, *EVERYWHERE] for problem in check(good_notebook())] == []


def output(kind, **fields):
    return lambda notebook: notebook.cells[2].update(outputs=[new_output(kind, **fields)])


def source(text):
    return lambda notebook: notebook.cells[1].update(source=text)


BROKEN = [
    (header_problems, lambda notebook: notebook.cells.pop(0)),
    (header_problems, lambda notebook: notebook.cells[0].update(source=notebook.cells[0].source[2:])),
    *[(header_problems, lambda notebook, words=words: notebook.cells[0].update(source=notebook.cells[0].source.replace(words, ""))) for words in HEADER],
    (header_problems, lambda notebook: notebook.metadata.update(minigen={"needs": "cuda"})),
    (execution_problems, lambda notebook: notebook.cells[1].update(execution_count=None)),
    (execution_problems, lambda notebook: notebook.cells[2].update(execution_count=3)),
    (execution_problems, lambda notebook: notebook.cells.append(new_code_cell(""))),
    (output_problems, lambda notebook: notebook.metadata.update(widgets={})),
    (output_problems, output("error", ename="ValueError", evalue="no", traceback=[])),
    (output_problems, output("stream", name="stderr", text="warning")),
    (stored_problems, lambda notebook: notebook.cells[2].update(outputs=[])),
    (stored_problems, lambda notebook: notebook.metadata.update(minigen={"stored": 0.6})),
    (size_problems, source("x = 1\n" * (MAX_LINES + 1))),
    (size_problems, output("display_data", data={"image/png": "A" * MAX_BYTES})),
    (path_problems, source("open('/home" + "/ada/x')")),
    (path_problems, output("stream", name="stdout", text="saved /Users" + "/ada/x")),
    (path_problems, output("execute_result", data={"text/plain": "'C:" + "\\\\data'"})),
    (link_problems, source("from minigen import no_such_name")),
    (link_problems, source("from minigen.no_such_module import name")),
    (link_problems, source("import minigen.no_such_module")),
    (link_problems, source("import minigen\nminigen.no_such_name(3)")),
    (link_problems, source("import minigen as mg\nmg.generator.no_such_name")),
    (link_problems, source("from minigen import generator as core\ncore.no_such_name")),
    (link_problems, source("import minigen.generator as core\ncore.no_such_name")),
    (link_problems, source("def f(:")),
]


@pytest.mark.parametrize("check, damage", BROKEN)
def test_every_check_notices(check, damage):
    notebook = good_notebook()
    damage(notebook)
    assert check(notebook)


@pytest.mark.parametrize("names", [["01_a.ipynb"], ["00_a.ipynb", "00_b.ipynb"], ["00-a.ipynb"], ["00_A.ipynb"]])
def test_name_check_notices(names):
    assert name_problems(names)


@pytest.mark.parametrize(
    "text",
    [
        "import minigen.generator\nminigen.generator.AdapterGenerator",
        "import minigen.generator as core\ncore.AdapterGenerator.read\ncore.torch.nn",
        "from minigen import generator\ngenerator = 3\ngenerator.bit_length()",
        "from minigen import generator\ndef f(generator):\n    return generator.weights",
        "!ls\nimport torch\ntorch.no_such_name",
    ],
)
def test_links_that_exist_pass(text):
    notebook = good_notebook()
    source(text)(notebook)
    assert link_problems(notebook) == []


def test_an_intended_error_may_be_stored():
    notebook = good_notebook()
    output("error", ename="ValueError", evalue="no", traceback=[])(notebook)
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    assert output_problems(notebook) == []
