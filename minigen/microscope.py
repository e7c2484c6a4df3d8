"""Widgets to look into an adapter: a microscope, a comparison and a surgery, thin ipywidgets shells around minigen.spectra.

`examine` reads a text once and keeps every array that is drawn of it, so that moving a slider runs no LM; what has to run one says so in
the status line first. Input that cannot be used leaves a message there too; any other error is named there and raised.
"""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from html import escape
from io import BytesIO
from itertools import accumulate, pairwise
from operator import add

import numpy as np
import torch
from ipywidgets import HTML, Box, Button, Checkbox, Dropdown, FloatSlider, HBox, Image, IntSlider, Layout, Text, Textarea, VBox, interactive
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from .evaluation import METHODS, Reader, check_room, closed_book
from .generator import NORMS, Adapter, ContextState
from .spectra import (
    Figure,
    gains,
    overlap_figure,
    overlaps,
    singular_values,
    spectrum_figure,
    stream_figure,
    stream_singular_values,
    token_figure,
    token_shares,
)
from .tasks import BadData, Question
from .training import answer_target, target_losses

LONGEST = 2048  # tokens of a text; reading more would take minutes on a laptop


# ------------------------------------------------------------------------------------------- what is shown, without a widget


@dataclass(frozen=True)
class Reading:
    """All that is shown of a text, read once: its tokens, and after each of its chunks the tokens so far, the spectra and the shares."""

    text: str
    tokens: list[str]
    ends: list[int]
    sigma: Float[np.ndarray, "c l r"]
    shares: list[Float[np.ndarray, "l n r"]]
    state: ContextState


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[str]]:
    """The tokens of a text, and the part of the text that belongs to each; the parts together are the text, but for its very end."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ends = accumulate((end for _, end in encoded.offset_mapping), max, initial=0)
    return encoded.input_ids, [text[begin:end] for begin, end in pairwise(ends)]


def check_text(reader: Reader, text: str) -> None:
    """Refuse a text without a token, and one that would take minutes."""
    count = len(pieces(reader.tokenizer, text)[0]) if text.strip() else 0
    if count == 0:
        raise BadData("no text was given; type or paste one, then press the button again")
    if count > LONGEST:
        raise BadData(f"{count:,} tokens given, but at most {LONGEST:,} are read here, as more would take minutes; give a part of the text")


def check_question(reader: Reader, question: str) -> None:
    """Refuse a question of which the LM would see nothing, or which would not leave room for an answer."""
    if not question.strip():
        raise BadData("no question was given; type one and press Enter")
    unknown = reader.tokenizer.unk_token_id
    if not any(token != unknown and any(map(str.isalnum, piece)) for token, piece in zip(*pieces(reader.tokenizer, question), strict=True)):
        raise BadData("the LM knows no word of this question; ask with words of the text")
    check_room(reader, question)


@torch.no_grad()
def examine(reader: Reader, text: str) -> Reading:
    """Read a text and compute every array that is drawn of it. What is shown after a chunk is what the text up to there would have left."""
    check_text(reader, text)
    ids, tokens = pieces(reader.tokenizer, text)
    input_ids = torch.tensor([ids], device=reader.lm.device)
    chunks = [*reader.generator.read_chunks(reader.lm, input_ids)]
    ends = [*accumulate(chunk.tokens.item() for chunk in chunks)]
    shares = [token_shares(reader.lm, reader.generator, input_ids[:, :end]) for end in ends]
    return Reading(text, tokens, ends, stream_singular_values(chunks), shares, reduce(add, chunks))


def with_config(reader: Reader, **settings) -> Reader:
    """The same reader with other settings of its generator, e.g. norm="none"; the weights are shared."""
    generator = copy(reader.generator)
    generator.config = replace(generator.config, **settings)
    return replace(reader, generator=generator)


@torch.no_grad()
def operated(reader: Reader, state: ContextState, r: int, scale: float, layers: Iterable[int]) -> Adapter:
    """What surgery leaves of a state's adapter: r directions, s = scale, and only some of the adapted layers."""
    whole = with_config(reader, rank=r).generator.write(state)
    names = [reader.generator.layers[layer].name for layer in layers]
    return Adapter({name: whole.down[name] for name in names}, {name: whole.up[name] for name in names}, scale)


@torch.no_grad()
def answer_and_probability(reader: Reader, adapter: Adapter, question: str) -> tuple[str, float]:
    """The greedy answer with this adapter on, and the probability of just these words and the end of the line after them."""
    with adapter.applied_to(reader.lm):
        [said] = closed_book(reader, "", [question])
        losses, _ = target_losses(reader.lm, reader.tokenizer.pad_token_id, [answer_target(Question(question, (said,)), reader.tokenizer)])
    return said, torch.exp(-losses.sum()).item()


# ------------------------------------------------------------------------------------------------- the widgets


def spectrum_explorer(sigma: Float[np.ndarray, "l r"], rank: int) -> interactive:
    """A slider over the layers around spectrum_figure; it holds no maths and runs no model."""
    slider = IntSlider(0, 0, len(sigma) - 1, description="layer", continuous_update=False)
    return interactive(lambda layer: spectrum_figure(sigma, rank, layer), {"auto_display": True}, layer=slider)


class Shell(VBox):
    """What the three widgets have in common: a reader, and a status line that says what is being done or what was wrong."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader
        self.status = _marked(HTML(), "status")

    @contextmanager
    def at_work(self, doing: str):
        """Say first what is being done. A complaint about the input ends in the status line; any other error is named there and raised."""
        self.say(doing)
        try:
            yield
        except BadData as problem:
            self.say(str(problem))
        except Exception as error:
            self.say(f"stopped by an error in the program: {type(error).__name__}: {error}")
            raise

    def say(self, message: str) -> None:
        self.status.value = escape(message)


class Microscope(Shell):
    """A text, and inside its adapter: figures 1, 3 and 5 of one layer after one chunk, and the answers to a question, three ways."""

    def __init__(self, reader: Reader, text: str = "", question: str = ""):
        super().__init__(reader)
        config, self.reading = reader.generator.config, None
        self.text, self.read_button, self.question = _text(text), Button(description="Read"), _question(question)
        self.layer = _slider("layer", 0, 0, len(reader.generator.layers) - 1)
        self.chunk = _slider("chunk", 1, 1, 1)
        self.direction = _slider("direction", 1, 1, config.rank)
        self.norm = Dropdown(options=[*NORMS], value=config.norm, description="norm")
        self.spectrum, self.stream, self.shares = (_marked(Image(format="png"), name) for name in ("spectrum", "stream", "tokens"))
        self.answers = _marked(HTML(), "answers")
        self.figures = VBox([_row(self.layer, self.chunk, self.direction, self.norm), self.spectrum, self.stream, self.shares])
        self.children = [self.text, _row(self.read_button, self.question), self.status, self.figures, self.answers]
        self.read_button.on_click(lambda _: self.read())
        self.question.observe(lambda _: self.ask(), "value")
        self.layer.observe(lambda _: self.draw(), "value")
        self.chunk.observe(lambda _: self.draw(), "value")
        self.direction.observe(lambda _: self.draw_shares(), "value")
        self.norm.observe(lambda _: self.change_norm(), "value")
        self.forget()
        self.say("type a text and press Read")

    def forget(self) -> None:
        self.reading, self.answers.value, self.figures.layout.display = None, "", "none"

    def read(self) -> None:
        """Read the text and draw it; then answer the question, if there is one."""
        self.forget()
        with self.at_work("reading ..."):
            reading = examine(self.reader, self.text.value)
            self.chunk.max = self.chunk.value = len(reading.ends)
            self.reading, self.figures.layout.display = reading, None
            self.draw()
            self.say(_read_message(self.reader, reading))
            if self.question.value:
                self.ask()

    def draw(self) -> None:
        """Figures 1, 3 and 5 from the arrays of the reading; no LM runs."""
        self.draw_spectrum()
        if self.reading:
            self.stream.value = _png(stream_figure(self.sigma(), self.reader.generator.config.rank, self.layer.value))
        self.draw_shares()

    def draw_spectrum(self) -> None:
        """Figure 1 alone."""
        if self.reading:
            self.spectrum.value = _png(spectrum_figure(self.sigma()[-1], self.reader.generator.config.rank, self.layer.value, self.norm.value))

    def draw_shares(self) -> None:
        """Figure 5 alone."""
        if self.reading:
            after = self.chunk.value - 1
            tokens = self.reading.tokens[: self.reading.ends[after]]
            self.shares.value = _png(token_figure(tokens, self.reading.shares[after], self.layer.value, self.direction.value))

    def sigma(self) -> Float[np.ndarray, "c l r"]:
        return self.reading.sigma[: self.chunk.value]

    def change_norm(self) -> None:
        """Figure 1 under another norm; then the answers, because the adapter is another one too."""
        self.draw_spectrum()
        if self.reading and self.question.value:
            self.ask()

    def ask(self) -> None:
        """The three answers to the question."""
        self.answers.value = ""
        with self.at_work("answering ..."):
            if self.reading is None:
                raise BadData("no text was read yet; press Read first")
            check_question(self.reader, self.question.value)
            reader, answers = with_config(self.reader, norm=self.norm.value), {}
            for name, method in METHODS.items():
                self.say(f"answering: {name} ...")
                [answers[name]] = method(reader, self.reading.text, [self.question.value])
                self.answers.value = _table(answers)
            self.say(f"answered with the norm {self.norm.value!r}")


class Comparison(Shell):
    """Two texts side by side, and how much their adapters overlap (figure 4)."""

    def __init__(self, reader: Reader, first: str = "", second: str = ""):
        super().__init__(reader)
        self.first, self.second, self.button = _text(first, "first"), _text(second, "second"), Button(description="Compare")
        self.overlap = _marked(Image(format="png"), "overlap")
        self.children = [_row(self.first, self.second), self.button, self.status, self.overlap]
        self.button.on_click(lambda _: self.compare())
        self.overlap.layout.display = "none"
        self.say("type two texts and press Compare")

    def compare(self) -> None:
        """Read both texts and draw figure 4, the mean over all adapted layers."""
        self.overlap.layout.display = "none"
        with self.at_work("reading ..."):
            for text in (self.first, self.second):
                check_text(self.reader, text.value)
            config, states = self.reader.generator.config, [self.reader.read(text.value) for text in (self.first, self.second)]
            kept = np.array([[gains(sigma, config.rank).sum() for sigma in singular_values(state)] for state in states])
            figure = overlap_figure(overlaps(states, config.rank).mean(0), ["first", "second"], (kept.max(0) / config.p).mean())
            self.overlap.value, self.overlap.layout.display = _png(figure), None
            self.say("read {} and {} tokens".format(*(state.tokens.item() for state in states)))


class Surgery(Shell):
    """One adapter with fewer directions, another scale or layers switched off: what the LM answers then, and how probable that is."""

    def __init__(self, reader: Reader, text: str = "", question: str = ""):
        super().__init__(reader)
        config, self.state = reader.generator.config, None
        s = config.alpha / config.p
        self.text, self.read_button, self.question = _text(text), Button(description="Read"), _question(question)
        self.r = _slider("r", config.rank, 1, config.rank)
        self.scale = FloatSlider(s, min=0, max=2 * s, step=s / 10, description="scale s", continuous_update=False)
        self.layers = [
            Checkbox(True, description=f"layer {n}", indent=False, layout=Layout(width="90px")) for n in range(len(reader.generator.layers))
        ]
        self.answers = _marked(HTML(), "answers")
        self.children = [self.text, _row(self.read_button, self.question), _row(self.r, self.scale), _row(*self.layers), self.status, self.answers]
        self.read_button.on_click(lambda _: self.read())
        for control in (self.question, self.r, self.scale, *self.layers):
            control.observe(lambda _: self.operate(), "value")
        self.say("type a text and press Read")

    def read(self) -> None:
        """Read the text; then answer the question, if there is one."""
        self.state, self.answers.value = None, ""
        with self.at_work("reading ..."):
            check_text(self.reader, self.text.value)
            self.state = self.reader.read(self.text.value)
            self.say(f"read {self.state.tokens.item()} tokens; type a question and press Enter")
            if self.question.value:
                self.operate()

    def operate(self) -> None:
        """The answer with what the sliders and boxes leave of the adapter."""
        self.answers.value = ""
        with self.at_work("answering ..."):
            if self.state is None:
                raise BadData("no text was read yet; press Read first")
            check_question(self.reader, self.question.value)
            on = [layer for layer, box in enumerate(self.layers) if box.value]
            adapter = operated(self.reader, self.state, self.r.value, self.scale.value, on)
            said, probability = answer_and_probability(self.reader, adapter, self.question.value)
            self.answers.value = _table({"answer": said, "probability": f"{probability:.3g}"})
            self.say(f"answered with r = {self.r.value}, s = {self.scale.value:.3g}, {len(on)} of {len(self.layers)} layers")


# ------------------------------------------------------------------------------------------------- the pieces


def _marked(widget, name: str):
    """A widget that a style sheet or a test finds by its class."""
    return widget.add_class(f"minigen-{name}")


def _row(*widgets) -> Box:
    return HBox(widgets, layout=Layout(flex_flow="row wrap"))


def _text(text: str, description: str = "text") -> Textarea:
    return Textarea(text, description=description, rows=6, layout=Layout(width="48%", min_width="420px"))


def _question(question: str) -> Text:
    return Text(question, description="question", continuous_update=False, layout=Layout(width="420px"))


def _slider(description: str, value: int, least: int, most: int) -> IntSlider:
    return IntSlider(value, least, most, description=description, continuous_update=False)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def _table(rows: Mapping[str, str]) -> str:
    """Names and what belongs to them, as HTML in the colours of the page."""
    lines = [f"<tr><td style='padding-right:1.5em'><b>{escape(name)}</b></td><td>{escape(said) or '-'}</td></tr>" for name, said in rows.items()]
    return f"<table>{''.join(lines)}</table>"


def _read_message(reader: Reader, reading: Reading) -> str:
    """How much was read, and what a reader of the figures should know about it."""
    count, chunks = len(reading.tokens), len(reading.ends)
    notes = [f"read {count} token{'s' * (count > 1)} in {chunks} chunk{'s' * (chunks > 1)}"]
    if count == 1:
        notes.append("a single token leaves a single direction in every layer")
    if unknown := reader.tokenizer(reading.text).input_ids.count(reader.tokenizer.unk_token_id):
        notes.append(f"{unknown} of them are words that this LM does not know")
    return "; ".join(notes)
