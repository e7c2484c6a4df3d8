"""How pytest --nbval treats the notebooks: what it does not compare, and which ones it skips."""

import pytest
import torch

from minigen.models import smollm2_folder


def pytest_sessionstart(session):
    smollm2_folder()  # converts SmolLM2 where that was never done, so that no notebook stops to show its progress


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml")


def pytest_collection_modifyitems(items):
    for item in items:
        notebook = getattr(item.parent, "nb", None)
        needs = notebook.metadata.get("minigen", {}).get("needs") if notebook is not None else None
        if needs == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"{item.path.name} needs a CUDA GPU"))
