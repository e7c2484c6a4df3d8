"""Figures of the state and its adapter: arrays in, a matplotlib Figure out, no pyplot state. The widgets around them are in minigen.microscope.

Figures are white with dark text, whatever theme surrounds them; the colours are Okabe and Ito's, PuOr and cividis, which colour-blind
eyes tell apart. Letters are those of minigen.generator, and c chunk, v vocabulary; a direction is counted from 1, as on the axes.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cache
from itertools import accumulate, groupby
from operator import add

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.patches import PathPatch, Rectangle, StepPatch
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from torch import Tensor
from transformers import PreTrainedModel

from .evaluation import METHODS, Reader
from .generator import NORMS, NULL_DIRECTION, Adapter, AdapterGenerator, ContextState, rms_norm, svd_norm, token_keys, token_values, weight_matrix
from .training import Target, target_losses

KEPT, DROPPED, RANK, NUMERIC, TEXT = "#0072B2", "#BBBBBB", "#D55E00", "#009E73", "#222222"
SIGNED = colormaps["PuOr"].resampled(11)  # orange below zero, white about zero, purple above; few shades keep the files small
ORDERED = colormaps["cividis"]
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


def energy(sigma: Float[np.ndarray, "*l r"]) -> Float[np.ndarray, "*l r"]:
    """Every direction's share of ||S||_F^2.   p_i = sigma_i^2 / sum_j sigma_j^2, all zero for a state of zeros"""
    squares = np.square(sigma, dtype=float)
    return squares / np.maximum(squares.sum(-1, keepdims=True), np.finfo(float).tiny)


def effective_rank(sigma: Float[np.ndarray, "*l r"]) -> Float[np.ndarray, "*l"]:
    """Over how many directions the energy spreads: the exponential of its entropy (Roy and Vetterli 2007).   exp(-sum_i p_i ln p_i)"""
    p = energy(sigma)
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


def stream_singular_values(chunks: Iterable[ContextState], row: int = 0) -> Float[np.ndarray, "c l r"]:
    """sigma of S_t after every chunk of a stream, e.g. of generator.read_chunks (eq. 3).   S_t = S_{t-1} + what chunk t adds"""
    return np.stack([singular_values(state, row) for state in accumulate(chunks, add)])


@torch.no_grad()
def overlaps(states: Sequence[ContextState], rank: int) -> Float[np.ndarray, "l b b"]:
    """How much the adapters of different contexts write into the same subspace: every pair's principal angles theta_i, averaged.

    mean_i cos^2 theta_i = ||U_r^T U'_r||_F^2 / min(r, r'), r directions kept (fewer where S has fewer). Every batch row of every
    state is one context. Two random subspaces of p dimensions come to max(r, r') / p.
    """
    left, _ = svd_norm(torch.cat([state.S for state in states], dim=1), rank)
    cosines = einsum(left, left, "l b p r, l c p s -> l b c r s")
    kept = left.square().sum((-2, -1))
    return (cosines.square().sum((-2, -1)) / torch.minimum(kept[:, :, None], kept[:, None]).clamp_min(1)).cpu().numpy()


@torch.no_grad()
def token_shares(lm: PreTrainedModel, generator: AdapterGenerator, input_ids: Int[Tensor, "1 n"]) -> Float[np.ndarray, "l n r"]:
    """Which tokens wrote which direction: each one's part of sigma_k.   share_nk = (u_k . value_n)(key_n . v_k) / sigma_k

    value_n and key_n: `token_values` and `token_keys`, and `with_task` where there is one. S is a sum over tokens and sigma_k = u_k^T S v_k, so
    the shares of a direction sum to one over the tokens (single ones may be negative); those of null directions are zero.
    """
    if len(input_ids) != 1:
        raise ValueError(f"shares of {len(input_ids)} texts asked; give one at a time, as input_ids of shape (1, n)")
    chunks = []

    def listen(H, E, mask):
        home = generator.by_layer[0].norm.device
        chunks.append(([h.to(home) for h in H], E.to(home)))
        return generator.contribution(H, E, mask)

    listener = copy(generator)
    listener.contribution = listen
    S = listener.read(lm, input_ids).S[:, 0]
    left, right = svd_norm(S, generator.config.rank)
    shares = []
    for layer, (g, U, V, sigma) in enumerate(zip(generator.by_layer, left, right, torch.linalg.svdvals(S), strict=True)):
        normed = [(rms_norm(H[layer], g.norm), E) for H, E in chunks]
        values = torch.cat([token_values(h, g.A2, E, g.gate) for h, E in normed], dim=1)[0]
        keys = torch.cat([token_keys(h, g.B1) for h, _ in normed], dim=1)[0]
        if layer in generator.later:
            n, fact = generator.later[layer], -generator.config.task_values
            later = torch.cat([rms_norm(H[n], generator.by_layer[n].norm) for H, _ in chunks], dim=1)[0]
            of_task = (later @ g.A2[fact:, : later.shape[1]].mT @ U[fact:]) * (torch.sigmoid(keys[:, -1:]) * V[-1])
            written = (values[:, :fact] @ U[:fact]) * (keys[:, :-1] @ V[:-1]) + of_task
        else:
            written = (values @ U) * (keys @ V)
        shares.append(written / sigma[: U.shape[1]].clamp_min(torch.finfo(sigma.dtype).tiny))
    return torch.stack(shares).cpu().numpy()


@torch.no_grad()
def promoted(lm: PreTrainedModel, adapter: Adapter, name: str, row: int = 0) -> Float[np.ndarray, "r v"]:
    """What a direction of one layer says when it fires, through the logit lens (nostalgebraist 2020).   logits_k = W_head norm(A1 u_k)

    norm: the LM's last one, without its bias, as if the residual stream held the direction alone. For layers that write into that
    stream (o_proj, down_proj, c_proj). Direction k fires with v_k^T B2 x, which may have either sign, so both ends of logits_k speak.
    """
    direction = adapter.up[name][row].mT
    if direction.shape[1] != lm.config.hidden_size:
        raise ValueError(
            f"{name} asked, but its {direction.shape[1]} outputs are not the residual stream ({lm.config.hidden_size} wide); "
            "choose a layer that writes into it: o_proj, down_proj or c_proj"
        )
    norms = [module for module in lm.base_model.children() if getattr(module, "weight", None) is not None and module.weight.ndim == 1]
    if not norms:
        raise ValueError(f"the last norm of {type(lm).__name__} was not found among the children of its base model; the logit lens needs one there")
    head = lm.get_output_embeddings().weight
    direction = direction.to(head)
    return ((norms[-1](direction) - norms[-1](torch.zeros_like(direction))) @ head.T).float().cpu().numpy()


@torch.no_grad()
def update_norms(lm: PreTrainedModel, adapter: Adapter, row: int = 0) -> Float[np.ndarray, "l 2"]:
    """How large the update is beside the frozen weights it is added to.   ||W_delta||_F, ||W||_F of every adapted layer"""
    pairs = [(adapter.delta(name)[row], weight_matrix(lm.get_submodule(name))) for name in adapter.down]
    return np.array([[torch.linalg.matrix_norm(matrix.float()).item() for matrix in pair] for pair in pairs])


@torch.no_grad()
def switched_off(lm: PreTrainedModel, adapter: Adapter, target: Target) -> Float[np.ndarray, "l n"]:
    """What every layer does for every token of an answer, in nats: the change when its adapter alone is off.   log p without l - log p with all"""

    def log_probabilities(names: Sequence[str]) -> Float[Tensor, " n"]:
        chosen = Adapter({name: adapter.down[name] for name in names}, {name: adapter.up[name] for name in names}, adapter.scale)
        with chosen.applied_to(lm):
            return -target_losses(lm, 0, [target])[0]

    every = log_probabilities([*adapter.down])
    return torch.stack([log_probabilities([name for name in adapter.down if name != off]) - every for off in adapter.down]).cpu().numpy()


# ------------------------------------------------------------------------------------------------- the figures


def spectrum_figure(sigma: Float[np.ndarray, "l r"], rank: int, layer: int, norm: str = "svd") -> Figure:
    """The singular values of S in one adapted layer, before and after a norm of NORMS; the kept and the numeric rank are marked.

    A norm turns with S, so what it makes of diag(sigma) is what it makes of the spectrum.
    """
    _check_layer(layer, len(sigma))
    sigma = sigma[layer]
    figure, (before, after) = _panels(3.2, [1, 1])
    before.set_title(f"S, adapted layer {layer}", y=1)
    before.set(ylabel="singular value σ", xlabel="singular direction")
    _log(before, sigma)
    if norm in ("svd", "polar"):
        normed = gains(sigma, rank)
        after.set_title("after the norm: gain one or zero", y=1)
        after.set(ylim=(0, 1.25), yticks=[0, 0.5, 1])
    else:
        left, right = NORMS[norm](torch.diag(torch.tensor(sigma)), rank)
        rank, normed = left.shape[-1], torch.linalg.svdvals(left @ right.mT).numpy()
        scale = normed[0] / (sigma[0] or 1.0)
        after.set_title(f"norm {norm!r}: {scale:.2g} σ", y=1)
        _log(after, normed)
    after.set(ylabel="gain", xlabel="singular direction")
    numeric = numeric_rank(sigma)
    for axes, heights in ((before, sigma), (after, normed)):
        _bars(axes, heights, int(gains(sigma, rank).sum()))
        axes.axvline(rank + 0.5, color=RANK, lw=2, label=f"rank kept: {rank}")
        axes.axvline(numeric + 0.5, color=NUMERIC, lw=2, ls="--", label=f"numeric rank: {numeric}")
        axes.set_xlim(0.5, len(sigma) + 1.5)
    figure.legend(*before.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    return figure


def layers_figure(sigma: Float[np.ndarray, "l r"], rank: int) -> Figure:
    """All layers at once: a heat map of sigma / sigma_1 over layers and directions; beside it the effective rank and the energy that r keeps."""
    figure = _figure(9.6, 1.6 + 0.2 * len(sigma))
    heat, spread, kept = figure.subplots(1, 3, sharey=True, width_ratios=[5, 2, 2])
    relative = sigma / np.maximum(sigma.max(-1, keepdims=True), np.finfo(float).tiny)
    layers, directions = sigma.shape
    image = heat.imshow(
        relative,
        cmap=ORDERED.with_extremes(bad=ORDERED(0.0)),  # zeros have no logarithm
        norm=LogNorm(np.clip(relative.min(), NULL_DIRECTION, 0.1), 1),
        extent=(0.5, directions + 0.5, layers - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    heat.axvline(rank + 0.5, color=RANK, lw=2)
    heat.set(title="σ / σ1", xlabel=f"singular direction (r = {rank} kept)", ylabel="adapted layer", yticks=range(layers))
    figure.colorbar(image, ax=heat, pad=0.02)
    for axes, numbers, form, title in (
        (spread, effective_rank(sigma), "{:.1f}", "effective rank"),
        (kept, 100 * energy(sigma)[:, :rank].sum(-1), "{:.2f} %", f"energy kept by r = {rank}"),
    ):
        bars = axes.barh(range(layers), numbers, color=KEPT)
        axes.bar_label(bars, [form.format(number) for number in numbers], padding=3, size=9, color=TEXT)
        axes.set(title=title, xlim=(0, 1.45 * max(*numbers, 1.0)), xticks=[])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def stream_figure(sigma: Float[np.ndarray, "c l r"], rank: int, layer: int) -> Figure:
    """The spectrum of one adapted layer as the stream goes: a curve per chunk, and beside them its numeric and its effective rank.

    A curve ends where rounding noise begins; the bar of the same chunk has its colour.
    """
    _check_layer(layer, sigma.shape[1])
    figure, (curves, ranks) = _panels(3.4, [3, 2])
    read = np.arange(1, len(sigma) + 1)
    colours = ORDERED(np.linspace(0.9, 0.0, len(sigma)))
    shown = [values[: numeric_rank(values)] for values in sigma[:, layer]]
    _log(curves, np.concatenate(shown))
    for values, colour in zip(shown, colours, strict=True):
        curves.plot(np.arange(1, len(values) + 1), values, color=colour, lw=1.8)
    curves.axvline(rank + 0.5, color=RANK, lw=2)
    curves.set_title(f"S after every chunk, adapted layer {layer}", y=1)
    curves.set(xlabel="singular direction", ylabel="singular value σ")
    ranks.bar(read, [len(values) for values in shown], color=colours, label="numeric rank")
    ranks.plot(read, effective_rank(sigma[:, layer]), color=TEXT, marker="o", ms=4, label="effective rank")
    ranks.axhline(rank, color=RANK, lw=2, label=f"rank kept: {rank}")
    ranks.set_title("its rank", y=1)
    ranks.set(xlabel="chunks read", ylabel="directions", xticks=read[:: -(-len(read) // 8)])
    figure.legend(*ranks.get_legend_handles_labels(), loc="lower right", ncols=3, frameon=False)
    return figure


def overlap_figure(overlap: Float[np.ndarray, "b b"], names: Sequence[str], chance: float) -> Figure:
    """How much the subspaces of different contexts overlap (one layer of `overlaps`, or its mean); chance: that of random ones, r / p."""
    side = 2.2 + 0.55 * len(names)
    figure = _figure(side + 1.0, side)
    axes = figure.subplots()
    image = _numbered(axes, overlap, "{:.2f}", ORDERED, Normalize(chance, 1))
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_title("overlap of the kept subspaces")
    figure.colorbar(image, ax=axes, label=f"mean cos² of the principal angles\n(random subspaces: {chance:.2f})")
    return figure


def token_figure(tokens: Sequence[str], shares: Float[np.ndarray, "l n r"], layer: int, direction: int) -> Figure:
    """Which tokens wrote one singular direction of one adapted layer: their shares, painted on the text as far as it fits."""
    _check_layer(layer, len(shares))
    _check_direction(direction, shares.shape[-1])
    share = shares[layer, :, direction - 1]
    limit = np.abs(share).max() or 1.0
    colours = ScalarMappable(Normalize(-limit, limit), SIGNED)
    text = _running_text(tokens, 116)
    rows = min(text[-1][0] + 1, 40)
    height = 0.6 + 0.21 * rows  # in inches, as 0.21 for a row, 0.05 below the text, and 0.1 for the colour bar
    figure = _figure(8.4, height, layout="none")
    axes = figure.add_axes((0.01, 0.05 / height, 0.98, 0.21 * rows / height))
    bar = figure.add_axes((0.72, 1 - 0.2 / height, 0.24, 0.1 / height))
    _token_panel(axes, text, colours.to_rgba(share)[:, :3], rows=rows, size=8.4)
    axes.set_title(f"who wrote direction {direction} of adapted layer {layer}: the share of each token", loc="left")
    shades = colours.to_rgba(np.linspace(-limit, limit, SIGNED.N))[None]
    bar.imshow(shades, extent=(-limit, limit, 0, 1), aspect="auto", interpolation="nearest")
    bar.set(xticks=[-limit, 0, limit], yticks=[])
    bar.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def promotion_figure(logits: Float[np.ndarray, "r v"], vocabulary: Sequence[str], direction: int, answer: int) -> Figure:
    """The tokens that one direction promotes, fired either way; the answer's token is marked, and its place among all tokens given."""
    _check_direction(direction, len(logits))
    figure = _figure(8.4, 3.6)
    for axes, sign in zip(figure.subplots(1, 2), (1, -1), strict=True):
        signed = sign * logits[direction - 1]
        top = np.argsort(-signed, kind="stable")[:10]
        place = 1 + int((signed > signed[answer]).sum())
        axes.barh(range(len(top)), signed[top], color=[RANK if token == answer else KEPT for token in top])
        axes.set_yticks(range(len(top)), [repr(vocabulary[token]) for token in top], parse_math=False)
        axes.set_xlabel(f"logit\n{vocabulary[answer]!r}: {signed[answer]:+.2f}, place {place:,} of {len(signed):,}", parse_math=False)
        axes.set_title(f"direction {direction} fires {'+' if sign > 0 else '−'}")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def update_figure(norms: Float[np.ndarray, "l 2"], change: Float[np.ndarray, "l n"], answer: Sequence[str]) -> Figure:
    """How large every layer's update is beside its weights, and what becomes of each token of an answer when that layer is off."""
    layers = range(len(norms))
    figure = _figure(9.6, 1.9 + 0.22 * len(norms))
    size, effect = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    size.barh([layer + 0.2 for layer in layers], norms[:, 1], height=0.4, color=DROPPED, label="‖W‖")
    bars = size.barh([layer - 0.2 for layer in layers], norms[:, 0], height=0.4, color=KEPT, label="‖W_delta‖")
    size.bar_label(bars, [f"{delta / frozen:.1%}" for delta, frozen in norms], padding=3, size=8, color=TEXT)
    size.set(title="size of the update", xlabel="Frobenius norm", ylabel="adapted layer", yticks=layers)
    size.spines[["top", "right"]].set_visible(False)
    limit = np.abs(change).max() or 1.0
    image = _numbered(effect, change, "{:+.2f}", SIGNED, Normalize(-limit, limit))
    effect.set_xticks(range(len(answer)), [repr(token) for token in answer], rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    effect.set_title("a layer off: change of log p(answer token)")
    figure.colorbar(image, ax=effect, label="nats")
    figure.legend(*size.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
    return figure


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
    _token_panel(at["tokens"], _running_text(tokens, 38), [("#FBE8C8", "#D6EAF5")[n % 2] for n in range(len(tokens))], rows=22, size=7)
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


def _panels(height: float, ratios: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    """Two panels above a legend, everything in a fixed place: matplotlib's search for free room takes longer than the drawing."""
    figure = _figure(8.4, height, layout="none")
    panels = figure.subplots(1, 2, width_ratios=ratios)
    figure.subplots_adjust(left=0.085, right=0.985, top=1 - 0.32 / height, bottom=0.82 / height, wspace=0.22)
    for axes in panels:
        wide, high = axes.get_window_extent().size / DPI
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_label_coords(0.5, -0.26 / high)
        axes.yaxis.set_label_coords(-0.56 / wide, 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _check_layer(layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer} asked of {layers} adapted layers; choose 0 to {layers - 1}")


def _check_direction(direction: int, rank: int) -> None:
    if not 1 <= direction <= rank:
        raise ValueError(f"direction {direction} asked of {rank}; choose 1 to {rank}")


def _ink(background: Sequence[float]) -> str:
    """Dark text on light colours, white on dark ones."""
    return TEXT if np.dot(to_rgb(background), (0.3, 0.59, 0.11)) > 0.5 else "white"


def _log(axes: Axes, sigma: Float[np.ndarray, "*c r"]) -> None:
    """A log axis with plain numbers, from just below the smallest value, but not far below rounding noise."""
    largest = sigma.max(initial=0) or 1.0
    axes.set(yscale="log", ylim=(max(sigma.min(initial=largest) / 2, NULL_DIRECTION * largest / 100), 2 * largest))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter("{x:g}")


def _bars(axes: Axes, heights: Float[np.ndarray, " r"], kept: int) -> None:
    """One bar a direction, the first `kept` of them in blue."""
    edges = np.arange(len(heights) + 1) + 0.5
    for first, end, colour in ((0, kept, KEPT), (kept, len(heights), DROPPED)):
        if first < end:
            axes.add_artist(StepPatch(heights[first:end], edges[first : end + 1], color=colour))  # as axes.stairs, without its slow search for limits


def _matrix(axes: Axes, matrix: Float[np.ndarray, "row column"]) -> None:
    """A matrix as a heat map, its colours cut off at the 99th percentile, so that a few large entries do not bleach the rest."""
    limit = np.percentile(np.abs(matrix), 99) or 1.0
    axes.imshow(matrix, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _numbered(axes: Axes, matrix: Float[np.ndarray, "row column"], form: str, colours: Colormap, norm: Normalize) -> AxesImage:
    """A small matrix as a heat map, with its numbers in the cells."""
    image = axes.imshow(matrix, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    for (row, column), number in np.ndenumerate(matrix):
        axes.text(column, row, form.format(number), size=8, ha="center", va="center", color=_ink(image.to_rgba(number)[:3]))
    return image


def _running_text(tokens: Sequence[str], columns: int) -> list[tuple[int, int, str]]:
    """Row, first column and letters of every token, set as running text."""
    places, row, column = [], 0, 0
    for token in tokens:
        shown = token.replace("\n", " ")
        if column and column + len(shown) > columns:
            row, column = row + 1, 0
        if column == 0:
            shown = shown.lstrip()
        places.append((row, column, shown))
        column += len(shown)
    return places


MONOSPACED = FontProperties(family="monospace")


@cache
def _outline(letter: str) -> tuple[Float[np.ndarray, "point xy"], Int[np.ndarray, " point"]]:
    """A letter of the monospaced font as a path, in em."""
    points, codes = text_to_path.get_text_path(MONOSPACED, letter)
    return np.reshape(points, (-1, 2)) / text_to_path.FONT_SCALE, np.array(codes, dtype=int)


@cache
def _advance() -> float:
    """From one letter of that font to the next, in em."""
    return np.ptp(_outline("mm")[0][:, 0]) - np.ptp(_outline("m")[0][:, 0])


class Lettering(PathPatch):
    """A line of monospaced text as outlines: on its columns to the hair at any resolution, and drawn in a tenth of the time of a Text."""

    def __init__(self, row: int, column: int, line: str, height: float, color: str):
        self.row, self.column, self.line = row, column, line
        points, codes = zip(_outline(""), *map(_outline, line), strict=True)
        scaled = [p * (1 / _advance(), -height) + (column + n - 1, row + 0.5 + 0.36 * height) for n, p in enumerate(points)]
        super().__init__(Path(np.concatenate(scaled), np.concatenate(codes)), color=color, lw=0)


def _token_panel(axes: Axes, text: list[tuple[int, int, str]], tints: Sequence, rows: int, size: float) -> None:
    """Running text, each token on its tint, as far as it fits; the axes count letters and rows."""
    width, height = axes.get_window_extent().size
    em = size / 72 * DPI
    axes.set(xlim=(0, width / (_advance() * em)), ylim=(rows, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    fitting = [(*place, tint) for place, tint in zip(text, tints, strict=True) if place[0] < rows]
    corners = [[(x, y + 0.04), (x + len(shown), y + 0.04), (x + len(shown), y + 0.96), (x, y + 0.96)] for y, x, shown, _ in fitting]
    axes.add_collection(PolyCollection(corners, facecolors=[tint for *_, tint in fitting], lw=0), autolim=False)
    if len(fitting) < len(text):
        y, x, shown, _ = fitting[-1]
        fitting.append((y, x + len(shown), " …", "white"))
    for (y, ink), run in groupby(fitting, key=lambda token: (token[0], _ink(token[-1]))):
        _, columns, letters, _ = zip(*run, strict=True)
        axes.add_artist(Lettering(y, columns[0], "".join(letters), em * rows / height, ink))


def _spectrum_panel(axes: Axes, sigma: Float[np.ndarray, " r"], rank: int) -> None:
    """The spectrum before and after the norm on one log axis, relative to the largest value."""
    direction, kept = np.arange(1, len(sigma) + 1), gains(sigma, rank) > 0
    relative = sigma / (sigma.max() or 1.0)
    _bars(axes, relative, int(kept.sum()))
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
