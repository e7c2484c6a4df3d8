"""minigen.evaluation: what an LM, its generator and their training would need, without any of them, against the real ones."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchEncoding, MistralConfig

from minigen import evaluation
from minigen.evaluation import BASELINES, CONTROLS, METHODS, Reader, accuracy, cost, forward_flops, memory, saved_for_backward, score
from minigen.generator import GeneratorConfig
from minigen.models import answer, load_lm, read_beginning
from minigen.tasks import BadData, Document, Question, question_prompt
from minigen.training import RECIPES, Target, blocks_computed_twice, target_losses

SETTINGS = GeneratorConfig(targets=("self_attn.o_proj", "attn.c_proj"), p=16, q=12, rank=4)


def test_saved_for_backward_counts_every_tensor_once_and_no_weight():
    weight, x = torch.ones(50, requires_grad=True), torch.ones(50, requires_grad=True)
    held, result = saved_for_backward(lambda: ((x * weight).exp() * x).sum(), [weight])
    assert held == 4 * 50 * 2  # x once, though two products need it, and the exponential, though it needs itself
    result.backward()


def test_memory_is_that_of_the_real_thing(any_lm, generator_for, tokens):
    lm = any_lm
    generator = generator_for(lm, **{name: getattr(SETTINGS, name) for name in ("targets", "p", "q", "rank")}).requires_grad_()
    state = generator.read(lm, tokens(1, 19))  # its own graph is not that of `answer`

    def answer(keeping):
        update = generator.write(state)
        with update.applied_to(lm), keeping(lm, update):
            lm(tokens(1, 11), use_cache=False).logits.log_softmax(-1)
        return update

    weights, context = [*lm.parameters(), *generator.parameters()], tokens(1, 19)
    reading, _ = saved_for_backward(lambda: generator.read(lm, context), weights)
    answering, update = saved_for_backward(lambda: answer(lambda lm, update: nullcontext()), weights)
    checkpointed, _ = saved_for_backward(lambda: answer(blocks_computed_twice), weights)
    said = memory(lm.config, SETTINGS, context=19, targets=11, dtype=torch.float32)
    assert said["LM"] == sum(p.nbytes for p in lm.parameters())
    assert said["generator, fp32"] == sum(p.nbytes for p in generator.parameters())
    assert said["state"] == state.S.nbytes
    assert said["adapter"] == sum(t.nbytes for t in [*update.down.values(), *update.up.values()])
    assert said["streams of the context"] == 3 * 19 * 32 * 4
    assert said["activations of reading"] == pytest.approx(reading, rel=0.1)
    assert said["activations of answering"] == pytest.approx(answering, rel=0.1)
    assert checkpointed < said["the same, checkpointed"] < said["activations of answering"]


def test_the_papers_sizes_come_out():
    said = memory(MistralConfig(vocab_size=32000), RECIPES["mistral-7b"].config, context=1024, targets=256)
    assert said["LM"] / 2 == pytest.approx(7.24e9, rel=0.01)
    assert said["generator, fp32"] / 4 == pytest.approx(0.5e9, rel=0.1)  # "about 0.5 B generator parameters, 32 M adapter parameters"
    assert said["adapter"] / 4 == pytest.approx(32e6, rel=0.1)
    assert said["state"] == 32 * 1024 * 1024 * 4


def test_a_longer_context_changes_what_reading_takes_alone(llama):
    short = memory(llama.config, SETTINGS, context=19, targets=11)
    long = memory(llama.config, SETTINGS, context=38, targets=11)
    assert long["streams of the context"] == 2 * short["streams of the context"]
    assert {name for name in short if long[name] != short[name]} == {"streams of the context", "activations of reading"}
    more = memory(llama.config, replace(SETTINGS, p=32), context=19, targets=11)
    assert more["state"] == 2 * short["state"]


@pytest.fixture(scope="module")
def small(lm_folder, generator_for):
    lm, tokenizer = load_lm(str(lm_folder))
    return Reader(lm, tokenizer, generator_for(lm), wording="plain")


def say_prompts(reader: Reader, prompts: list[str]) -> list[str]:
    return list(prompts)


SENTENCES = ["The lamp is red.", "Ada sells tea in Oslo.", "Nobody saw the boat.", "Boris paints doors.", "It rained for a week."]


def test_retrieval_shows_the_sentences_that_share_words_with_the_question(small):
    said = BASELINES["retrieval"](small, " ".join(SENTENCES), ["What does Boris paint on doors?", "Where does Ada sell tea?"], say_prompts)
    assert "Boris paints doors." in said[0] and "Ada sells tea in Oslo." in said[1]
    for prompt in said:
        shown = [sentence for sentence in SENTENCES if sentence in prompt]
        assert len(shown) == 3 and [prompt.index(sentence) for sentence in shown] == sorted(prompt.index(sentence) for sentence in shown)


def test_retrieval_chooses_among_whole_documents_where_several_were_joined(small):
    documents = [f"{sentence} And so it stays." for sentence in SENTENCES]
    (said,) = BASELINES["retrieval"](small, "\n\n".join(documents), ["Where does Ada sell tea?"], say_prompts)
    assert said.startswith("The lamp is red. And so it stays.\n\nAda") or "Ada sells tea in Oslo. And so it stays." in said
    assert sum(document in said for document in documents) == 3


def test_the_sequential_adapter_reads_on_with_what_it_has_read(small, tokens):
    long, short = " ".join(SENTENCES), "One."
    seen = {}

    def listen(reader, prompts):
        ids = reader.tokenizer(prompts[0], return_tensors="pt").input_ids
        return [reader.lm(ids).logits[0, -1, :4].tolist() for _ in prompts]

    for text in (long, short):
        seen[text] = [(METHODS | BASELINES)[name](small, text, ["What?"], listen)[0] for name in ("adapter", "sequential adapter")]
    assert seen[short][0] == seen[short][1]  # one chunk
    assert seen[long][0] != seen[long][1]
    assert small.generator.config.encode == "parallel"


def test_few_shot_tuning_learns_the_demonstrations(small, monkeypatch):
    shown = {"a wolf": "animal", "an oak": "plant"}
    context = "\n\n".join(f"{question_prompt(thing)} {kind}" for thing, kind in shown.items())
    losses = []

    def listen(reader, prompts):
        ids = reader.tokenizer(f"{question_prompt('a wolf')} animal\n", return_tensors="pt").input_ids
        losses.append(reader.lm(ids, labels=ids.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 4, -100)).loss.item())
        return prompts

    for steps in (0, 30):
        monkeypatch.setattr(evaluation, "TUNED_STEPS", steps)
        assert BASELINES["few-shot tuning"](small, context, ["a fox"], listen) == [question_prompt("a fox")]
    assert losses[1] < losses[0] - 0.5
    with pytest.raises(BadData, match="shows no demonstrations"):
        BASELINES["few-shot tuning"](small, "A text.", ["a fox"], listen)


def test_costs_of_every_method(small):
    documents = [Document(" ".join(SENTENCES), (Question("Where is Ada?", ("Oslo",)),))]
    costs = {name: cost(small, name, documents) for name in METHODS | BASELINES}
    assert costs["closed-book"]["storage_floats"] == 0 < costs["retrieval"]["storage_floats"] < costs["prompting"]["storage_floats"]
    assert costs["adapter"] == costs["sequential adapter"] and costs["adapter"]["tflops"] == costs["closed-book"]["tflops"]
    assert costs["closed-book"]["tflops"] <= costs["retrieval"]["tflops"] <= costs["prompting"]["tflops"]


@pytest.mark.parametrize("count", [7, 120])
def test_a_pass_has_as_many_operations_as_torch_counts(count):
    lm, _ = load_lm("toy")
    lm.set_attn_implementation("eager")  # its products are counted one by one, and those of later tokens too, which are masked
    with FlopCounterMode(display=False) as counter:
        lm(torch.arange(count)[None])
    masked = 2 * count**2 * lm.config.hidden_size * lm.config.num_hidden_layers
    assert counter.get_total_flops() == forward_flops(lm, count) + masked


def test_the_authors_score_counts_the_shortest_answer_alone():
    document = Document("It is in the old town.", (Question("Where?", ("old town", "in the old town")),))
    scores = score([document], [["in the old town"]])
    assert scores["f1"] == 100.0 and scores["authors"] == pytest.approx(80.0)  # "the" is dropped: 2 of 3 words right, both found


def test_the_files_of_a_task_count_as_one_task():
    asked = (Question("1?", ("a",)), Question("2?", ("b",)))
    single = [Document(f"{task} 4", asked, task) for task in "xyz"]
    twice = [Document(f"{task} {shown}", asked, task) for task in "xyz" for shown in (4, 8)]
    said = {"x": ["A", "b"], "y": ["a", "a"], "z": ["c", "c"]}
    alone, both = (accuracy(tasks, [said[document.task] for document in tasks]) for tasks in (single, twice))
    assert alone == both and alone["accuracy"] == 50.0


def test_the_wrong_context_is_the_next_one_of_another_task():
    asked = (Question("1?", ("a",)),)
    tasks = [Document(f"{task} {shown}", asked, task) for task in "xyz" for shown in (4, 8)]
    assert [CONTROLS["wrong"](tasks, n) for n in range(6)] == ["y 4", "y 4", "z 4", "z 4", "x 4", "x 4"]
    documents = [Document(text, asked) for text in ("one", "two")]
    assert [CONTROLS["wrong"](documents, n) for n in range(2)] == ["two", "one"] and CONTROLS["wrong"](documents[:1], 0) == "one"


def test_continual_pretraining_learns_the_text_and_leaves_the_lm_as_it_was(lm_folder, generator_for, monkeypatch):
    lm, tokenizer = load_lm(str(lm_folder))
    reader = Reader(lm, tokenizer, generator_for(lm))
    text = "The lamp is red. It stood in the hall for years, and cost 5 crowns."
    ids, before = tokenizer(text, return_tensors="pt").input_ids, {name: value.clone() for name, value in lm.state_dict().items()}
    losses = []

    def listen(reader: Reader, prompts: list[str]) -> list[str]:
        losses.append(lm(ids, labels=ids).loss.item())
        return prompts

    plain = lm(ids, labels=ids).loss.item()
    for steps in (0, 10, 40):
        monkeypatch.setattr(evaluation, "TUNED_STEPS", steps)
        assert BASELINES["continual pretraining"](reader, text, ["What colour?"], listen) == [question_prompt("What colour?")]
    assert losses[0] == pytest.approx(plain, abs=1e-5) and losses[2] < losses[1] < losses[0] - 0.1
    assert lm.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert lm(ids, labels=ids).loss.item() == plain


class Numbers:
    """A tokenizer whose words are the token ids themselves; it has no line break, so answers are as long as they may be."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text):
        return BatchEncoding({"input_ids": [int(word) for word in text.split()]})

    def get_vocab(self):
        return {}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(n)) for n in ids)


def test_what_all_prompts_begin_with_is_read_once_and_changes_no_answer(any_lm, tokens):
    text, tokenizer = tokens(40).tolist(), Numbers()
    rows = [text + tokens(length).tolist() for length in (3, 6, 4)]
    prompts = [" ".join(map(str, row)) for row in rows]
    begun = read_beginning(any_lm, rows)
    assert begun.get_seq_length() == 40
    for _ in range(2):  # the keys and values are as they were after a use
        assert answer(any_lm, tokenizer, prompts, 5, begun) == answer(any_lm, tokenizer, prompts, 5)
    targets = [Target(row, 41) for row in rows]
    losses, places = target_losses(any_lm, 0, targets, begun)
    assert_close(losses, target_losses(any_lm, 0, targets)[0])
    assert places.tolist() == [0, 0, *[1] * 5, *[2] * 3]


def test_short_beginnings_and_single_prompts_are_not_read_ahead(llama, tokens):
    text = tokens(40).tolist()
    assert read_beginning(llama, [[*text[:20], 1, 2], [*text[:20], 3, 4]]) is None
    assert read_beginning(llama, [text]) is None
    assert read_beginning(llama, [text, text]).get_seq_length() == 38  # two tokens of a row are left to predict with
