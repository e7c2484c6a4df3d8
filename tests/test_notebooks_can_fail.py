"""What the notebooks assert and store is really held: a mistake in the maths, or one changed number, makes them fail."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from test_golden import MISTAKES
from test_notebooks_static import FOLDER, code_cells

NBVAL = "--nbval --nbval-current-env --nbval-cell-timeout 600 -p no:cacheprovider -q".split()


class Shell(InteractiveShell):
    """An IPython without a screen, as the one behind a notebook."""

    def enable_gui(self, gui=None):
        pass


def run(name: str) -> None:
    """Run a notebook's code cells in this very process, with whatever is patched here; the first error is raised."""
    shell = Shell()
    for _, cell in code_cells(nbformat.read(FOLDER / name, as_version=4)):
        shell.run_cell(cell.source).raise_error()


def test_the_generator_notebook_runs_here():
    run("03_adapter_generator.ipynb")


@pytest.mark.parametrize("mistake", ["sides of S swapped", "svd dropped", "smallest directions kept"])
def test_a_mistake_in_the_maths_breaks_the_generator_notebook(mistake, monkeypatch):
    monkeypatch.setitem(*MISTAKES[mistake])
    with pytest.raises(AssertionError):
        run("03_adapter_generator.ipynb")


def nbval(notebook, folder) -> subprocess.CompletedProcess:
    path = folder / "01_fast_weights.ipynb"
    nbformat.write(notebook, path)
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run([sys.executable, "-m", "pytest", *NBVAL, str(path)], cwd=folder, env=environment, capture_output=True, text=True)


def test_one_changed_number_makes_nbval_fail(tmp_path):
    notebook = nbformat.read(FOLDER / "01_fast_weights.ipynb", as_version=4)
    assert nbval(notebook, tmp_path).returncode == 0
    printed = next(output for _, cell in code_cells(notebook) for output in cell.outputs if output.get("name") == "stdout" and re.search(r"\d", output.text))
    printed.text = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), printed.text, count=1)
    result = nbval(notebook, tmp_path)
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout
