"""Figures of the state, and the thin ipywidgets shell around one: arrays in, a matplotlib Figure out, no pyplot state.

Figures are white with dark text, whatever theme surrounds them; the colours are Okabe and Ito's, which colour-blind eyes tell apart.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ipywidgets import IntSlider, interactive
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .evaluation import METHODS, Reader
from .generator import NULL_DIRECTION, ContextState

KEPT, DROPPED, RANK, NUMERIC, TEXT = "#0072B2", "#BBBBBB", "#D55E00", "#009E73", "#222222"
SIGNED = colormaps["PuOr"].resampled(11)  # orange below zero, white about zero, purple above; few shades keep the files small
DPI = 100


def singular_values(state: ContextState, row: int = 0) -> Float[np.ndarray, "l r"]:
    """sigma of S in every adapted layer, largest first, for one batch row; l layers, r = min(p, q) directions."""
    return torch.linalg.svdvals(state.S[:, row].detach()).cpu().numpy()


def numeric_rank(sigma: Float[np.ndarray, " r"]) -> int:
    """How many directions hold more than rounding noise.   #{ sigma_i > 1e-5 sigma_1 }"""
    return int((sigma > NULL_DIRECTION * sigma.max()).sum())


def gains(sigma: Float[np.ndarray, " r"], rank: int) -> Float[np.ndarray, " r"]:
    """What norm_r makes of the spectrum: one for the leading `rank` directions that hold something, zero for the others."""
    return (np.arange(len(sigma)) < min(rank, numeric_rank(sigma))).astype(float)


def spectrum_figure(sigma: Float[np.ndarray, "l r"], rank: int, layer: int) -> Figure:
    """The singular values of S in one adapted layer, before the norm and after it; the kept and the numeric rank are marked."""
    if not 0 <= layer < len(sigma):
        raise ValueError(f"layer {layer} asked of {len(sigma)} adapted layers; choose 0 to {len(sigma) - 1}")
    figure = _figure(8.4, 3.2)
    before, after = figure.subplots(1, 2)
    _bars(before, sigma[layer], sigma[layer], rank)
    before.set(title=f"S, adapted layer {layer}", ylabel="singular value σ", xlabel="singular direction")
    _log(before, sigma[layer])
    _bars(after, gains(sigma[layer], rank), sigma[layer], rank)
    after.set(title="after the norm: gain one or zero", ylabel="gain", xlabel="singular direction", ylim=(0, 1.25), yticks=[0, 0.5, 1])
    numeric = numeric_rank(sigma[layer])
    for axes in (before, after):
        axes.axvline(rank + 0.5, color=RANK, lw=2, label=f"rank kept: {rank}")
        axes.axvline(numeric + 0.5, color=NUMERIC, lw=2, ls="--", label=f"numeric rank: {numeric}")
        axes.set_xlim(0.5, len(sigma[layer]) + 1.5)
    figure.legend(*before.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def spectrum_explorer(sigma: Float[np.ndarray, "l r"], rank: int) -> interactive:
    """A slider over the layers around spectrum_figure; it holds no maths and runs no model."""
    slider = IntSlider(0, 0, len(sigma) - 1, description="layer", continuous_update=False)
    return interactive(lambda layer: spectrum_figure(sigma, rank, layer), {"auto_display": True}, layer=slider)


def method_figure(
    tokens: Sequence[str],
    S: Float[np.ndarray, "p q"],
    rank: int,
    up: Float[np.ndarray, "o r"],
    down: Float[np.ndarray, "r i"],
    questions: Sequence[str],
    answers: Mapping[str, Sequence[str]],
) -> Figure:
    """The method in one picture: a text's tokens -> the state S of one layer -> its spectrum made flat -> the adapter; below, the answers.

    answers: name of a method -> its answer to every question.
    """
    figure = _figure(10, 5.6, layout="none")
    boxes = {"tokens": (0.012, 0.235), "S": (0.303, 0.165), "spectrum": (0.541, 0.165), "adapter": (0.757, 0.235)}
    top, height = 0.9, 0.42
    at = {name: figure.add_axes((left, top - height, width, height)) for name, (left, width) in boxes.items()}
    _token_panel(at["tokens"], tokens)
    _matrix(at["S"], S)
    _spectrum_panel(at["spectrum"], np.linalg.svd(S, compute_uv=False), rank)
    _adapter_panel(at["adapter"], up, down)
    titles = {
        "tokens": f"1  A text of {len(tokens)} tokens",
        "S": f"2  Its state S, {S.shape[0]} × {S.shape[1]}",
        "spectrum": "3  Spectrum made flat",
        "adapter": f"4  The adapter, rank {up.shape[1]}",
    }
    for name, (left, _) in boxes.items():
        figure.text(left, 0.965, titles[name], weight="bold", size=11, va="top", color=TEXT)
    for name in ("S", "spectrum", "adapter"):
        figure.text(boxes[name][0] - (0.053 if name == "spectrum" else 0.024), top - height / 2, "➜", size=20, ha="center", va="center", color=TEXT)
    _answer_table(figure, questions, answers, top=0.395)
    return figure


@torch.no_grad()
def method_picture(reader: Reader, text: str, questions: Sequence[str], layer: int = 0) -> Figure:
    """method_figure of a real text, read and answered here; layer: which adapted layer is shown."""
    state = reader.read(text)
    adapter = reader.generator.write(state)
    name = reader.generator.layers[layer].name
    ids = reader.tokenizer(text).input_ids
    return method_figure(
        [reader.tokenizer.decode([token]) for token in ids],
        state.S[layer, 0].cpu().numpy(),
        reader.generator.config.rank,
        adapter.up[name][0].cpu().numpy(),
        adapter.down[name][0].cpu().numpy(),
        questions,
        {method: run(reader, text, questions) for method, run in METHODS.items()},
    )


# ------------------------------------------------------------------------------------------------- the pieces


def _figure(width: float, height: float, layout: str = "constrained") -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def _log(axes: Axes, sigma: Float[np.ndarray, " r"]) -> None:
    """A log axis that begins just below the smallest value, but not far below rounding noise."""
    largest = sigma.max() or 1.0
    axes.set_ylim(max(sigma.min() / 2, NULL_DIRECTION * largest / 100), 2 * largest)
    axes.set_yscale("log")


def _bars(axes: Axes, heights: Float[np.ndarray, " r"], sigma: Float[np.ndarray, " r"], rank: int) -> None:
    """One bar a direction, in blue where norm_r keeps it."""
    kept = gains(sigma, rank) > 0
    axes.bar(np.arange(1, len(heights) + 1), heights, width=1.0, color=np.where(kept, KEPT, DROPPED))
    axes.spines[["top", "right"]].set_visible(False)


def _matrix(axes: Axes, matrix: Float[np.ndarray, "row column"]) -> None:
    """A matrix as a heat map, its colours cut off at the 99th percentile, so that a few large entries do not bleach the rest."""
    limit = np.percentile(np.abs(matrix), 99) or 1.0
    axes.imshow(matrix, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _token_panel(axes: Axes, tokens: Sequence[str], columns: int = 40, rows: int = 22) -> None:
    """The tokens as running text, tinted in turn, as far as they fit."""
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    row, column = 0, 0
    for number, token in enumerate(tokens):
        shown = token.replace("\n", " ")
        if column == 0:
            shown = shown.lstrip()
        if column + len(shown) > columns:
            row, column, shown = row + 1, 0, shown.lstrip()
        if row == rows - 1 and number < len(tokens) - 1 and column + len(shown) > columns - 8:
            axes.text(column, row + 0.5, " …", family="monospace", size=7, va="center", color=TEXT)
            break
        axes.add_patch(Rectangle((column, row + 0.04), len(shown), 0.92, color="#D6EAF5" if number % 2 else "#FBE8C8", lw=0))
        axes.text(column, row + 0.5, shown, family="monospace", size=7, va="center", color=TEXT)
        column += len(shown)


def _spectrum_panel(axes: Axes, sigma: Float[np.ndarray, " r"], rank: int) -> None:
    """The spectrum before and after the norm on one log axis, relative to the largest value."""
    direction, kept = np.arange(1, len(sigma) + 1), gains(sigma, rank) > 0
    relative = sigma / (sigma.max() or 1.0)
    _bars(axes, relative, sigma, rank)
    axes.plot(direction[kept], gains(sigma, rank)[kept], color=RANK, lw=3, solid_capstyle="butt")
    axes.set_xlim(0.5, len(sigma) + 0.5)
    _log(axes, relative)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("singular direction", size=8, labelpad=1)
    axes.text(0.97, 0.86, f"gain one\nfor {int(kept.sum())}", transform=axes.transAxes, size=9, color=RANK, ha="right", va="top")
    axes.text(0.06, 0.06, "σ", transform=axes.transAxes, size=12, color="white", weight="bold")


def _adapter_panel(axes: Axes, up: Float[np.ndarray, "o r"], down: Float[np.ndarray, "r i"]) -> None:
    """The two factors, drawn in proportion."""
    (o, r), i = up.shape, down.shape[1]
    axes.set_axis_off()
    _matrix(axes.inset_axes((0.0, 0.12, 0.17, 0.88)), up)
    _matrix(axes.inset_axes((0.36, 0.66, 0.64, 0.34)), down)
    axes.text(0.265, 0.83, "×", transform=axes.transAxes, size=18, ha="center", va="center", color=TEXT)
    axes.text(0.0, 0.09, f"A1 U   {o} × {r}", transform=axes.transAxes, size=9, ha="left", va="top", color=TEXT)
    axes.text(0.68, 0.635, f"Vᵀ B2   {r} × {i}", transform=axes.transAxes, size=9, ha="center", va="top", color=TEXT)
    note = "Their product is added\nto the frozen weights\nof the layer."
    axes.text(0.36, 0.44, note, transform=axes.transAxes, size=9, va="top", color=TEXT, linespacing=1.35)


def _answer_table(figure: Figure, questions: Sequence[str], answers: Mapping[str, Sequence[str]], top: float) -> None:
    """A column for the questions and one for each method; long answers are cut."""
    axes = figure.add_axes((0.012, 0.02, 0.976, top - 0.02))
    axes.set(xlim=(0, 1), ylim=(len(questions) + 0.75, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    lefts = np.concatenate([[0.0], 0.28 + 0.72 / len(answers) * np.arange(len(answers))])
    prompts = {"closed-book": "the question alone", "prompting": "the text and the question", "adapter": "the question alone, adapter on"}
    last = len(answers)
    axes.add_patch(Rectangle((lefts[last] - 0.01, 0), 1.01 - lefts[last], len(questions) + 0.75, color="#EAF3F9", lw=0))
    for column, (left, name) in enumerate(zip(lefts, ["Question", *answers], strict=True)):
        axes.text(left, 0.22, name, weight="bold", size=10, va="center", color=KEPT if column == last else TEXT)
        axes.text(left, 0.53, prompts.get(name, ""), size=8, va="center", color="#555555")
    for row, question in enumerate(questions):
        axes.axhline(row + 0.75, color="#CCCCCC", lw=0.8)
        for left, entry in zip(lefts, [question, *(answers[name][row] for name in answers)], strict=True):
            lines = textwrap.wrap(entry or "-", 32, max_lines=3 if len(questions) < 4 else 2, placeholder=" …")
            axes.text(left, row + 1.25, "\n".join(lines), size=9, va="center", color=TEXT, parse_math=False)
