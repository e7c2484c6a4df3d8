"""The shipped toy LM reads, by who and by what, and its shipped generator carries what it read."""

import random
from statistics import fmean

import pytest

from minigen.evaluation import METHODS, Reader
from minigen.formats import load_generator
from minigen.models import load_lm
from minigen.tasks import DATA, Document, exact_match, tell, toy_document, toy_world


@pytest.fixture(scope="module")
def reader():
    lm, tokenizer = load_lm("toy")
    return Reader(lm, tokenizer, load_generator(DATA / "toy", lm))


def exact(reader, method: str, documents: list[Document], told: list[str] | None = None) -> float:
    """Exact match in percent over all questions; told: other texts to read in place of the documents' own."""
    texts = told or [document.text for document in documents]
    scores = []
    for document, text in zip(documents, texts, strict=True):
        predictions = METHODS[method](reader, text, [question.text for question in document.questions])
        scores += [exact_match(p, q.answers) for p, q in zip(predictions, document.questions, strict=True)]
    return fmean(scores)


def documents(facts: tuple[int, int], count: int = 30) -> list[Document]:
    return [toy_document(random.Random(f"unseen {n}"), facts) for n in range(count)]


def contested(rng: random.Random) -> Document:
    """Two people, the same two things told of both, four different values: only who and what together name the answer."""
    people, relations = rng.sample(toy_world()["names"], 2), rng.sample(toy_world()["relations"], 2)
    told = [(name, relation, value) for relation in relations for name, value in zip(people, rng.sample(relation["values"], 2), strict=True)]
    return tell(rng.sample(told, 4), rng)


def test_the_toy_lm_reads_its_prompt_and_knows_nothing_else(reader):
    told = documents((4, 8))
    assert exact(reader, "prompting", told) >= 95
    assert exact(reader, "closed-book", told) <= 15  # one of 12 to 16 values by chance


def test_the_toy_lm_looks_at_who_as_well_as_what(reader):
    assert exact(reader, "prompting", [contested(random.Random(n)) for n in range(30)]) >= 95


def test_the_toy_adapter_answers_without_the_text(reader):
    told = documents((4, 4))
    assert exact(reader, "adapter", told) >= 90
    assert exact(reader, "adapter", told, told=[d.text for d in told[1:] + told[:1]]) <= 20
    assert exact(reader, "adapter", [contested(random.Random(n)) for n in range(30)]) >= 75  # guessing between the two people gives 50
