"""minigen.spectra: the arrays are those of the equations, and the figures show the numbers they were given."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.patches import StepPatch

from minigen import generator
from minigen.evaluation import METHODS
from minigen.generator import NULL_DIRECTION, Adapter, ContextState, balanced_chunks, block_inputs, svd_norm
from minigen.spectra import (
    DPI,
    DROPPED,
    KEPT,
    RANK,
    SIGNED,
    Lettering,
    effective_rank,
    energy,
    gains,
    layers_figure,
    method_figure,
    method_picture,
    numeric_rank,
    overlap_figure,
    overlaps,
    promoted,
    promotion_figure,
    singular_values,
    spectrum_figure,
    stream_figure,
    stream_singular_values,
    switched_off,
    token_figure,
    token_shares,
    update_figure,
    update_norms,
)
from minigen.training import Target

SIGMA = np.array([[8.0, 4.0, 2.0, 1.0, 0.5], [9.0, 3.0, 1e-3, 1e-6, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])


def state(random, *sizes) -> ContextState:
    return ContextState(random(*sizes), torch.tensor([7] * sizes[1]))


def heights(axes) -> list[float]:
    """Of the bars, one by one or as the stairs that they make."""
    return [height for patch in axes.patches for height in (patch.get_data().values if isinstance(patch, StepPatch) else [patch.get_height()])]


def tinted(axes) -> tuple[list[tuple[float, float, float]], list]:
    """The boxes under the tokens of a text as (row, column, width), and their colours."""
    [boxes] = axes.collections
    corners = [path.vertices for path in boxes.get_paths()]
    return [(round(c[:, 1].min() - 0.04), c[:, 0].min(), np.ptp(c[:, 0])) for c in corners], boxes.get_facecolors()


def lines(axes) -> list[Lettering]:
    return [patch for patch in axes.patches if isinstance(patch, Lettering)]


def read_at(axes, box: tuple[float, float, float]) -> str:
    """What stands on a box."""
    row, column, width = map(int, box)
    return "".join(line.line[column - line.column :][:width] for line in lines(axes) if line.row == row and 0 <= column - line.column < len(line.line))


def marks(axes) -> dict[str, float]:
    """The vertical lines: label -> where."""
    return {line.get_label(): line.get_xdata()[0] for line in axes.lines}


def texts(figure) -> str:
    axes = [text.get_text() for a in figure.axes for text in a.texts]
    return "\n".join([*(text.get_text() for text in figure.texts), *axes, *(line.line for a in figure.axes for line in lines(a))])


def pixels(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


# ------------------------------------------------------------------------------------------------ the numbers


def test_singular_values_are_those_of_every_layer_of_the_row(random):
    it = state(random, 3, 2, 7, 5)
    sigma = singular_values(it, row=1)
    assert sigma.shape == (3, 5)
    for layer in range(3):
        S = it.S[layer, 1].double().numpy()
        np.testing.assert_allclose(sigma[layer] ** 2, np.linalg.eigvalsh(S.T @ S)[::-1], rtol=1e-4)


def test_singular_values_of_a_state_that_carries_gradients(random):
    it = ContextState(random(2, 1, 5, 3).requires_grad_(), torch.tensor([4]))
    assert isinstance(singular_values(it), np.ndarray)


@pytest.mark.parametrize("sigma, rank", [(SIGMA[0], 5), (SIGMA[1], 3), (SIGMA[2], 5), (np.zeros(5), 0), (np.array([1, 2, 0.5]) * NULL_DIRECTION, 3)])
def test_numeric_rank(sigma, rank):
    assert numeric_rank(sigma) == rank


@pytest.mark.parametrize("content, rank", [(5, 3), (2, 4), (5, 5)])
def test_gains_are_what_the_norm_makes_of_the_spectrum(random, content, rank):
    S = random(7, content) @ random(content, 5)
    left, right = svd_norm(S, rank)
    sigma = torch.linalg.svdvals(S).numpy()
    np.testing.assert_allclose(gains(sigma, rank), torch.linalg.svdvals(left @ right.mT).numpy(), atol=1e-5)
    assert gains(sigma, rank).sum() == min(content, rank)


@pytest.mark.parametrize("sigma", [*SIGMA, np.array([3.0, 4.0, 0.0])])
def test_energy_and_effective_rank(sigma):
    p = [value**2 / math.fsum(sigma**2) for value in sigma]
    np.testing.assert_allclose(energy(sigma), p)
    np.testing.assert_allclose(effective_rank(sigma), math.exp(-math.fsum(share * math.log(share) for share in p if share)))


def test_effective_rank_counts_equal_directions():
    np.testing.assert_allclose(effective_rank(np.array([[5.0, 5, 5, 5], [2, 2, 0, 0], [7, 0, 0, 0]])), [4, 2, 1])
    assert (energy(np.zeros((2, 3))) == 0).all()


@pytest.mark.parametrize("encode", ["parallel", "sequential"])
def test_stream_singular_values_follow_the_sum(llama, generator_for, tokens, encode):
    generator, ids = generator_for(llama, encode=encode, chunk=5), tokens(2, 17)
    sigma = stream_singular_values(generator.read_chunks(llama, ids), row=1)
    assert sigma.shape == (4, 3, 12)
    S = 0
    for t, chunk in enumerate(generator.read_chunks(llama, ids)):
        S = S + chunk.S[:, 1].double().numpy()
        np.testing.assert_allclose(sigma[t], np.linalg.svd(S, compute_uv=False), rtol=1e-3, atol=1e-4)
        read = ids[1, : 5 * (t + 1)].tolist()  # every token adds a direction, while there are any; before the first block, every new one
        assert [numeric_rank(values) for values in sigma[t]] == [min(12, count) for count in (len(set(read)), len(read), len(read))]
    np.testing.assert_array_equal(sigma[-1], singular_values(generator.read(llama, ids), row=1))


def test_overlap_of_planes_at_a_known_angle():
    angle = 0.7
    tilted = torch.tensor([[1.0, 0, 0], [0, math.cos(angle), math.sin(angle)]])
    S = torch.zeros(3, 1, 5, 4)
    S[0, 0, :3, :3] = torch.diag(torch.tensor([3.0, 2, 0]))
    S[1, 0, :3, :2] = tilted.T * torch.tensor([5.0, 4])
    S[2, 0, 3, 3] = 1.0
    found = overlaps([ContextState(one[None], torch.tensor([1])) for one in S], rank=2)
    close = (1 + math.cos(angle) ** 2) / 2
    np.testing.assert_allclose(found, [[[1, close, 0], [close, 1, 0], [0, 0, 1]]], atol=1e-6)


def test_overlaps_are_the_mean_squared_cosines_of_all_rows_of_all_states(random):
    batches = [state(random, 2, 2, 7, 5), state(random, 2, 1, 7, 5)]
    found = overlaps(batches, rank=3)
    S = np.concatenate([batch.S.double().numpy() for batch in batches], axis=1)
    assert found.shape == (2, 3, 3)
    for layer, one, other in np.ndindex(found.shape):
        U, V = (np.linalg.svd(S[layer, row])[0][:, :3] for row in (one, other))
        np.testing.assert_allclose(found[layer, one, other], np.mean(np.linalg.svd(U.T @ V, compute_uv=False) ** 2), rtol=1e-4)


def test_overlap_counts_only_directions_that_hold_something(random):
    short = random(7, 1) @ random(1, 5)
    longer = 3 * short + random(7, 1) @ random(1, 5)
    U = torch.linalg.svd(longer)[0][:, :2]
    within = (U.T @ torch.linalg.svd(short)[0][:, 0]).square().sum()
    found = overlaps([ContextState(torch.stack([short, longer])[None], torch.tensor([1, 2]))], rank=4)
    np.testing.assert_allclose(found[0], [[1, within], [within, 1]], rtol=1e-4)


def test_an_empty_state_overlaps_with_nothing():
    assert (overlaps([ContextState(torch.zeros(1, 2, 5, 4), torch.tensor([0, 0]))], rank=2) == 0).all()


def test_overlap_of_random_subspaces_is_r_over_p(random):
    found = overlaps([state(random, 1, 60, 16, 16)], rank=4)[0]
    np.testing.assert_allclose(found[~np.eye(60, dtype=bool)].mean(), 4 / 16, atol=0.01)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("length", [17, 4])
def test_token_shares_are_those_of_the_equation(any_lm, generator_for, tokens, length, ours):
    generator, ids = generator_for(any_lm, chunk=6, rank=3, previous=ours, embedding=ours, gate=ours), tokens(1, length)
    shares = token_shares(any_lm, generator, ids)
    assert shares.shape == (3, length, 3)
    chunks = [block_inputs(any_lm, generator.layers, input_ids=part[None]) for part in balanced_chunks(ids[0], 6)]
    embeddings = any_lm.get_input_embeddings()(ids)[0].double().numpy()
    for layer, g in enumerate(generator.by_layer):
        A2, B1, norm = (weight.double().numpy() for weight in (g.A2, g.B1, g.norm))
        H, keys, values = [], [], []
        for chunk in chunks:
            before = np.zeros(len(norm))
            for h in chunk[layer][0].double().numpy():
                H.append(norm * h / math.sqrt(np.mean(h**2) + 1e-6))
                keys.append((np.concatenate([H[-1], before]) if ours else H[-1]) @ B1)
                e = embeddings[len(values)]
                both = np.concatenate([H[-1], e / math.sqrt(np.mean(e**2) + 1e-6)])
                values.append(A2 @ both / (1 + np.exp(-both @ g.gate.double().numpy())) if ours else A2 @ H[-1])
                before = H[-1]
        U, sigma, Vh = np.linalg.svd(sum(np.outer(value, key) for value, key in zip(values, keys, strict=True)))
        for n, (value, key) in enumerate(zip(values, keys, strict=True)):
            for k in range(3):
                np.testing.assert_allclose(shares[layer, n, k], (U[:, k] @ value) * (key @ Vh[k]) / sigma[k], atol=1e-4)


@pytest.mark.parametrize("encode", ["parallel", "sequential"])
@pytest.mark.parametrize("tasks", [{}, {"task_blocks": (0, 1), "task_values": 5}])
def test_token_shares_of_a_direction_sum_to_one(llama, generator_for, tokens, encode, tasks):
    generator = generator_for(llama, encode=encode, chunk=5, **tasks)
    np.testing.assert_allclose(token_shares(llama, generator, tokens(1, 23)).sum(1), 1, atol=1e-4)
    assert "contribution" not in vars(generator)


def test_null_directions_have_no_writer(llama, generator_for, tokens):
    shares = token_shares(llama, generator_for(llama), tokens(1, 2))
    np.testing.assert_allclose(shares.sum(1), [[1, 1, 0, 0]] * 3, atol=1e-4)
    np.testing.assert_allclose(token_shares(llama, generator_for(llama), tokens(1, 1))[:, 0], [[1, 0, 0, 0]] * 3, atol=1e-5)


def test_token_shares_take_one_text(llama, generator_for, tokens):
    with pytest.raises(ValueError, match=r"shares of 2 texts asked; give one at a time"):
        token_shares(llama, generator_for(llama), tokens(2, 5))


@pytest.fixture
def written(llama, generator_for, tokens):
    """A tiny Llama, its generator, and the adapters of two texts."""
    generator = generator_for(llama)
    return llama, generator, generator.write(generator.read(llama, tokens(2, 9)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_promoted_is_the_logit_lens(tiny_lm, generator_for, tokens, random, family):
    lm = tiny_lm(family)
    last = lm.model.norm if family == "llama" else lm.transformer.ln_f
    last.weight.data = weight = 1 + random(32)
    if family == "gpt2":
        last.bias.data = random(32)
    generator = generator_for(lm)
    state = generator.read(lm, tokens(2, 9))
    name = generator.layers[1].name
    found = promoted(lm, generator.write(state), name, row=1)
    assert found.shape == (4, 61)
    for k, u in enumerate(np.linalg.svd(state.S[1, 1].numpy())[0].T[:4]):
        direction = generator.by_layer[1].A1.numpy() @ u
        centred = direction - direction.mean() if family == "gpt2" else direction
        lens = lm.lm_head.weight.numpy() @ (weight.numpy() * centred / math.sqrt(np.mean(centred**2) + 1e-5))
        np.testing.assert_allclose(found[k] * np.sign(found[k] @ lens), lens, atol=2e-2 * np.abs(lens).max())


def test_promoted_needs_a_layer_that_writes_into_the_stream(llama, generator_for, tokens):
    generator = generator_for(llama, targets=("gate_proj",))
    adapter = generator.write(generator.read(llama, tokens(1, 9)))
    with pytest.raises(ValueError, match=r"gate_proj asked, but its 40 outputs are not the residual stream \(32 wide\); choose"):
        promoted(llama, adapter, "model.layers.0.mlp.gate_proj")


def test_promoted_needs_a_last_norm(written):
    lm, generator, adapter = written
    lm.model.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="the last norm of LlamaForCausalLM was not found"):
        promoted(lm, adapter, generator.layers[0].name)


def test_update_norms(written):
    lm, _, adapter = written
    found = update_norms(lm, adapter, row=1)
    for layer, name in enumerate(adapter.down):
        delta = adapter.scale * adapter.up[name][1].numpy() @ adapter.down[name][1].numpy()
        W = lm.get_submodule(name).weight.numpy()
        np.testing.assert_allclose(found[layer], [math.sqrt((delta**2).sum()), math.sqrt((W**2).sum())], rtol=1e-4)


def test_switched_off_is_the_change_of_the_merged_weights(written, tokens):
    lm, _, adapters = written
    adapter, ids = adapters[[1]], tokens(1, 7)

    def log_probabilities(names) -> torch.Tensor:
        chosen = Adapter({name: adapter.down[name] for name in names}, {name: adapter.up[name] for name in names}, adapter.scale)
        chosen.merge_into(lm)
        said = lm(ids).logits[0].log_softmax(-1)
        chosen.restore(lm)
        return said[3:6].gather(1, ids[0, 4:, None])[:, 0]

    first, second, third = adapter.down
    with_all = log_probabilities([first, second, third])
    without_one = [log_probabilities(names) for names in ([second, third], [first, third], [first, second])]
    change = switched_off(lm, adapter, Target(ids[0].tolist(), 4))
    np.testing.assert_allclose(change, torch.stack(without_one) - with_all, atol=1e-4)
    assert np.abs(change).min() > 1e-3


# ----------------------------------------------------------------------------------------- the spectrum's figure


@pytest.mark.parametrize("layer, kept", [(0, 3), (1, 3), (2, 3)])
def test_spectrum_figure_shows_the_numbers(layer, kept):
    figure = spectrum_figure(SIGMA, rank=3, layer=layer)
    before, after = figure.axes
    np.testing.assert_allclose(heights(before), SIGMA[layer])
    assert heights(after) == [1.0] * kept + [0.0] * (5 - kept)
    assert before.get_yscale() == "log" and after.get_yscale() == "linear"
    assert before.get_title() == f"S, adapted layer {layer}"
    assert "gain one" in after.get_title()


@pytest.mark.parametrize("layer, rank, numeric", [(0, 2, 5), (1, 4, 3), (2, 5, 5)])
def test_spectrum_figure_marks_both_ranks(layer, rank, numeric):
    for axes in spectrum_figure(SIGMA, rank, layer).axes:
        assert marks(axes) == {f"rank kept: {rank}": rank + 0.5, f"numeric rank: {numeric}": numeric + 0.5}
        blue = [bars.get_data().edges.tolist() for bars in axes.patches if bars.get_facecolor() == to_rgba(KEPT)]
        grey = [bars.get_data().edges.tolist() for bars in axes.patches if bars.get_facecolor() == to_rgba(DROPPED)]
        edges, kept = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], min(rank, numeric)
        assert blue == [edges[: kept + 1]] and grey == [edges[kept:]] * (kept < 5)


@pytest.mark.parametrize("norm", generator.NORMS)
def test_spectrum_figure_shows_what_any_norm_makes_of_S(random, norm):
    S = random(3, 7, 5)
    sigma = torch.linalg.svdvals(S).numpy()
    left, right = generator.NORMS[norm](S[1], 3)
    before, after = spectrum_figure(sigma, 3, 1, norm).axes
    np.testing.assert_allclose(heights(before), sigma[1])
    np.testing.assert_allclose(heights(after), torch.linalg.svdvals(left @ right.mT), atol=1e-6)
    assert before.lines[0].get_xdata()[0] == (3 if norm in ("svd", "polar") else 5) + 0.5
    assert after.get_ylim()[1] > max(heights(after))
    assert ("gain one" in after.get_title()) == (norm in ("svd", "polar"))


@pytest.mark.parametrize("norm", generator.NORMS)
def test_spectrum_figure_of_nothing(norm):
    assert heights(spectrum_figure(np.zeros((2, 5), dtype=np.float32), 3, 1, norm).axes[1]) == [0.0] * 5


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(ValueError, match=f"layer {layer} asked of 3 adapted layers; choose 0 to 2"):
        spectrum_figure(SIGMA, 2, layer)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sigma", [SIGMA, np.zeros((2, 5)), np.ones((2, 1))], ids=["usual", "zero", "one direction"])
def test_spectrum_figure_draws_on_white_without_a_warning(sigma):
    image = pixels(spectrum_figure(sigma, 1, 0))
    assert (image[0, 0] == 255).all() and (image[..., 3] == 255).all()  # opaque, so readable on a dark page
    assert image.min() < 100


# ------------------------------------------------------------------------------------------- the other figures

TOKENS = ["The", " lamp", " is", " blue", ".\n", " It", " cost", " $5", "$."]
SHARES = np.array([[[0.1, -0.2], [0.5, 0.1], [0, 0], [0.2, 0.3], [0, 0], [0, 0.2], [0.1, 0.1], [0.3, 0.1], [-0.2, 0.4]], np.eye(9, 2)])
OVERLAP = np.array([[1.0, 0.61, 0.4], [0.61, 1.0, 0.25], [0.4, 0.25, 1.0]])
NAMES = ["lamp", "lamp again", "$other$"]
LOGITS = np.array([np.linspace(-2, 3, 13), np.cos(np.arange(13))])
VOCABULARY = [f" word{n}" for n in range(12)] + ["$1$"]
NORMS = np.array([[1.0, 10.0], [3.0, 12.0], [0.5, 20.0]])
CHANGE = np.array([[-1.5, 0.25], [0.0, -3.0], [0.125, 0.5]])
STREAM = np.array([[[4.0, 1e-7, 0, 0], [1, 0, 0, 0]], [[5, 2, 1e-6, 0], [2, 2, 0, 0]], [[6, 3, 1, 0.5], [3, 2, 2, 2]]])

FIGURES = {
    "layers": lambda: layers_figure(SIGMA, 2),
    "layers, nothing read": lambda: layers_figure(np.zeros((2, 5)), 2),
    "stream": lambda: stream_figure(STREAM, 2, 0),
    "overlap": lambda: overlap_figure(OVERLAP, NAMES, 0.25),
    "token": lambda: token_figure(TOKENS, SHARES, 0, 1),
    "token, nothing written": lambda: token_figure(TOKENS, 0 * SHARES, 0, 1),
    "promotion": lambda: promotion_figure(LOGITS, VOCABULARY, 1, 12),
    "update": lambda: update_figure(NORMS, CHANGE, [" $5", "$."]),
    "update, nothing changed": lambda: update_figure(NORMS, 0 * CHANGE, [" $5", "$."]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("build", FIGURES.values(), ids=FIGURES)
def test_figures_draw_on_white_without_a_warning(build):
    image = pixels(build())
    assert (image[0, 0] == 255).all() and (image[..., 3] == 255).all()
    assert image.min() < 100


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_layers_figure_shows_the_numbers():
    heat, spread, kept, _ = layers_figure(SIGMA, rank=2).axes
    [image] = heat.images
    np.testing.assert_allclose(image.get_array(), [[1, 0.5, 0.25, 0.125, 0.0625], [1, 1 / 3, 1e-3 / 9, 1e-6 / 9, 0], [1] * 5])
    assert (image.norm.vmin, image.norm.vmax) == (NULL_DIRECTION, 1)
    assert image.get_extent() == [0.5, 5.5, 2.5, -0.5]  # direction 1 is drawn around 1, layer 0 on top
    assert heat.lines[0].get_xdata()[0] == 2.5
    np.testing.assert_allclose(widths(spread), [effective_rank(sigma) for sigma in SIGMA])
    np.testing.assert_allclose(widths(kept), [100 * 80 / 85.25, 100, 40], rtol=1e-6)
    assert [text.get_text() for text in kept.texts] == ["93.84 %", "100.00 %", "40.00 %"]
    assert spread.texts[2].get_text() == "5.0" and "r = 2" in kept.get_title()


@pytest.mark.parametrize("layer, numeric", [(0, [1, 2, 4]), (1, [1, 2, 4])])
def test_stream_figure_shows_the_numbers(layer, numeric):
    curves, ranks = stream_figure(STREAM, rank=2, layer=layer).axes
    *drawn, kept = curves.lines
    for t, line in enumerate(drawn):
        np.testing.assert_array_equal(line.get_xdata(), range(1, numeric[t] + 1))
        np.testing.assert_array_equal(line.get_ydata(), STREAM[t, layer, : numeric[t]])
        assert to_rgba(line.get_color()) == ranks.patches[t].get_facecolor()
    assert kept.get_xdata()[0] == 2.5 and curves.get_yscale() == "log"
    assert heights(ranks) == numeric
    np.testing.assert_array_equal(ranks.lines[0].get_xydata(), np.stack([[1, 2, 3], effective_rank(STREAM[:, layer])], axis=1))
    assert ranks.lines[1].get_ydata()[0] == 2
    assert f"layer {layer}" in curves.get_title()


def test_overlap_figure_shows_the_numbers():
    axes, bar = overlap_figure(OVERLAP, NAMES, chance=0.25).axes
    [image] = axes.images
    np.testing.assert_array_equal(image.get_array(), OVERLAP)
    assert (image.norm.vmin, image.norm.vmax) == (0.25, 1)
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(column, row): f"{OVERLAP[row, column]:.2f}" for row in range(3) for column in range(3)}
    assert labels(axes.xaxis) == labels(axes.yaxis) == NAMES
    assert "cos²" in bar.get_ylabel() and "0.25" in bar.get_ylabel()


@pytest.mark.parametrize("layer, direction", [(0, 1), (0, 2), (1, 2)])
def test_token_figure_paints_the_shares(layer, direction):
    axes, bar = token_figure(TOKENS, SHARES, layer, direction).axes
    share = SHARES[layer, :, direction - 1]
    limit = np.abs(share).max()
    boxes, tints = tinted(axes)
    assert [read_at(axes, box).strip() for box in boxes] == [token.strip() for token in TOKENS]
    np.testing.assert_allclose(tints, [SIGNED((value + limit) / (2 * limit)) for value in share])
    np.testing.assert_allclose(bar.get_xlim(), [-limit, limit])
    assert f"direction {direction} of adapted layer {layer}" in axes.get_title("left")


def test_every_letter_stands_in_its_column():
    narrow, wide = (Lettering(3, 7, letter * 5, 0.5, "black").get_path() for letter in ("i", "W"))
    for path in (narrow, wide):
        letters = path.vertices.reshape(5, -1, 2)
        np.testing.assert_allclose(letters - letters[:1], np.broadcast_to(np.arange(5)[:, None, None] * (1, 0), letters.shape), atol=1e-9)
        assert ((letters[0, :, 0] > 7 - 0.01) & (letters[0, :, 0] < 8.01)).all() and ((letters[..., 1] > 3) & (letters[..., 1] < 4)).all()
    assert len(narrow.vertices) != len(wide.vertices)
    assert len(Lettering(0, 0, " ", 0.5, "black").get_path().vertices) == 0


def test_token_figure_sets_running_text_and_breaks_off_a_long_one():
    tokens = [f" word{n}" for n in range(700)]
    axes = token_figure(tokens, np.ones((1, 700, 1)), 0, 1).axes[0]
    boxes, _ = tinted(axes)
    assert [read_at(axes, box).strip() for box in boxes] == [token.strip() for token in tokens[: len(boxes)]]
    assert boxes == sorted(boxes)
    assert all(x + width <= axes.get_xlim()[1] for _, x, width in boxes)
    for (row, x, width), (next_row, next_x, _) in pairwise(boxes):
        assert next_x == (x + width if next_row == row else 0)
    assert lines(axes)[-1].line.endswith(" …") and len(boxes) < 700
    assert all(0 <= line.row < axes.get_ylim()[0] for line in lines(axes))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: stream_figure(STREAM, 2, 2), "layer 2 asked of 2 adapted layers; choose 0 to 1"),
        (lambda: token_figure(TOKENS, SHARES, -1, 1), "layer -1 asked of 2 adapted layers; choose 0 to 1"),
        (lambda: token_figure(TOKENS, SHARES, 0, 0), "direction 0 asked of 2; choose 1 to 2"),
        (lambda: promotion_figure(LOGITS, VOCABULARY, 3, 0), "direction 3 asked of 2; choose 1 to 2"),
    ],
)
def test_a_layer_or_direction_that_is_not_there(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("direction, answer", [(1, 12), (2, 6), (2, 1)])
def test_promotion_figure_ranks_both_ends(direction, answer):
    for axes, sign in zip(promotion_figure(LOGITS, VOCABULARY, direction, answer).axes, (1, -1), strict=True):
        scores = {token: sign * value for token, value in enumerate(LOGITS[direction - 1])}
        ordered = sorted(scores, key=scores.get, reverse=True)
        assert labels(axes.yaxis) == [repr(VOCABULARY[token]) for token in ordered[:10]]
        np.testing.assert_array_equal(widths(axes), [scores[token] for token in ordered[:10]])
        marked = [bar.get_facecolor() == to_rgba(RANK) for bar in axes.patches]
        assert marked == [token == answer for token in ordered[:10]]
        assert f"{VOCABULARY[answer]!r}: {scores[answer]:+.2f}, place {1 + ordered.index(answer)} of 13" in axes.get_xlabel()
        assert axes.yaxis_inverted()


def test_update_figure_shows_the_numbers():
    size, effect, _ = update_figure(NORMS, CHANGE, [" $5", "$."]).axes
    assert widths(size) == [10, 12, 20, 1, 3, 0.5]
    assert [bar.get_facecolor() for bar in size.patches] == [to_rgba(DROPPED)] * 3 + [to_rgba(KEPT)] * 3
    np.testing.assert_allclose([bar.get_y() + bar.get_height() / 2 for bar in size.patches], [0.2, 1.2, 2.2, -0.2, 0.8, 1.8])
    assert [text.get_text() for text in size.texts] == ["10.0%", "25.0%", "2.5%"]
    np.testing.assert_array_equal(effect.images[0].get_array(), CHANGE)
    assert (effect.images[0].norm.vmin, effect.images[0].norm.vmax) == (-3, 3)
    assert [text.get_text() for text in effect.texts] == [f"{change:+.2f}" for change in CHANGE.flat]
    assert labels(effect.xaxis) == ["' $5'", "'$.'"]


# ------------------------------------------------------------------------------------------- the method's picture

ANSWERS = {
    "closed-book": ["red", "two"],
    "prompting": ["blue", "a very long answer that will not fit into the few lines which stand there for it, so that at its end it must be cut"],
    "adapter": ["", "$5 or $6"],
}


@pytest.fixture
def picture(random):
    S, up, down = random(7, 5).numpy(), random(13, 3).numpy(), random(3, 11).numpy()
    return S, up, down, method_figure(TOKENS, S, 3, up, down, ["What colour?", "What price?"], ANSWERS)


def test_method_figure_shows_the_matrices(picture):
    S, up, down, figure = picture
    shown = [image.get_array() for axes in figure.axes for a in [axes, *axes.child_axes] for image in a.images]
    for matrix, image in zip([S, up, down], shown, strict=True):
        np.testing.assert_array_equal(image, matrix)


def test_method_figure_shows_the_spectrum_and_what_the_norm_makes_of_it(picture):
    S, _, _, figure = picture
    axes = figure.axes[2]
    sigma = np.linalg.svd(S, compute_uv=False)
    np.testing.assert_allclose(heights(axes), sigma / sigma[0], rtol=1e-5)
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 1], [2, 1], [3, 1]])


def test_method_figure_says_sizes_questions_and_answers(picture):
    said = texts(picture[-1])
    sizes = ["9 tokens", "7 × 5", "rank 3", "A1 U   13 × 3", "3 × 11"]
    for words in [*sizes, "What colour?", "What price?", *ANSWERS, "red", "blue", "two", "$5 or $6", "-", "…"]:
        assert words in said
    assert "must be cut" not in said
    assert all(token.strip() in said for token in TOKENS)


def test_method_figure_breaks_off_a_long_text(random):
    S, up, down = random(7, 5).numpy(), random(13, 3).numpy(), random(3, 11).numpy()
    figure = method_figure([f" word{n}" for n in range(999)], S, 3, up, down, ["Q"], {"adapter": ["A"]})
    tokens = figure.axes[0]
    assert "…" in lines(tokens)[-1].line
    assert all(0 <= line.row < tokens.get_ylim()[0] for line in lines(tokens))
    assert all(x + width <= tokens.get_xlim()[1] for _, x, width in tinted(tokens)[0])


@pytest.mark.filterwarnings("error")
def test_method_figure_is_small_enough_for_a_readme(picture):
    image = pixels(picture[-1])
    assert image.shape[1] == 1000 and DPI <= 100
    assert (image[..., 3] == 255).all()


def test_method_picture_reads_and_answers(llama, generator_for, monkeypatch):
    class Tokenizer:
        def __call__(self, text, return_tensors=None):
            ids = [ord(c) % 50 for c in text]
            return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

        def decode(self, ids):
            return chr(97 + ids[0] % 26)

    from minigen.evaluation import Reader

    for name in METHODS:
        monkeypatch.setitem(METHODS, name, lambda reader, text, questions, name=name: [f"{name} says {q}" for q in questions])
    reader = Reader(llama, Tokenizer(), generator_for(llama))
    figure = method_picture(reader, "a little text", ["one?", "two?"], layer=1)
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), reader.read("a little text").S[1, 0].numpy())
    assert all(f"{name} says {q}" in texts(figure) for name in METHODS for q in ("one?", "two?"))
    assert "13 tokens" in texts(figure)
