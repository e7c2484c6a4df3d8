"""minigen.spectra: the figures show the numbers they were given, and the slider redraws."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from minigen.evaluation import METHODS
from minigen.generator import NULL_DIRECTION, ContextState, svd_norm
from minigen.spectra import (
    DPI,
    KEPT,
    gains,
    method_figure,
    method_picture,
    numeric_rank,
    singular_values,
    spectrum_explorer,
    spectrum_figure,
)

SIGMA = np.array([[8.0, 4.0, 2.0, 1.0, 0.5], [9.0, 3.0, 1e-3, 1e-6, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])


def state(random, *sizes) -> ContextState:
    return ContextState(random(*sizes), torch.tensor([7] * sizes[1]))


def heights(axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def marks(axes) -> dict[str, float]:
    """The vertical lines: label -> where."""
    return {line.get_label(): line.get_xdata()[0] for line in axes.lines}


def texts(figure) -> str:
    axes = [text.get_text() for a in figure.axes for text in a.texts]
    return "\n".join([*(text.get_text() for text in figure.texts), *axes])


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
        blue = [bar.get_facecolor() == to_rgba(KEPT) for bar in axes.patches]
        assert blue == [n < min(rank, numeric) for n in range(5)]


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


def test_slider_redraws():
    explorer = spectrum_explorer(SIGMA, rank=3)
    slider = explorer.kwargs_widgets[0]
    assert (slider.min, slider.max) == (0, 2)
    for layer in (1, 2):
        slider.value = layer
        assert isinstance(explorer.result, Figure)
        assert explorer.result.axes[0].get_title() == f"S, adapted layer {layer}"
        np.testing.assert_allclose(heights(explorer.result.axes[0]), SIGMA[layer])


# ------------------------------------------------------------------------------------------- the method's picture

TOKENS = ["The", " lamp", " is", " blue", ".\n", " It", " cost", " $5", "."]
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
    assert "…" in tokens.texts[-1].get_text()
    assert all(0 <= text.get_position()[1] <= tokens.get_ylim()[0] for text in tokens.texts)
    assert all(box.get_x() + box.get_width() <= tokens.get_xlim()[1] for box in tokens.patches)


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
