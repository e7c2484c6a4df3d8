"""minigen.gist: a question sees of a text what it should, and nothing else."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import DynamicCache

from minigen import training
from minigen.evaluation import BASELINES, Reader, cost
from minigen.formats import BadGenerator
from minigen.gist import GISTS, Gist, load_gist, train_gist
from minigen.models import load_lm
from minigen.tasks import BadData, Document, Question
from minigen.training import RECIPES

TEXT, ASKED = [5, 9, 2, 7, 7, 3], [[4, 8, 1], [6, 2, 2, 3]]


def gist_of(lm, tokenizer, count: int) -> Gist:
    """Gist tokens and a LoRA with random weights, as if trained."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        peft = get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        return Gist(peft, tokenizer, torch.randn(count, lm.config.hidden_size)).eval()


def hidden_of_questions(gist: Gist, texts: list, asked: list) -> list:
    hidden, holds = gist.read(texts, asked)
    return [hidden[row][holds[row] == 2 + n] for row, questions in enumerate(asked) for n in range(len(questions))]


def test_without_gist_tokens_a_question_sees_the_text_and_no_other_question(any_lm):
    gist = gist_of(any_lm, None, 0)
    for question, hidden in zip(ASKED, hidden_of_questions(gist, [TEXT], [ASKED]), strict=True):
        alone = any_lm(torch.tensor([TEXT + question]), output_hidden_states=True).hidden_states[-1][0, len(TEXT) :]
        assert_close(hidden, alone)


def test_with_gist_tokens_a_question_sees_their_keys_and_values_alone(any_lm):
    gist = gist_of(any_lm, None, 2)
    embedded = torch.cat([any_lm.get_input_embeddings()(torch.tensor([TEXT])), gist.tokens[None]], dim=1)
    cache = any_lm.base_model(inputs_embeds=embedded, past_key_values=DynamicCache(), use_cache=True).past_key_values
    for question, hidden in zip(ASKED, hidden_of_questions(gist, [TEXT], [ASKED]), strict=True):
        kept = DynamicCache([(layer.keys[:, :, -2:].clone(), layer.values[:, :, -2:].clone()) for layer in cache.layers])
        places = torch.arange(len(question))[None] + len(TEXT) + 2
        alone = any_lm.base_model(torch.tensor([question]), past_key_values=kept, position_ids=places, use_cache=True).last_hidden_state[0]
        assert_close(hidden, alone)


@pytest.mark.parametrize("count", [0, 3])
def test_a_row_does_not_depend_on_its_longer_neighbour(llama, count):
    gist = gist_of(llama, None, count)
    together = hidden_of_questions(gist, [TEXT, TEXT * 2], [ASKED, ASKED[:1]])
    for hidden, alone in zip(together, hidden_of_questions(gist, [TEXT], [ASKED]), strict=False):
        assert_close(hidden, alone)


def test_what_was_trained_is_loaded_and_asked(tmp_path, monkeypatch):
    rows = [train_gist("toy-gist-4", tmp_path / name, "toy", 2) for name in ("one", "two")]
    assert rows[0] == rows[1] and rows[0]["contexts"] == 64
    lm, tokenizer = load_lm("toy")
    reader = Reader(lm, tokenizer, training.AdapterGenerator.for_lm(lm, training.TOY), gist=tmp_path / "one")
    prompt = torch.tensor([tokenizer("Question : who").input_ids])
    before = lm(prompt).logits
    assert len(BASELINES["gist"](reader, "Ada is a vet .", ["who ?", "what ?"])) == 2
    assert_close(lm(prompt).logits, before, rtol=0, atol=0)
    documents = [Document("Ada is a vet .", (Question("What is Ada ?", ("vet",)),))]
    compressed = cost(reader, "gist", documents)
    assert compressed == {"storage_floats": 4 * 2 * 4 * 144, "tflops": cost(reader, "closed-book", documents)["tflops"]}
    monkeypatch.setitem(GISTS, "no gist", (RECIPES["toy"], 0))
    train_gist("no gist", tmp_path / "none", "toy", 1)
    prompted = replace(reader, gist=tmp_path / "none")
    assert cost(prompted, "gist", documents) == cost(reader, "prompting", documents)


def test_what_a_gist_cannot_do_is_said(tmp_path, lm_folder):
    lm, tokenizer = load_lm(str(lm_folder))
    reader = Reader(lm, tokenizer, None)
    with pytest.raises(BadData, match="without --gist DIR"):
        BASELINES["gist"](reader, "a", ["b"])
    with pytest.raises(BadData, match="to choose"):
        BASELINES["gist"](Reader(lm, tokenizer, None, gist=tmp_path), "a", ["b"], lambda reader, prompts: [])
    with pytest.raises(BadGenerator, match="no gist found"):
        load_gist(tmp_path, lm, tokenizer)
    train_gist("toy-gist-1", tmp_path / "toy", "toy", 1)
    with pytest.raises(BadGenerator, match="made for the LM toy"):
        load_gist(tmp_path / "toy", lm, tokenizer)
