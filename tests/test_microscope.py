"""minigen.microscope: every control redraws the right arrays, every bad input ends in a readable line, every other error is raised."""

import time
from html import escape, unescape

import numpy as np
import pytest
import torch
from ipywidgets.widgets.widget import CallbackDispatcher
from test_spectra import SIGMA, heights, read_at, tinted

from minigen import load_generator, load_lm, microscope
from minigen.evaluation import METHODS, Reader, closed_book
from minigen.generator import NORMS
from minigen.microscope import (
    LONGEST,
    Comparison,
    Microscope,
    Surgery,
    answer_and_probability,
    examine,
    operated,
    pieces,
    spectrum_explorer,
    with_config,
)
from minigen.models import word_tokenizer
from minigen.spectra import SIGNED, Figure, overlaps, stream_singular_values, token_shares
from minigen.tasks import DATA, BadData
from minigen.training import question_prompt

TEXT = "The lamp is red. It stood in the hall for years, and cost 5 crowns."
QUESTION = "What colour is the lamp?"


def _strictly(self, *args, **kwargs) -> None:
    for callback in self.callbacks:
        callback(*args, **kwargs)


@pytest.fixture(autouse=True)
def errors_in_callbacks_are_raised(monkeypatch):
    """ipywidgets only logs what a button's callback raises; here it fails the test, as it does anyway for what observes a value."""
    monkeypatch.setattr(CallbackDispatcher, "__call__", _strictly)


@pytest.fixture
def reader(lm_folder, generator_for) -> Reader:
    lm, tokenizer = load_lm(str(lm_folder))
    return Reader(lm, tokenizer, generator_for(lm))


@pytest.fixture
def word_reader(tiny_lm, generator_for) -> Reader:
    """One whose tokens are words, so that there are unknown ones."""
    lm = tiny_lm("gpt2")
    words = f"The lamp is red colour What It stood in hall years {' '.join(f'word{n}' for n in range(44))}".split()
    return Reader(lm, word_tokenizer(words, 64), generator_for(lm))


@pytest.fixture(scope="module")
def toy() -> Reader:
    lm, tokenizer = load_lm("toy")
    return Reader(lm, tokenizer, load_generator(DATA / "toy", lm))


@pytest.fixture
def figures(monkeypatch) -> dict[bytes, Figure]:
    """What an Image shows -> the figure it was drawn from."""
    drawn = {}

    def keep(figure: Figure) -> bytes:
        name = f"figure {len(drawn)}".encode()
        drawn[name] = figure
        return name

    monkeypatch.setattr(microscope, "_png", keep)
    return drawn


@pytest.fixture
def no_lm(monkeypatch):
    """A function: from now on, this reader's LM fails whoever calls it."""

    def forbid(reader: Reader) -> None:
        def forward(*args, **kwargs):
            raise AssertionError("the LM was called")

        monkeypatch.setattr(reader.lm, "forward", forward)
        monkeypatch.setattr(reader.lm.base_model, "forward", forward)

    return forbid


def said(widget) -> str:
    return unescape(widget.status.value)


def history(widget) -> list[str]:
    """Every status from now on."""
    lines = []
    widget.status.observe(lambda change: lines.append(unescape(change["new"])), "value")
    return lines


def read(reader: Reader, text: str = TEXT, question: str = "") -> Microscope:
    widget = Microscope(reader, text, question)
    widget.read_button.click()
    assert said(widget).startswith("read ") or question
    return widget


def painted(figure: Figure) -> tuple[str, list[tuple]]:
    """The text of a token figure, and the colours under it."""
    axes = figure.axes[0]
    boxes, tints = tinted(axes)
    return "".join(read_at(axes, box) for box in boxes), tints


def colours(share: np.ndarray) -> list[tuple]:
    limit = np.abs(share).max()
    return [SIGNED((value + limit) / (2 * limit)) for value in share]


# ------------------------------------------------------------------------------------------------ the numbers


def test_pieces_are_the_text(reader, word_reader):
    for each, text in [(reader, "Héllo 中 🙂\n is  it?"), (word_reader, "The lamp  is\nblorp red?")]:
        ids, parts = pieces(each.tokenizer, text)
        assert ids == each.tokenizer(text).input_ids and "".join(parts) == text


@pytest.mark.parametrize("encode", ["parallel", "sequential"])
def test_examine_keeps_what_the_figures_need(reader, encode):
    reader = with_config(reader, encode=encode)
    reading, ids = examine(reader, TEXT), reader.tokenizer(TEXT, return_tensors="pt").input_ids
    count = ids.shape[1]
    assert reading.text == "".join(reading.tokens) == TEXT
    assert len(reading.tokens) == reading.ends[-1] == reading.state.tokens.item() == count
    assert len(reading.ends) == len(reading.shares) == -(-count // 8) > 2
    np.testing.assert_array_equal(reading.sigma, stream_singular_values(reader.generator.read_chunks(reader.lm, ids)))
    torch.testing.assert_close(reading.state.S, reader.read(TEXT).S)
    for end, sigma, shares in zip(reading.ends, reading.sigma, reading.shares, strict=True):
        np.testing.assert_array_equal(shares, token_shares(reader.lm, reader.generator, ids[:, :end]))
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-3)
        S = reader.generator.read(reader.lm, ids[:, :end]).S[:, 0]  # the text up to there would have left just this
        np.testing.assert_allclose(sigma, torch.linalg.svdvals(S), rtol=1e-3, atol=1e-4)


def test_with_config_leaves_the_reader_alone(reader):
    other = with_config(reader, norm="none", rank=2)
    assert (other.generator.config.norm, other.generator.config.rank) == ("none", 2)
    assert (reader.generator.config.norm, reader.generator.config.rank) == ("svd", 4)
    assert other.generator.by_layer is reader.generator.by_layer


def test_surgery_leaves_r_directions_a_scale_and_some_layers(reader):
    state = reader.read(TEXT)
    names = [layer.name for layer in reader.generator.layers]
    cut = operated(reader, state, 2, 0.3, [1])
    assert [*cut.down] == [*cut.up] == names[1:]
    left, right = NORMS["svd"](state.S[1], 2)
    g = reader.generator.by_layer[1]
    torch.testing.assert_close(cut.delta(names[1]), 0.3 * g.A1 @ left @ right.mT @ g.B2, rtol=1e-3, atol=1e-4)
    whole, s = operated(reader, state, 4, 1.0, [0, 1]), reader.generator.config.alpha / reader.generator.config.p
    for name in names:
        torch.testing.assert_close(s * whole.delta(name), reader.generator.write(state).delta(name), rtol=1e-3, atol=1e-4)
    assert reader.generator.config.rank == 4


@pytest.mark.parametrize("layers", [[0, 1], []])
def test_probability_is_that_of_the_answer_and_its_end(reader, layers):
    adapter = operated(reader, reader.read(TEXT), 4, 1.0, layers)
    answer, probability = answer_and_probability(reader, adapter, QUESTION)
    prompt = reader.tokenizer(question_prompt(QUESTION)).input_ids
    spoken = reader.tokenizer(f" {answer}\n").input_ids
    if layers:
        adapter.merge_into(reader.lm)
    assert [answer] == closed_book(reader, "", [QUESTION])
    logits = reader.lm(torch.tensor([prompt + spoken])).logits[0, len(prompt) - 1 : -1]
    adapter.restore(reader.lm)
    by_token = logits.softmax(-1)[range(len(spoken)), spoken]
    np.testing.assert_allclose(probability, by_token.prod(), rtol=1e-2)


# ------------------------------------------------------------------------------------------------- the slider of notebook 00


def test_explorer_redraws():
    explorer = spectrum_explorer(SIGMA, rank=3)
    slider = explorer.kwargs_widgets[0]
    assert (slider.min, slider.max) == (0, 2)
    for layer in (1, 2):
        slider.value = layer
        assert isinstance(explorer.result, Figure)
        assert explorer.result.axes[0].get_title() == f"S, adapted layer {layer}"
        np.testing.assert_allclose(heights(explorer.result.axes[0]), SIGMA[layer])


# ------------------------------------------------------------------------------------------------- the microscope


def test_nothing_is_shown_before_a_text_was_read(reader, no_lm):
    no_lm(reader)
    widget = Microscope(reader)
    assert widget.figures.layout.display == "none" and "press Read" in said(widget)
    widget.layer.value, widget.direction.value, widget.norm.value = 1, 2, "none"
    assert widget.spectrum.value == widget.stream.value == widget.shares.value == b""


def test_reading_draws_the_last_chunk_and_says_what_was_read(reader, figures):
    widget = Microscope(reader, TEXT)
    lines = history(widget)
    widget.read_button.click()
    reading = examine(reader, TEXT)
    last = len(reading.ends)
    assert lines == ["reading ...", f"read {len(reading.tokens)} tokens in {last} chunks"]
    assert widget.figures.layout.display is None and widget.answers.value == ""
    assert (widget.chunk.value, widget.chunk.max) == (last, last)
    np.testing.assert_allclose(heights(figures[widget.spectrum.value].axes[0]), reading.sigma[-1, 0])
    assert len(figures[widget.stream.value].axes[0].lines) == last + 1
    shown, tints = painted(figures[widget.shares.value])
    assert shown.replace(" ", "") == TEXT.replace(" ", "")
    np.testing.assert_allclose(tints, colours(reading.shares[-1][0, :, 0]))
    assert len(figures) == 3  # each figure was drawn once


def test_the_layer_drives_all_three_figures(reader, figures, no_lm):
    widget, reading = read(reader), examine(reader, TEXT)
    no_lm(reader)
    widget.layer.value = 1
    np.testing.assert_allclose(heights(figures[widget.spectrum.value].axes[0]), reading.sigma[-1, 1])
    for line, sigma in zip(figures[widget.stream.value].axes[0].lines[:-1], reading.sigma[:, 1], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), sigma[: len(line.get_ydata())])
    np.testing.assert_allclose(painted(figures[widget.shares.value])[1], colours(reading.shares[-1][1, :, 0]))


def test_the_chunk_drives_all_three_figures(reader, figures, no_lm):
    widget, reading = read(reader), examine(reader, TEXT)
    no_lm(reader)
    widget.chunk.value = 2
    np.testing.assert_allclose(heights(figures[widget.spectrum.value].axes[0]), reading.sigma[1, 0])
    assert len(figures[widget.stream.value].axes[0].lines) == 2 + 1
    shown, tints = painted(figures[widget.shares.value])
    assert shown.replace(" ", "") == "".join(reading.tokens[: reading.ends[1]]).replace(" ", "")
    np.testing.assert_allclose(tints, colours(reading.shares[1][0, :, 0]))


def test_the_direction_drives_the_shares_alone(reader, figures, no_lm):
    widget, reading = read(reader), examine(reader, TEXT)
    no_lm(reader)
    others = widget.spectrum.value, widget.stream.value
    widget.direction.value = 3
    np.testing.assert_allclose(painted(figures[widget.shares.value])[1], colours(reading.shares[-1][0, :, 2]))
    assert (widget.spectrum.value, widget.stream.value) == others and widget.direction.max == 4


def test_the_norm_drives_the_spectrum(reader, figures, no_lm):
    widget, sigma = read(reader), examine(reader, TEXT).sigma[-1, 0]
    no_lm(reader)
    assert widget.norm.value == "svd" and list(widget.norm.options) == [*NORMS]
    for norm, want in {"none": sigma, "frobenius": sigma / np.linalg.norm(sigma), "svd": [1.0] * 4 + [0.0] * 8}.items():
        widget.norm.value = norm
        np.testing.assert_allclose(heights(figures[widget.spectrum.value].axes[1]), want, rtol=1e-4, atol=1e-5)


def test_a_shorter_text_after_a_longer_one(reader, figures):
    widget = read(reader)
    widget.text.value = "The lamp is red."
    widget.read_button.click()
    reading = examine(reader, "The lamp is red.")
    assert widget.chunk.value == widget.chunk.max == len(reading.ends) < len(examine(reader, TEXT).ends)
    np.testing.assert_allclose(heights(figures[widget.spectrum.value].axes[0]), reading.sigma[-1, 0])


def test_the_three_answers_are_those_of_the_methods(reader, figures):
    widget = read(reader)
    lines = history(widget)
    widget.question.value = QUESTION
    for name, method in METHODS.items():
        assert f"<b>{name}</b>" in widget.answers.value
        assert (escape(method(reader, TEXT, [QUESTION])[0]) or "-") in widget.answers.value
    assert lines == ["answering ...", *(f"answering: {name} ..." for name in METHODS), "answered with the norm 'svd'"]


def test_another_norm_gives_other_answers(reader, figures, monkeypatch):
    monkeypatch.setitem(METHODS, "adapter", lambda reader, text, questions: [f"{reader.generator.config.norm} {text} {questions[0]}"])
    widget = read(reader, question=QUESTION)
    assert f"svd {TEXT} {QUESTION}" in widget.answers.value
    widget.norm.value = "none"
    assert f"none {TEXT} {QUESTION}" in widget.answers.value and said(widget) == "answered with the norm 'none'"


def test_what_the_lm_says_is_shown_as_text(reader, figures, monkeypatch):
    monkeypatch.setitem(METHODS, "closed-book", lambda reader, text, questions: ["<script>alert(1)</script>"])
    monkeypatch.setitem(METHODS, "prompting", lambda reader, text, questions: [""])
    widget = read(reader, question=QUESTION)
    assert "<script>" not in widget.answers.value and "&lt;script&gt;" in widget.answers.value and "<td>-</td>" in widget.answers.value


def test_pictures_are_drawn_and_change(reader):
    widget, before = read(reader), []
    for control, value in [(widget.chunk, 1), (widget.layer, 1)]:
        control.value = value
        pictures = [bytes(image.value) for image in (widget.spectrum, widget.stream, widget.shares)]
        assert all(picture.startswith(b"\x89PNG") for picture in pictures) and not set(pictures) & set(before)
        before = pictures


# ---------------------------------------------------------------------------------------------------- bad input

BAD_TEXTS = {"": "no text was given", " \n\t": "no text was given", "word " * 20_000: f"at most {LONGEST:,} are read here"}
BAD_QUESTIONS = {
    "": "no question was given",
    "  ": "no question was given",
    "blorp frobs?": "knows no word of this question",
    "?": "knows no word of this question",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: f"{len(text)} characters")
def test_bad_texts_leave_a_message(reader, figures, text):
    widget = read(reader, question=QUESTION)
    widget.text.value = text
    widget.read_button.click()
    assert BAD_TEXTS[text] in said(widget)
    assert widget.figures.layout.display == "none" and widget.answers.value == ""  # nothing of the text before is left
    widget.layer.value = 1
    widget.question.value = "And now?"
    assert "no text was read yet" in said(widget)
    for other in (Comparison(reader, TEXT, text), Comparison(reader, text, TEXT), Surgery(reader, text, QUESTION)):
        (other.button if isinstance(other, Comparison) else other.read_button).click()
        assert BAD_TEXTS[text] in said(other)


def test_a_very_long_text_is_refused_at_once(reader):
    widget, began = Microscope(reader, "The lamp is red. " * 5_883), time.process_time()
    assert len(widget.text.value) > 100_000
    widget.read_button.click()
    assert "tokens given" in said(widget) and time.process_time() - began < 5


def test_the_longest_text_is_read(reader):
    text = "lamp " * LONGEST
    ids, parts = pieces(reader.tokenizer, text)
    reader = with_config(reader, chunk=512)
    assert len(examine(reader, "".join(parts[:LONGEST])).tokens) <= LONGEST < len(ids)
    with pytest.raises(BadData, match="tokens given"):
        examine(reader, text)


def test_a_text_of_one_token_is_read_and_said_to_be_one(reader, figures):
    widget = read(reader, "T")
    assert said(widget) == "read 1 token in 1 chunk; a single token leaves a single direction in every layer"
    assert heights(figures[widget.spectrum.value].axes[1]) == [1.0] + [0.0] * 11
    widget.direction.value, widget.layer.value, widget.norm.value = 2, 1, "frobenius"
    widget.question.value = QUESTION
    assert said(widget).startswith("answered")


@pytest.mark.parametrize("question", BAD_QUESTIONS)
def test_questions_that_the_lm_cannot_read_leave_a_message(word_reader, figures, question):
    widget, surgery = read(word_reader, "The lamp is red ."), Surgery(word_reader, "The lamp is red .")
    surgery.read_button.click()
    for each in (widget, surgery):
        each.question.value = "What colour is it?"
        assert said(each).startswith("answered")
        each.question.value = question
        assert BAD_QUESTIONS[question] in said(each) and each.answers.value == ""


def test_a_question_too_long_for_the_window(reader, figures):
    widget = read(reader)
    widget.question.value = "What colour? " * 500
    assert "but at most 108 fit" in said(widget)


def test_a_question_in_any_script_is_one(reader, figures):
    widget = read(reader)
    widget.question.value = "灯是什么颜色?"
    assert said(widget).startswith("answered")


def test_unknown_words_of_a_text_are_counted(word_reader, figures):
    assert said(read(word_reader, "The blorp is frob red .")).endswith("; 2 of them are words that this LM does not know")


# --------------------------------------------------------------------------------------------- other errors


@pytest.mark.parametrize("build", [lambda r: Microscope(r, TEXT), lambda r: Surgery(r, TEXT), lambda r: Comparison(r, TEXT, TEXT)])
def test_an_unexpected_error_is_named_and_raised(reader, no_lm, build):
    widget = build(reader)
    no_lm(reader)
    with pytest.raises(AssertionError, match="the LM was called"):
        (widget.button if isinstance(widget, Comparison) else widget.read_button).click()
    assert said(widget) == "stopped by an error in the program: AssertionError: the LM was called"


@pytest.mark.parametrize("control, value", [("layer", 1), ("chunk", 1), ("direction", 2), ("norm", "none"), ("question", QUESTION)])
def test_an_error_in_a_callback_is_raised(reader, figures, monkeypatch, control, value):
    widget = read(reader)

    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(microscope, "_png", fail)
    monkeypatch.setitem(METHODS, "prompting", fail)
    with pytest.raises(ZeroDivisionError):
        getattr(widget, control).value = value


def test_the_lm_is_whole_again_after_an_error(reader, figures, monkeypatch):
    before = {name: weight.clone() for name, weight in reader.lm.state_dict().items()}
    widget = read(reader)
    monkeypatch.setattr("minigen.evaluation.closed_book", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        widget.question.value = QUESTION
    assert all(torch.equal(weight, before[name]) for name, weight in reader.lm.state_dict().items())


# -------------------------------------------------------------------------------------- comparison and surgery


def test_the_comparison_shows_the_overlap(reader, figures):
    other = "A swan sat on the line near the station."
    widget = Comparison(reader, TEXT, other)
    lines = history(widget)
    widget.button.click()
    states = [reader.read(text) for text in (TEXT, other)]
    figure = figures[widget.overlap.value]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), overlaps(states, 4).mean(0), atol=1e-5)
    assert "random subspaces: 0.25" in figure.axes[1].get_ylabel()
    assert lines == ["reading ...", f"read {states[0].tokens.item()} and {states[1].tokens.item()} tokens"]
    widget.second.value = TEXT
    widget.button.click()
    np.testing.assert_allclose(figures[widget.overlap.value].axes[0].images[0].get_array(), 1, atol=1e-4)


def test_the_comparison_of_a_single_token_knows_its_chance(reader, figures):
    widget = Comparison(reader, "T", "h")
    widget.button.click()
    assert f"random subspaces: {1 / 16:.2f}" in figures[widget.overlap.value].axes[1].get_ylabel()


def test_surgery_asks_again_whenever_a_control_moves(reader):
    widget = Surgery(reader, TEXT, QUESTION)
    widget.read_button.click()
    state, seen = reader.read(TEXT), []
    assert (widget.r.value, widget.r.max, widget.scale.value) == (4, 4, 1.0)
    for control, value, cut in [
        (widget.r, 2, (2, 1.0, [0, 1])),
        (widget.scale, 0.4, (2, 0.4, [0, 1])),
        (widget.layers[0], False, (2, 0.4, [1])),
        (widget.layers[1], False, (2, 0.4, [])),
    ]:
        lines = history(widget)
        control.value = value
        answer, probability = answer_and_probability(reader, operated(reader, state, *cut), QUESTION)
        assert (escape(answer) or "-") in widget.answers.value and f"<td>{probability:.3g}</td>" in widget.answers.value
        assert lines == ["answering ...", f"answered with r = {cut[0]}, s = {cut[1]:.3g}, {len(cut[2])} of 2 layers"]
        seen.append(widget.answers.value)
    assert len(set(seen)) > 1


def test_surgery_before_reading(reader):
    widget = Surgery(reader, TEXT, QUESTION)
    widget.r.value = 1
    assert "press Read first" in said(widget)
    widget = Surgery(reader, TEXT)
    widget.read_button.click()
    assert "type a question" in said(widget)


def test_the_status_is_shown_before_the_lm_works(reader, figures, monkeypatch):
    for build, press in [(Microscope, lambda w: w.read()), (Surgery, lambda w: w.read()), (Comparison, lambda w: w.compare())]:
        widget, seen = build(reader, TEXT, TEXT), []
        monkeypatch.setattr(microscope, "check_text", lambda *_, w=widget, seen=seen: seen.append(said(w)))
        press(widget)
        assert set(seen) == {"reading ..."}


@pytest.mark.parametrize(
    "build, names, classes",
    [
        (Microscope, ["text", "Read", "question", "layer", "chunk", "direction", "norm"], ["status", "spectrum", "stream", "tokens", "answers"]),
        (Comparison, ["first", "second", "Compare"], ["status", "overlap"]),
        (Surgery, ["text", "Read", "question", "r", "scale s", "layer 0", "layer 1"], ["status", "answers"]),
    ],
)
def test_a_browser_finds_every_part(reader, build, names, classes):
    def parts(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from parts(child)

    everything = [*parts(build(reader))]
    described = [part.description for part in everything if getattr(part, "description", "")]
    assert described == names
    found = [name for part in everything for name in part._dom_classes]
    assert found == [f"minigen-{name}" for name in classes]


# ------------------------------------------------------------------------------------------------- the toy LM

TOY_TEXT, TOY_QUESTION = "Ada lives in Paris. Boris lives in Oslo.", "Where does Ada live?"


def test_the_toy_is_read_drawn_and_asked(toy, figures):
    widget = read(toy, TOY_TEXT, TOY_QUESTION)
    assert said(widget) == "answered with the norm 'svd'"
    for name, method in METHODS.items():
        assert f"<b>{name}</b></td><td>{method(toy, TOY_TEXT, [TOY_QUESTION])[0]}</td>" in widget.answers.value
    widget.layer.value = 2
    np.testing.assert_allclose(heights(figures[widget.spectrum.value].axes[0]), examine(toy, TOY_TEXT).sigma[-1, 2])


@pytest.mark.parametrize("question", ["Quo vadis?", ""])
def test_the_toy_says_which_question_it_cannot_read(toy, figures, question):
    widget = read(toy, TOY_TEXT, TOY_QUESTION)
    widget.question.value = question
    assert "knows no word" in said(widget) or "no question" in said(widget)
