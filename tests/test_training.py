"""minigen.training on a tiny LM: the loss against plain cross-entropy, the loop against itself interrupted, the start against none."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, reduce
from operator import add

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import DynamicCache, GPT2Config

from minigen import training
from minigen.evaluation import WORDINGS, saved_for_backward
from minigen.formats import load_generator, save_generator
from minigen.generator import AdapterGenerator, GeneratorConfig, block_inputs, rms_norm, token_embeddings
from minigen.models import load_lm
from minigen.tasks import DATA, BadData, Document, Question, read_documents, world_document
from minigen.training import (
    FILES,
    RECIPES,
    Recipe,
    Source,
    Target,
    answers,
    completion,
    cut,
    distillation,
    mean_losses,
    question_prompt,
    rate,
    recipe_optimizers,
    reconstruction,
    sharing,
    start_by_regression,
    target_losses,
    toy_row,
    train,
    train_toy_lm,
)

TINY = GeneratorConfig(targets=("mlp.down_proj",), blocks=None, p=16, q=16, rank=8, alpha=16.0)
RECIPE = Recipe(TINY, {"world": 1.0}, {"answers": 1.0, "reconstruction": 0.2}, contexts=4, facts=(1, 3), learning_rate=1e-2, warmup=3, start_from=24)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A recipe that takes a second, and a validation on three documents."""
    monkeypatch.setitem(RECIPES, "tiny", RECIPE)
    monkeypatch.setattr(training, "read_documents", lambda path: read_documents(path)[:3])


@pytest.fixture
def lm_and_tokenizer(lm_folder):
    return load_lm(str(lm_folder))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors") | {
        f"saved {name}": value for name, value in load_file(folder / "generator" / "generator.safetensors").items()
    }


# ------------------------------------------------------------------------------------------------ objectives


def test_an_answer_is_trained_on_alone(lm_and_tokenizer):
    _, tokenizer = lm_and_tokenizer
    document = Document("Ann is a vet.", (Question("Who is a vet?", ("Ann", "Ann is")),))
    ((target,),) = answers(document, [[1]], tokenizer, random.Random(0), asked=1)
    assert tokenizer.decode(target.tokens[: target.start]) == question_prompt("Who is a vet?")
    assert tokenizer.decode(target.tokens[target.start :]) == " Ann\n"


@pytest.fixture
def marking(lm_and_tokenizer):
    """A tokenizer that puts a mark before every text, as those of Mistral and Llama do."""
    _, tokenizer = lm_and_tokenizer
    mark = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{mark} $A", special_tokens=[(mark, tokenizer.eos_token_id)])
    assert tokenizer("Ann").input_ids[0] == tokenizer.eos_token_id
    return tokenizer


def test_no_mark_of_a_texts_beginning_comes_before_an_answer(marking):
    target = training.answer_target(Question("Who is a vet?", ("Ann",)), marking)
    assert marking.decode(target.tokens) == f"{marking.eos_token}{question_prompt('Who is a vet?')} Ann\n"
    assert marking.decode(target.tokens[target.start :]) == " Ann\n"


def test_the_start_finds_answers_whatever_a_tokenizer_puts_first(lm_and_tokenizer, marking):
    generator = AdapterGenerator.for_lm(lm_and_tokenizer[0], TINY)
    documents = [world_document(random.Random(f"start {n}"), (1, 3)) for n in range(16)]
    start_by_regression(generator, lm_and_tokenizer[0], marking, documents, gain=1.8)
    assert all(value.isfinite().all() for value in generator.state_dict().values())


def test_prompting_puts_that_mark_once(lm_and_tokenizer, marking):
    marking.chat_template = "{{ eos_token }}[{{ messages[0].content }}]"
    prompt = WORDINGS["led chat"](marking, "The lamp is red.", "What colour?")
    assert marking.decode(marking(prompt).input_ids) == f"{marking.eos_token}[The lamp is red.\n\nWhat colour?]The answer is:"


def test_a_document_with_few_questions_is_asked_to_complete_its_sentences(lm_and_tokenizer):
    _, tokenizer = lm_and_tokenizer
    document = Document("The vet is Ann.", (Question("Who is a vet?", ("Ann",)),))
    asked = [tokenizer.decode(target.tokens) for target in answers(document, [[1]], tokenizer, random.Random(0), asked=3)[0]]
    assert asked == [f"{question_prompt(q)} Ann\n" for q in ("Who is a vet?", "The vet is", "The vet is")]


def test_answers_wait_until_all_is_read(lm_and_tokenizer):
    _, tokenizer = lm_and_tokenizer
    made = answers(world_document(random.Random(0)), [[1], [2], [3]], tokenizer, random.Random(0), asked=2)
    assert [len(targets) for targets in made] == [0, 0, 2]


def test_reconstruction_is_a_span_of_what_was_read_so_far(lm_and_tokenizer):
    _, tokenizer = lm_and_tokenizer
    document = world_document(random.Random(0))
    pieces = cut(tokenizer(document.text).input_ids, 3)
    spans = [set(), set(), set()]
    for seed in range(40):
        for n, (target,) in enumerate(reconstruction(document, pieces, tokenizer, random.Random(seed), length=9)):
            assert tokenizer.decode(target.tokens) in tokenizer.decode([token for piece in pieces[: n + 1] for token in piece])
            spans[n].add(tuple(target.tokens))
    assert len(spans[0]) < len(spans[2])


def test_completion_is_the_piece_that_comes_next(lm_and_tokenizer):
    _, tokenizer = lm_and_tokenizer
    pieces = [[5, 6], [7, 8, 9], [10, 11]]
    assert completion(None, pieces, tokenizer, random.Random(0)) == [[Target([7, 8, 9], 1)], [Target([10, 11], 1)], []]


@pytest.mark.parametrize("count", [2, 6])
def test_distillation_asks_as_answers_does_and_shows_its_teacher_the_document(lm_and_tokenizer, count):
    _, tokenizer = lm_and_tokenizer
    document = world_document(random.Random(0), facts=(5, 5))
    [[], asked], [[], plain] = (kind(document, [[1], [2]], tokenizer, random.Random(1), asked=count) for kind in (distillation, answers))
    assert len(asked) == count
    assert [(t.tokens, t.start) for t in asked] == [(t.tokens, t.start) for t in plain]
    assert {tokenizer.decode(t.seen) for t in asked} == {f"{document.text}\n\n"}


def test_the_distilled_loss_is_the_divergence_from_the_prompted_lm(lm_and_tokenizer, generator_for):
    lm, tokenizer = lm_and_tokenizer
    generator = generator_for(lm, targets=("mlp.down_proj",)).requires_grad_()
    document = world_document(random.Random(0), facts=(5, 5))
    total, tokens = training.Objective(generator, lm, tokenizer, ["distillation"])([document], [random.Random(1)])["distillation"]

    adapter, expected, count = generator.write(generator.read(lm, tokenizer(document.text, return_tensors="pt").input_ids)), 0.0, 0
    [targets] = distillation(document, [[1]], tokenizer, random.Random(1))
    for target in targets:
        prompted = lm(torch.tensor([[*target.seen, *target.tokens]])).logits[0, len(target.seen) :].softmax(-1)
        with adapter.applied_to(lm):
            said = lm(torch.tensor([target.tokens])).logits[0].softmax(-1)
        for n in range(target.start - 1, len(target.tokens) - 1):
            expected, count = expected + (prompted[n] * (prompted[n] / said[n]).log()).sum(), count + 1
    assert count == tokens
    assert_close(total, expected, atol=1e-3, rtol=1e-4)
    total.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in generator.parameters())


@pytest.mark.parametrize("length, pieces", [(7, 1), (7, 3), (8, 4), (2, 2)])
def test_a_text_is_cut_into_equal_pieces(length, pieces):
    parts = cut(list(range(length)), pieces)
    assert [token for part in parts for token in part] == list(range(length)) and len(parts) == pieces
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_piece_is_answered_by_the_adapter_of_what_was_read_so_far(lm_and_tokenizer, generator_for):
    lm, tokenizer = lm_and_tokenizer
    generator = generator_for(lm, targets=("mlp.down_proj",))
    documents = [world_document(random.Random(seed), (3, 3)) for seed in range(2)]
    sums = training.Objective(generator, lm, tokenizer, ["completion"], pieces=3)(documents, [random.Random(0)] * 2)
    by_hand = []
    for document in documents:
        pieces = [torch.tensor([piece]) for piece in cut(tokenizer(document.text).input_ids, 3)]
        state = generator.read(lm, pieces[0])
        for n in (1, 2):
            with generator.write(state).applied_to(lm):
                logits = lm(pieces[n]).logits
            by_hand.append(cross_entropy(logits[0, :-1], pieces[n][0, 1:], reduction="none"))
            state = state + generator.read(lm, pieces[n])
    assert_close(sums["completion"][0], torch.cat(by_hand).sum(), atol=1e-4, rtol=1e-5)
    assert sums["completion"][1] == len(torch.cat(by_hand))


def test_documents_that_share_a_state_are_read_as_one_and_tasks_alone():
    documents = [Document(name, (), "sorting" if name == "d" else "") for name in "abcdefgh"]
    groups = {size: sharing(documents, size).tolist() for size in (1, 2, 4, 8)}
    who = {size: ["".join(d.text for d, g in zip(documents, group, strict=True) if g == own) for own in group] for size, group in groups.items()}
    assert who[1] == [*"abcdefgh"]
    assert who[2] == ["ae", "bf", "cg", "d", "ae", "bf", "cg", "h"]
    assert who[4] == ["aceg", "bfh", "aceg", "d", "aceg", "bfh", "aceg", "bfh"]
    assert who[8] == ["abcefgh"] * 3 + ["d"] + ["abcefgh"] * 4
    assert all(sorted({*group}) == [*range(len({*group}))] for group in groups.values())


def test_a_shared_state_is_the_sum_of_its_documents(lm_and_tokenizer, generator_for):
    lm, tokenizer = lm_and_tokenizer
    generator = generator_for(lm, targets=("mlp.down_proj",))
    documents, rngs = [world_document(random.Random(seed), (3, 3)) for seed in range(2)], [random.Random(0), random.Random(1)]
    sums = training.Objective(generator, lm, tokenizer, ["answers"], pieces=2)(documents, rngs, shared=2)["answers"]
    pieces = [torch.tensor([piece]) for document in documents for piece in cut(tokenizer(document.text).input_ids, 2)]
    state = reduce(add, (generator.read(lm, piece) for piece in pieces))
    targets = [target for seed, document in enumerate(documents) for target in answers(document, [[1]], tokenizer, random.Random(seed))[0]]
    with generator.write(state).applied_to(lm):
        assert_close(sums[0], target_losses(lm, tokenizer.pad_token_id, targets)[0].sum(), atol=1e-4, rtol=1e-5)


def test_target_losses_are_the_cross_entropy_of_all_logits(any_lm):
    source = random.Random(0)
    targets = [Target([source.randrange(1, 61) for _ in range(length)], start) for length, start in ((9, 4), (5, 1), (13, 12))]
    losses, rows = target_losses(any_lm, 0, targets)
    expected = [
        cross_entropy(any_lm(torch.tensor([t.tokens])).logits[0, t.start - 1 : -1], torch.tensor(t.tokens[t.start :]), reduction="none")
        for t in targets
    ]
    assert_close(losses, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert rows.tolist() == [0] * 5 + [1] * 4 + [2]


@pytest.mark.parametrize("together", [[3], [2, 1, 4], [1, 1]], ids=str)
def test_targets_in_one_row_do_not_see_each_other(any_lm, together):
    source = random.Random(0)
    lengths = [source.randint(2, 9) for _ in range(sum(together))]
    targets = [Target([source.randrange(1, 61) for _ in range(length)], source.randint(1, length - 1)) for length in lengths]
    losses, numbers = target_losses(any_lm, 0, targets, together=together)
    alone, numbers_alone = target_losses(any_lm, 0, targets)
    assert_close(losses, alone, atol=1e-5, rtol=1e-5)
    assert numbers.tolist() == numbers_alone.tolist()


def test_targets_in_one_row_with_a_cache_are_refused(llama):
    targets = [Target([1, 2, 3, 4], 2)] * 2
    with pytest.raises(ValueError, match="give either"):
        target_losses(llama, 0, targets, begun=DynamicCache(), together=[2])


def test_the_loss_is_the_weighted_sum_and_reaches_every_parameter(lm_and_tokenizer, generator_for):
    lm, tokenizer = lm_and_tokenizer
    generator = generator_for(lm, targets=("mlp.down_proj",)).requires_grad_()
    weights = {"answers": 2.0, "reconstruction": 0.5}
    objective = training.Objective(generator, lm, tokenizer, weights)
    sums = objective(*Source(RECIPE, []).batch(0))
    losses = mean_losses(sums, weights, Accelerator())
    assert_close(losses["answers"], sums["answers"][0] / sums["answers"][1])
    assert_close(losses["loss"], 2 * losses["answers"] + 0.5 * losses["reconstruction"])
    losses["loss"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    assert len(list(objective.parameters())) == len(list(generator.parameters()))  # the LM is not among them


@pytest.mark.parametrize("asked", [1, 7])
def test_a_context_is_asked_as_many_questions_as_wanted(lm_and_tokenizer, generator_for, asked):
    lm, tokenizer = lm_and_tokenizer
    documents = [world_document(random.Random(seed), (3, 5)) for seed in range(2)]
    objective = training.Objective(generator_for(lm), lm, tokenizer, ["answers"], asked=asked)
    _, tokens = objective(documents, [random.Random(0), random.Random(1)])["answers"]
    targets = [answers(document, [[1]], tokenizer, random.Random(seed), asked)[0] for seed, document in enumerate(documents)]
    assert [*map(len, targets)] == [asked, asked]
    assert tokens == sum(len(target.tokens) - target.start for of_document in targets for target in of_document)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_computed_twice_give_the_same_gradients_and_keep_less(family, tiny_lm, generator_for, tokens):
    lm = tiny_lm(family)
    generator = generator_for(lm, targets=("mlp.down_proj", "attn.c_proj")).requires_grad_()
    context, targets = tokens(2, 19), [Target(row, 3) for row in tokens(4, 11).tolist()]

    def losses(how):
        adapter = generator.write(generator.read(lm, context))
        with adapter.applied_to(lm), how(lm, adapter):
            return target_losses(lm, 0, targets)[0].sum()

    found = {}
    for name, how in {"once": lambda lm, adapter: nullcontext(), "twice": training.blocks_computed_twice}.items():
        generator.zero_grad()
        held, loss = saved_for_backward(partial(losses, how), [*lm.parameters(), *generator.parameters()])
        loss.backward()
        found[name] = held, loss.item(), [p.grad.clone() for p in generator.parameters()]
    assert found["twice"][0] < 0.7 * found["once"][0]
    assert found["twice"][1] == found["once"][1]
    for twice, once in zip(found["twice"][2], found["once"][2], strict=True):
        assert_close(twice, once)
    assert not any("forward" in vars(module) for module in lm.modules())


def test_a_batch_without_questions_has_a_finite_loss(lm_and_tokenizer, generator_for):
    lm, tokenizer = lm_and_tokenizer
    objective = training.Objective(generator_for(lm), lm, tokenizer, RECIPE.objectives)
    text = Document(world_document(random.Random(0)).text, ())
    sums = objective([text, text], [random.Random(0), random.Random(1)])
    assert all(total.isfinite() and tokens > 0 for total, tokens in sums.values())


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mixture", [{"prose": 0.6, "world": 0.4}, {"closed world": 1.0}, {"dialogues": 0.5, "tasks": 0.5}, {"toy world": 1.0}, {"text": 1.0}])
def test_a_step_has_the_same_documents_whenever_it_runs(mixture):
    recipe, files = Recipe(TINY, mixture, {"answers": 1.0}), [DATA / "documents" / "lighthouse.txt"] if "text" in mixture else []
    one, other = Source(recipe, files), Source(recipe, files)
    one.batch(3)
    for step in (7, 2):
        documents, rngs = one.batch(step)
        again, same_rngs = other.batch(step)
        assert documents == again and [rng.random() for rng in rngs] == [rng.random() for rng in same_rngs]
        assert len(documents) == len(rngs) == recipe.contexts
    numbers = {rng.random() for step in range(8) for rng in one.batch(step)[1]}
    assert len(numbers) == 8 * recipe.contexts
    if "text" not in mixture:
        assert len({tuple(one.batch(step)[0]) for step in range(8)}) == 8


def test_every_process_shares_states_alike_and_each_size_has_its_turn():
    one, other = (Source(replace(RECIPE, shared=(1, 2, 4)), []) for _ in range(2))
    sizes = [one.shared(step) for step in range(40)]
    assert {*sizes} == {1, 2, 4} and sizes == [other.shared(step) for step in range(40)]
    assert {Source(RECIPE, []).shared(step) for step in range(40)} == {1}


def test_raw_text_that_nobody_named_is_pythons_manual(tmp_path):
    recipe = Recipe(TINY, {"text": 1.0}, {"reconstruction": 1.0}, paragraphs=(2, 3))
    source = Source(recipe, [])
    assert source.names == {"text": ["pydoc_data.topics"]} and len(source.given["text"]) > 400
    assert all(len(part) >= 200 and "\n" not in part for part in source.given["text"])
    text = "\n\n".join(f"Paragraph {n} tells of {n} ships. " + "They all sailed to Brackwell in the spring. " * 5 for n in range(9))
    (tmp_path / "mine.txt").write_text(text)
    mine = Source(recipe, [str(tmp_path / "mine.txt")])
    document = mine.document(random.Random(0))
    assert mine.names == {"text": ["mine.txt"]} and 2 <= document.text.count("Paragraph") <= 3
    assert len(document.questions) == 4 and all(q.answers[0] in document.text for q in document.questions)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("prose", {"context": "Mine says Zorvane. Nothing else.", "qas": [{"question": "What does mine say?", "answers": ["Zorvane"]}]}),
        ("dialogues", {"sessions": [[{"speaker": "Mine", "text": "Zorvane."}]], "question": "What was said?", "answers": ["Zorvane"]}),
        ("tasks", {"task": "echo", "input": "Zorvane", "output": "Mine"}),
    ],
)
def test_files_of_ones_own_are_half_of_what_is_drawn_of_their_source(tmp_path, kind, record):
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(record)] * 12))
    recipe = replace(RECIPES["instruct"], mixture={kind: 0.5, "world": 0.5})
    source = Source(recipe, [tmp_path / "mine.jsonl"])
    assert source.names == {kind: [*FILES[kind], "mine.jsonl"], "world": FILES["world"]}
    drawn = [source.document(random.Random(seed)) for seed in range(400)]
    mine = [document for document in drawn if "Zorvane" in document.text]
    assert 70 < len(mine) < 130
    assert all("Mine" in document.text and document.questions for document in mine)


def test_a_file_that_the_recipe_does_not_draw_from_is_refused(tmp_path):
    with pytest.raises(BadData, match=r"holds text, but the recipe draws .* only"):
        Source(RECIPES["facts"], [DATA / "documents" / "lighthouse.txt"])
    (tmp_path / "few.jsonl").write_text(json.dumps({"task": "echo", "input": "a", "output": "b"}))
    with pytest.raises(BadData, match="1 examples of the task 'echo', 12 are needed"):
        Source(RECIPES["instruct"], [tmp_path / "few.jsonl"])
    (tmp_path / "odd.jsonl").write_text(json.dumps({"task": "echo", "input": "a"}))
    with pytest.raises(BadData, match=r"odd\.jsonl, line 1: it needs a str 'output'"):
        Source(RECIPES["instruct"], [tmp_path / "odd.jsonl"])


def test_the_rate_warms_up_stays_and_falls():
    recipe = Recipe(TINY, {}, {}, warmup=4, steady=0.5)
    assert [rate(step, 0.0, recipe) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [rate(99, done, recipe) for done in (0.1, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.525, 0.05])


# ------------------------------------------------------------------------------------------ a start by regression


@pytest.mark.parametrize("ours", [False, True])
def test_the_start_copies_from_its_own_context(lm_and_tokenizer, ours):
    lm, tokenizer = lm_and_tokenizer
    documents = [world_document(random.Random(f"start {n}"), (1, 3)) for n in range(64)]
    held_out = [world_document(random.Random(f"held out {n}"), (1, 3)) for n in range(16)]

    def started(regression):
        torch.manual_seed(0)
        generator = AdapterGenerator.for_lm(lm, replace(TINY, previous=ours, embedding=ours, gate=ours))
        if regression:
            start_by_regression(generator, lm, tokenizer, documents, gain=1.8)
        return generator

    fresh, start, again = started(False), started(True), started(True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in start.state_dict().items())
    assert all(value.isfinite().all() and value.shape == fresh.state_dict()[name].shape for name, value in start.state_dict().items())
    without = training.transfer(fresh, lm, tokenizer, held_out)
    losses = training.transfer(start, lm, tokenizer, held_out)
    assert without["own"] == without["other"]
    assert losses["own"] < losses["other"] - 0.01


def test_the_start_opens_its_gates_for_answers(lm_and_tokenizer):
    lm, tokenizer = lm_and_tokenizer
    documents, held_out = ([world_document(random.Random(f"{name} {n}"), (1, 3)) for n in range(64)] for name in ("start", "held out"))
    generator = AdapterGenerator.for_lm(lm, replace(TINY, gate=True)).requires_grad_(False)
    start_by_regression(generator, lm, tokenizer, documents, gain=1.8)
    ids, mask, _, pairs = training.answer_tokens(held_out, tokenizer)
    answer = torch.zeros_like(mask, dtype=torch.bool)
    answer[pairs[:, 2], pairs[:, 3]] = True
    for H, g in zip(block_inputs(lm, generator.layers, input_ids=ids), generator.by_layer, strict=True):
        gates = torch.sigmoid(torch.cat([rms_norm(H, g.norm), token_embeddings(lm, ids)], dim=-1) @ g.gate)
        assert gates[answer].mean() > gates[mask.bool() & ~answer].mean() + 0.03


# -------------------------------------------------------------------------------------------------- the loop


def test_training_lowers_the_loss_and_leaves_a_log_and_a_generator(lm_folder, tmp_path):
    scores = train("tiny", tmp_path / "run", str(lm_folder), steps=30, validate_every=10)
    history = json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["history"]
    losses = [row["loss"] for row in history]
    assert len(losses) == 30 and sum(losses[-8:]) < 0.97 * sum(losses[:8])
    with (tmp_path / "run" / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [(row["step"], row["contexts"]) for row in log] == [("10", "40"), ("20", "80"), ("30", "120")]
    assert float(log[0]["loss"]) == pytest.approx(sum(losses[:10]) / 10, abs=1e-3)
    assert {name: float(log[-1][name]) for name in scores} == pytest.approx(scores, abs=1e-3) and scores.keys() == {"dev own", "dev other"}
    lm, _ = load_lm(str(lm_folder))
    load_generator(tmp_path / "run" / "generator", lm)
    card = json.loads((tmp_path / "run" / "generator" / "generator.json").read_text())
    assert (card["provenance"]["recipe"], card["provenance"]["steps"], card["provenance"]["contexts"]) == ("tiny", 30, 120)


def train_until(at: int, out, lm_folder, monkeypatch) -> None:
    """Twelve steps of the tiny recipe, broken off where the documents of step `at` are drawn."""
    batch = Source.batch

    def interrupted(self, step):
        if step == at:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Source, "batch", interrupted)
        train("tiny", out, str(lm_folder), steps=12, save_every=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(optimizer, lm_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], optimizer=optimizer))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train("tiny", whole, str(lm_folder), steps=12)
    train_until(7, broken, lm_folder, monkeypatch)
    assert not (broken / "generator").exists()
    train("tiny", broken, str(lm_folder), steps=12, resume=True)

    ours, theirs = weights(broken), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    histories = [json.loads((folder / "checkpoint" / "progress.json").read_text())["history"] for folder in (broken, whole)]
    assert [row["loss"] for row in histories[0]] == [row["loss"] for row in histories[1]]
    assert {path.name for path in broken.iterdir()} == {"checkpoint", "generator", "log.csv"}


def test_a_run_resumed_with_no_more_than_was_spent_ends_with_its_scores(lm_folder, tmp_path, monkeypatch):
    train_until(3, tmp_path, lm_folder, monkeypatch)
    scores = train("tiny", tmp_path, str(lm_folder), steps=2, resume=True)
    card = json.loads((tmp_path / "generator" / "generator.json").read_text())
    last = [*csv.DictReader((tmp_path / "log.csv").open())][-1]
    assert scores == card["provenance"]["validation"] == {name: float(last[name]) for name in scores}
    assert card["provenance"]["steps"] == int(last["step"]) == 3


LAUNCHED = """
import sys
from minigen import training
from minigen.generator import GeneratorConfig
training.RECIPES["tiny"] = training.Recipe(**eval(sys.argv[3]))
training.train("tiny", sys.argv[1], sys.argv[2], steps=6, validate_every=3)
"""


def test_a_run_that_goes_on_from_another_says_so_and_has_other_documents(lm_folder, tmp_path, monkeypatch):
    drawn, batch = [], Source.batch
    monkeypatch.setattr(Source, "batch", lambda self, step: drawn.append(step) or batch(self, step))
    first, second, third = (tmp_path / run / "generator" for run in ("first", "second", "third"))
    train("tiny", first.parent, str(lm_folder), steps=2)
    train("tiny", second.parent, str(lm_folder), steps=2, begin=first)
    train("tiny", second.parent, str(lm_folder), steps=4, resume=True)
    train("tiny", third.parent, str(lm_folder), steps=1, begin=second)
    assert drawn == [0, 1, 2, 3, 4, 5, 6]
    cards = [json.loads((folder / "generator.json").read_text())["provenance"] for folder in (first, second, third)]
    expected = [("regression", 0, 2), (str(first), 2, 4), (str(second), 6, 1)]
    assert [(card["begin"], card["first"], card["steps"]) for card in cards] == expected


def test_a_run_takes_over_the_settings_of_the_generator_that_it_begins_with(lm_folder, tmp_path):
    lm, _ = load_lm(str(lm_folder))
    config = replace(TINY, alpha=2 * TINY.alpha)
    save_generator(tmp_path / "given", AdapterGenerator.for_lm(lm, config), lm, str(lm_folder), {"recipe": "tiny", "first": 0, "steps": 5})
    train("tiny", tmp_path / "run", str(lm_folder), steps=1, begin=tmp_path / "given")
    card = json.loads((tmp_path / "run" / "generator" / "generator.json").read_text())
    assert load_generator(tmp_path / "run" / "generator", lm).config == config
    assert (card["provenance"]["first"], card["provenance"]["settings"]["config"]["alpha"]) == (5, config.alpha)
    with pytest.raises(BadData, match="other settings; give the --generator"):
        train("tiny", tmp_path / "run", str(lm_folder), steps=2, resume=True)
    train("tiny", tmp_path / "run", str(lm_folder), steps=2, resume=True, begin=tmp_path / "given")
    assert load_generator(tmp_path / "run" / "generator", lm).config == config


def test_muon_takes_the_matrices_and_adamw_the_rest(lm_and_tokenizer):
    generator = AdapterGenerator.for_lm(lm_and_tokenizer[0], TINY)
    (everything,) = recipe_optimizers(RECIPE, generator)
    muon, adamw = recipe_optimizers(replace(RECIPE, optimizer="muon"), generator)
    held = [{id(w) for group in optimizer.param_groups for w in group["params"]} for optimizer in (everything, muon, adamw)]
    assert held[0] == held[1] | held[2] and not held[1] & held[2]
    assert held[2] == {id(layer.norm) for layer in generator.by_layer}


def test_two_processes_go_the_way_of_one(lm_folder, tmp_path):
    script, histories = tmp_path / "launched.py", []
    script.write_text(LAUNCHED)
    recipe = repr(vars(RECIPE) | {"contexts": 5, "precision": "float32", "shared": (1, 2)})
    for count in (1, 2):
        out = tmp_path / f"run{count}"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", str(script), str(out), str(lm_folder), recipe]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        histories.append(json.loads((out / "checkpoint" / "progress.json").read_text())["history"])
        card = json.loads((out / "generator" / "generator.json").read_text())
        assert len(histories[-1]) == 6 and card["provenance"]["processes"] == count
    for one, two in zip(*histories, strict=True):
        assert one["contexts"] == two["contexts"]
        assert [one[k] for k in ("answers", "reconstruction", "loss")] == pytest.approx([two[k] for k in ("answers", "reconstruction", "loss")], abs=1e-5)
    assert all(histories[1][n][k] == pytest.approx(histories[0][n][k], abs=1e-4) for n in (2, 5) for k in ("dev own", "dev other"))


def test_the_seed_decides_the_run(lm_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "other seed", Recipe(**vars(RECIPE) | {"seed": 1}))
    for name, recipe in (("one", "tiny"), ("again", "tiny"), ("other", "other seed")):
        train(recipe, tmp_path / name, str(lm_folder), steps=2)
    one, again, other = (weights(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ the toy LM


def test_a_toy_row_is_a_document_with_answers_or_a_lonely_question():
    rows = [toy_row(random.Random(seed), longest=3) for seed in range(200)]
    alone = [row for row in rows if row.startswith("Question:")]
    assert 8 <= len(alone) <= 35 and all(row.count("Answer:") == 1 for row in alone)
    for row in set(rows) - set(alone):
        text, asked = row.split("\n\n")
        pairs = re.findall(r"Question: (.*)\nAnswer: (\w+)\n", asked)
        assert pairs and all(question.endswith("?") and re.search(rf"\b{answer}\b", text) for question, answer in pairs)


def test_near_positions_look_alike():
    likeness = torch.cosine_similarity(training.waves(64, 32)[20:21], training.waves(64, 32)[20:40])
    assert likeness[0] > likeness[1] > likeness[2] and likeness[3:].max() < likeness[1]


def test_the_toy_lm_learns_and_leaves_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TOY_LM", GPT2Config(**training.TOY_LM.to_dict() | {"n_layer": 1, "n_embd": 16, "n_head": 2}))
    for name in ("one", "again"):
        train_toy_lm(tmp_path / name, steps=75, rows=4)
    with (tmp_path / "one" / "lm_log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [row["step"] for row in log] == ["25", "50", "75"] and float(log[-1]["loss"]) < 0.95 * float(log[0]["loss"])
    (lm, tokenizer), (again, _) = (load_lm(str(tmp_path / name)) for name in ("one", "again"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in lm.state_dict().items())
    assert lm.config.vocab_size == len(tokenizer) and tokenizer.decode(tokenizer("Ada lives in Rome.").input_ids) == "Ada lives in Rome."

    train_toy_lm(tmp_path / "one", steps=50, resume=True, rows=4)
    with (tmp_path / "one" / "lm_log.csv").open() as file:
        longer = list(csv.DictReader(file))
    assert longer[:3] == log and [(row["step"], row["facts"]) for row in longer[3:]] == [("100", "16"), ("125", "16")]
    assert float(longer[-1]["loss"]) < float(log[-1]["loss"]) + 0.1  # it went on, and did not begin again
