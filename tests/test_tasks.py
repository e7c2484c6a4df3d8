"""minigen.tasks: worlds whose answers stand in their texts, prose varied consistently, files refused in one line, metrics worked by hand."""

import json
import random
import re
import statistics
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigen import tasks
from minigen.tasks import (
    DATA,
    INVENT,
    BadData,
    Document,
    Question,
    answer_recall,
    closed_value,
    cloze,
    exact_match,
    excerpt,
    f1,
    joined,
    lesson,
    open_value,
    prose_document,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_paragraphs,
    read_prose,
    read_text,
    varied_prose,
    world_dialogue,
    world_document,
    world_task,
)

PROSE = read_prose(sorted((DATA / "prose").glob("*.jsonl")))
HELD_OUT = ["dev.jsonl", "encyclopedic.jsonl", "natural.jsonl"]


def words(document: Document) -> list[str]:
    """Every word of a document, its questions and its answers, in order."""
    return re.findall(r"\w+", " ".join([document.text, *(f"{q.text} {q.answers[0]}" for q in document.questions)]))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


# ------------------------------------------------------------------------------------------------ the world


@pytest.mark.parametrize("kind", INVENT)
def test_closed_values_are_sixteen_and_open_ones_go_on(kind):
    closed = {closed_value(kind, random.Random(seed)) for seed in range(500)}
    opened = {open_value(kind, random.Random(seed)) for seed in range(200)}
    assert len(closed) == 16
    assert len(opened) > 100


@pytest.mark.parametrize("kind", ["person", "place", "organisation", "name", "product", "event", "code"])
def test_open_values_do_not_repeat_between_two_seeds(kind):
    one, other = ({open_value(kind, rng) for _ in range(30)} for rng in (random.Random("one"), random.Random("other")))
    assert not one & other


@pytest.mark.parametrize("values", tasks.VALUES)
@pytest.mark.parametrize("facts", [(1, 1), (4, 8)])
def test_world_documents_can_answer_what_is_asked(values, facts):
    lengths = set()
    for seed in range(300):
        document = world_document(random.Random(seed), facts, values)
        assert all(answer in document.text for question in document.questions for answer in question.answers)
        assert len({question.text for question in document.questions}) == len(document.questions) == len(sentences(document.text))
        lengths.add(len(document.questions))
    assert lengths == set(range(facts[0], facts[1] + 1))


def test_of_rivals_the_same_is_told(monkeypatch):
    monkeypatch.setattr(tasks, "tell", lambda facts, rng: facts)
    for seed in range(100):
        told: dict[str, list[str]] = {}
        for subject, relation, _ in world_document(random.Random(seed), (6, 8), "closed", rivals=True):
            told.setdefault(subject, []).append(relation["says"][0])
        *whole, last = sorted((set(relations) for relations in told.values()), key=len, reverse=True)
        assert whole and last <= whole[0] and all(relations == whole[0] for relations in whole)


@pytest.mark.parametrize(("file", "subjects"), [("world.jsonl", 1), ("talk.jsonl", 0)])  # who talks of himself needs no name
def test_no_two_relations_ask_the_same(file, subjects):
    asked = [(relation["about"], question) for relation in tasks._records(file) for question in relation["asks"]]
    assert len(set(asked)) == len(asked)
    for relation in tasks._records(file):
        assert all(says.count("{s}") == subjects and says.count("{v}") == 1 for says in relation["says"])
        assert all("{s}" in question and "{v}" not in question for question in relation["asks"])


def test_the_seed_decides_the_document():
    assert world_document(random.Random(5)) == world_document(random.Random(5)) != world_document(random.Random(6))


def test_closed_documents_share_answers_and_open_ones_do_not():
    def shared(values):
        answers = [{q.answers[0] for q in world_document(random.Random(seed), (8, 8), values).questions} for seed in range(30)]
        return sum(len(a & b) for a, b in combinations(answers, 2))

    assert shared("closed") > 20 * shared("open")


# ------------------------------------------------------------------------------------------------ the toy world


def test_toy_documents_tell_one_fact_a_question():
    for seed in range(200):
        document = tasks.toy_document(random.Random(seed), (1, 16))
        assert len(sentences(document.text)) == len(document.questions) == len({question.text for question in document.questions})
        assert all(re.search(rf"\b{question.answers[0]}\b", document.text) for question in document.questions)


def test_neither_who_nor_what_alone_answers_a_toy_question():
    """A reader who looks at the relation only, or at the name only, and guesses among what it finds, is mostly wrong."""
    by_relation, by_name = [], []
    relation_of = {value: n for n, relation in enumerate(tasks.toy_world()["relations"]) for value in relation["values"]}
    for seed in range(300):
        document = tasks.toy_document(random.Random(seed), (4, 8))
        told = [(next(w for w in re.findall(r"\w+", q.text) if w in tasks.toy_world()["names"]), relation_of[q.answers[0]]) for q in document.questions]
        for name, relation in told:
            by_relation.append(1 / sum(other == relation for _, other in told))
            by_name.append(1 / sum(other == name for other, _ in told))
    assert statistics.fmean(by_relation) < 0.55 and statistics.fmean(by_name) < 0.65


def test_no_toy_value_belongs_to_two_relations_or_is_a_name():
    values = [value for relation in tasks.toy_world()["relations"] for value in relation["values"]]
    assert len(set(values) | set(tasks.toy_world()["names"])) == len(values) + len(tasks.toy_world()["names"])


def test_the_toy_vocabulary_is_all_that_documents_say():
    said = set()
    for seed in range(400):
        document = tasks.toy_document(random.Random(seed), (16, 16))
        said |= set(re.findall(r"\w+", " ".join([document.text, *(question.text for question in document.questions)])))
    assert said == set(tasks.toy_vocabulary())


# ------------------------------------------------------------------------------------------------ our own prose


def test_prose_is_there_and_answers_its_questions():
    assert len(PROSE) >= 500
    for record in PROSE:
        document = prose_document(record)
        assert document.questions and all(q.answers[0] in document.text for q in document.questions)
        assert all(value in document.text for value in record["values"])
        assert set(record["values"].values()) <= INVENT.keys()


def test_share_zero_gives_the_prose_as_written():
    for record in PROSE:
        assert varied_prose(record, random.Random(0), share=0) == prose_document(record)


def test_varied_prose_replaces_names_and_numbers_alike_everywhere():
    for record in PROSE:
        plain, varied = prose_document(record), varied_prose(record, random.Random(1), share=1)
        assert all(q.answers[0] in varied.text for q in varied.questions)
        became: dict[str, set[str]] = {}
        for old, new in zip(words(plain), words(varied), strict=True):
            became.setdefault(old, set()).add(new)
        names = [value for value, kind in record["values"].items() if kind not in ("year", "number", "date")]
        for word in re.findall(r"\b[A-Z][a-z]{2,}\b", " ".join(names)):
            if word != "The":
                assert len(became[word]) == 1 and became[word] != {word}
        valued = set(re.findall(r"\w+", " ".join(record["values"])))
        assert all(new == {old} for old, new in became.items() if old not in valued)


def test_varied_prose_is_new_for_every_seed():
    record = next(record for record in PROSE if len(record["values"]) > 3)
    assert varied_prose(record, random.Random(1)) == varied_prose(record, random.Random(1)) != varied_prose(record, random.Random(2))


def test_excerpts_are_neighbouring_sentences_that_answer_their_questions():
    shortened = 0
    for seed, record in enumerate(PROSE):
        document = prose_document(record)
        part = excerpt(document, random.Random(seed), (1, 2))
        assert part.questions and all(q in document.questions and q.answers[0] in part.text for q in part.questions)
        if part != document:
            shortened += 1
            parts, whole = (re.findall(r".+", t) if t.startswith("Speaker ") else sentences(t) for t in (part.text, document.text))
            assert len(parts) <= 2 and any(whole[n : n + len(parts)] == parts for n in range(len(whole)))
            assert all(q in part.questions for q in document.questions if re.search(rf"(?<!\w){re.escape(q.answers[0])}(?!\w)", part.text))
    assert shortened > len(PROSE) / 2


def test_excerpts_of_a_conversation_are_neighbouring_turns():
    turns = ["Speaker 1: Hi! I am Al.\n", "Speaker 2: Oh? You?\n\n", "Speaker 2: I am Bo. I sell red hats.\n", "Speaker 1: Red ones?"]
    document = Document("".join(turns), (Question("What does Speaker 2 sell?", ("red hats",)),))
    parts = {excerpt(document, random.Random(seed), (1, 2)).text for seed in range(20)}
    assert parts == {turns[2].strip(), turns[1] + turns[2].strip(), turns[2] + turns[3], document.text}


def test_an_excerpt_without_an_answer_is_the_whole_document():
    document = Document("One. Two. Three.", (Question("What comes last?", ("Four",)),))
    assert excerpt(document, random.Random(0), (1, 1)) == document


def test_an_excerpt_answers_in_whole_words():
    document = Document("It was 1957. He had 9 cats.", (Question("How many cats?", ("9",)), Question("When?", ("1957",))))
    excerpts = [excerpt(document, random.Random(seed), (1, 1)) for seed in range(9)]
    assert {(part.text, len(part.questions)) for part in excerpts} == {("It was 1957.", 1), ("He had 9 cats.", 1)}


def test_a_cloze_breaks_a_sentence_off_before_a_name_or_a_number():
    text = "The inn at Lower Wick burned in 1911. nobody knows why."
    drawn = {(q.text, *q.answers) for q in (cloze(text, random.Random(seed)) for seed in range(40))}
    before_a_word = {("nobody", "knows"), ("nobody knows", "why")}
    assert drawn == {("The inn at", "Lower Wick"), ("The inn at Lower Wick burned in", "1911")} | before_a_word


@pytest.mark.parametrize(("text", "asked", "answer"), [("Hello", "...", "Hello"), ("a b", "a", "b"), ("One. Two.", "One.", "Two"), ("12", "...", "12")])
def test_a_cloze_can_be_made_of_any_text(text, asked, answer):
    assert cloze(text, random.Random(0)) == Question(asked, (answer,))


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_documents_share_no_sentence_with_the_training_prose(name):
    trained = {sentence for record in PROSE for sentence in sentences(record["text"])}
    assert not [s for document in read_documents(DATA / "documents" / name) for s in sentences(document.text) if s in trained]


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_documents_share_no_full_name_with_the_training_prose(name):
    trained = {value for record in PROSE for value, kind in record["values"].items() if kind == "person" and " " in value}
    assert not [person for document in read_documents(DATA / "documents" / name) for person in trained if person in document.text]


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_answers_stand_in_their_documents(name):
    for document in read_documents(DATA / "documents" / name):
        assert all(answer in document.text for question in document.questions for answer in question.answers[:1])


# ------------------------------------------------------------------------------------------- other people's files

RECORD = {"context": "Ann is a vet.\u2028Bo is not.", "qas": [{"question": "Who is a vet?", "answers": ["Ann", "Ann is"]}]}
DOCUMENT = Document("Ann is a vet.\u2028Bo is not.", (Question("Who is a vet?", ("Ann", "Ann is")),))
SQUAD_QA = {"id": "1", "question": "Who is a vet?", "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann is", "answer_start": 0}]}


def line(**changed) -> str:
    return json.dumps(RECORD | changed)


def with_answers(answers) -> str:
    return line(qas=[{"question": "Who?", "answers": answers}])


@pytest.fixture
def file(tmp_path):
    """A function: content -> the path of a file that holds it."""

    def write(content: str | bytes):
        path = tmp_path / "given.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (line(), 1),
        (json.dumps(RECORD, indent=1), 1),
        (f"{line()}\n\n{line()}\n", 2),
        (json.dumps({"version": "1.1", "data": [{"title": "Vets", "paragraphs": [RECORD | {"qas": [SQUAD_QA]}] * 3}]}), 3),
    ],
)
def test_documents_are_read(content, count, file):
    assert read_documents(file(content)) == [DOCUMENT] * count


def test_an_unescaped_line_separator_is_no_line_break(file):
    assert read_documents(file(f"{json.dumps(RECORD, ensure_ascii=False)}\n" * 2)) == [DOCUMENT] * 2


MALFORMED = {
    "empty": ("", "empty"),
    "blank": (" \n\n", "empty"),
    "not UTF-8": ("café".encode("latin-1"), r"not UTF-8 \(byte 3\)"),
    "broken line": (f'{line()}\n\n{{"context": ', "line 3: not JSON"),
    "not JSON at all": ("Ann is a vet.", "line 1: not JSON"),
    "no articles": ('{"data": []}', "no documents"),
    "articles are a number": ('{"data": 5}', "expected SQuAD"),
    "articles without paragraphs": ('{"data": [{"title": "Vets"}]}', "'paragraphs' is missing"),
    "a number": ("5", "expected SQuAD"),
    "a list": ("[1]", "document 1: it needs a list 'qas'.*found nothing"),
    "second record is a string": (f'{line()}\n"Ann"', "document 2: it needs a list 'qas'"),
    "wrong key": ('{"context": "Ann", "questions": []}', "document 1: it needs a list 'qas'.*found nothing"),
    "no questions": (line(qas=[]), "needs a list 'qas' that is not empty, found list"),
    "questions are a string": (line(qas="Who?"), "needs a list 'qas'.*found str"),
    "a question is a string": (line(qas=["Who?"]), "a question needs a list 'answers'.*found nothing"),
    "no question": (line(qas=[{"answers": ["Ann"]}]), "a question needs a str 'question'.*found nothing"),
    "empty question": (line(qas=[{"question": "", "answers": ["Ann"]}]), "a question needs a str 'question' that is not empty, found str"),
    "no answers": (line(qas=[{"question": "Who?"}]), "a question needs a list 'answers'.*found nothing"),
    "empty answers": (with_answers([]), "a question needs a list 'answers' that is not empty, found list"),
    "answers are a string": (with_answers("Ann"), "a question needs a list 'answers'.*found str"),
    "answers are numbers": (with_answers([1957]), "'answers' must be strings.*found 1957"),
    "answers without text": (with_answers([{"answer": "Ann"}]), "'answers' must be strings"),
    "context is a list": (line(context=["Ann"]), "it needs a str 'context'.*found list"),
    "empty context": (line(context=""), "it needs a str 'context' that is not empty"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_documents_are_refused_with_file_and_place(content, message, file):
    with pytest.raises(BadData, match=f"given.json.*{message}") as refusal:
        read_documents(file(content))
    assert "\n" not in str(refusal.value)


@given(st.integers(0, 10_000))
def test_a_dialogue_has_sessions_turns_and_one_right_answer_a_question(seed):
    document = world_dialogue(random.Random(seed), facts=(4, 8))
    sessions = document.text.split("\n\n")
    turns = [line.split(": ", 1) for session in sessions for line in session.split("\n")]
    assert 2 <= len(sessions) <= 3 and len({speaker for speaker, _ in turns}) <= 2
    assert 4 <= len(document.questions) <= 8
    for question in document.questions:
        told = [speaker for speaker, said in turns if question.answers[0] in said]
        assert told and any(speaker in question.text for speaker in told)


@given(st.integers(0, 10_000))
def test_a_task_shows_every_label_and_asks_about_new_things(seed):
    document = world_task(random.Random(seed))
    shown = re.findall(r"Question: (.+)\nAnswer: (.+)", document.text)
    labels = document.questions[0].options
    assert {label for _, label in shown} == {*labels} and 2 <= len(labels) <= 4
    for question in document.questions:
        assert question.options == labels and question.answers[0] in labels


@given(st.integers(0, 10_000))
def test_a_lesson_asks_about_new_things_and_has_shown_every_kind_that_it_asks_for(seed):
    document = lesson(random.Random(seed))
    shown = dict(re.findall(r"Question: (.+)\nAnswer: (.+)", document.text))
    assert 4 <= len(shown) <= 8 and document.questions
    for question in document.questions:
        assert question.text not in shown
        if question.options:
            assert question.answers[0] in shown.values() and {*shown.values()} <= {*question.options}


def test_no_lesson_is_one_of_the_tasks_to_evaluate_on():
    evaluated = {(q.text, q.answers[0]) for document in read_demonstrations(DATA / "tasks") for q in document.questions}
    for task in tasks._records("lessons.jsonl"):
        assert not (DATA / "tasks" / task["task"]).exists()
        taught = task.get("pairs") or [(thing, kind) for kind, things in task["kinds"].items() for thing in things]
        assert not evaluated & set(map(tuple, taught))


TALK = {"sessions": [[{"speaker": "A", "text": "I keep bees."}], [{"speaker": "B", "text": "Nine hives."}]], "question": "Who?", "answers": ["A"]}


@pytest.mark.parametrize("tokens", [1, 4, 7, 10, 30])
def test_joined_documents_have_the_length_and_ask_everything_once(tokens):
    documents = [Document("x " * length, (Question(f"{n}?", ("x",)),)) for n, length in enumerate((4, 5, 3, 6, 2, 7, 3))]
    contexts = joined(documents, tokens, lambda text: len(text.split()))
    assert [question.text for context in contexts for question in context.questions] == [f"{n}?" for n in range(7)]
    longest = max(len(document.text.split()) for document in documents)
    for context in contexts:
        assert min(tokens - longest / 2, 2) <= len(context.text.split()) <= tokens + longest


def test_more_tokens_than_there_are_cannot_be_joined():
    documents = [Document("x x x", (Question("?", ("x",)),))] * 2
    with pytest.raises(BadData, match="contexts of 7 tokens asked, but all the documents have 6"):
        joined(documents, 7, lambda text: len(text.split()))


def test_dialogues_with_the_same_sessions_are_one_document(tmp_path):
    other = TALK | {"sessions": TALK["sessions"][:1]}
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, [TALK, other, TALK | {"question": "How many?", "answers": ["nine", "9"]}])))
    both, first = read_dialogues(tmp_path / "talk.jsonl")
    assert both == Document("A: I keep bees.\n\nB: Nine hives.", (Question("Who?", ("A",)), Question("How many?", ("nine", "9"))))
    assert first.text == "A: I keep bees." and len(first.questions) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TALK | {"sessions": []}, "line 2: it needs a list 'sessions' that is not empty, found list"),
        (TALK | {"sessions": "A: hello"}, "line 2: it needs a list 'sessions' that is not empty, found str"),
        (TALK | {"sessions": [[]]}, "line 2: every session must be a list of turns that is not empty"),
        (TALK | {"sessions": [["hello"]]}, "line 2: a turn needs a str 'speaker' that is not empty, found nothing"),
        (TALK | {"sessions": [[{"speaker": "A", "text": 3}]]}, "line 2: a turn needs a str 'text' that is not empty, found int"),
        (TALK | {"question": ""}, "line 2: it needs a str 'question'"),
        (TALK | {"answers": [3]}, "line 2: 'answers' must be strings"),
        ([], "line 2: it needs a list 'sessions'"),
    ],
)
def test_a_malformed_dialogue_is_named(record, message, tmp_path):
    (tmp_path / "talk.jsonl").write_text(f"{json.dumps(TALK)}\n{json.dumps(record)}")
    with pytest.raises(BadData, match=rf"talk\.jsonl, {message}"):
        read_dialogues(tmp_path / "talk.jsonl")


SHOWN = {"task": "colour", "input": "a rose", "output": "red", "options": ["red", "blue"]}


@pytest.fixture
def task_files(tmp_path):
    """A function: the lines of a task's test file -> the folder of its tasks."""

    def write(*lines, name="colour_2_13"):
        (tmp_path / "colour").mkdir(exist_ok=True)
        (tmp_path / "colour" / f"{name}_train.jsonl").write_text("\n".join(map(json.dumps, [SHOWN, SHOWN | {"input": "the sea", "output": "blue"}])))
        (tmp_path / "colour" / f"{name}_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return tmp_path

    return write


def test_demonstrations_become_a_document_whose_questions_are_the_test(task_files):
    plain = {"task": "colour", "input": "snow", "output": "white"}
    [document] = read_demonstrations(task_files(SHOWN, plain | {"options": []}, plain))
    assert document.text == "Question: a rose\nAnswer: red\n\nQuestion: the sea\nAnswer: blue"
    assert document.questions == (Question("a rose", ("red",), ("red", "blue")), *[Question("snow", ("white",))] * 2)


def test_every_seed_and_size_of_a_task_is_a_document(task_files):
    task_files(SHOWN)
    task_files(SHOWN, SHOWN, name="colour_16_21")
    assert [len(document.questions) for document in read_demonstrations(task_files(SHOWN, name="colour_2_13"))] == [2, 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (SHOWN | {"task": "capital"}, "line 2: task 'capital' in the folder of 'colour'"),
        (SHOWN | {"input": ["a rose"]}, "line 2: it needs a str 'input' that is not empty, found list"),
        ({"task": "colour", "input": "a rose"}, "line 2: it needs a str 'output' that is not empty, found nothing"),
        (SHOWN | {"options": "red"}, "line 2: 'options' must be a list of strings"),
        (SHOWN | {"options": ["red", ""]}, "line 2: 'options' must be a list of strings"),
        (SHOWN | {"output": "green"}, "line 2: 'output' 'green' is none of the 'options'"),
    ],
)
def test_a_malformed_example_is_named(record, message, task_files):
    with pytest.raises(BadData, match=rf"colour_2_13_test\.jsonl, {message}"):
        read_demonstrations(task_files(SHOWN, record))


def test_a_test_without_a_file_or_without_lines_is_named(task_files):
    folder = task_files(SHOWN)
    (folder / "colour" / "colour_2_13_test.jsonl").write_text("\n")
    with pytest.raises(BadData, match=r"colour_2_13_test\.jsonl: the file is empty"):
        read_demonstrations(folder)
    (folder / "colour" / "colour_2_13_test.jsonl").unlink()
    with pytest.raises(BadData, match=r"colour_2_13_test\.jsonl: no such file"):
        read_demonstrations(folder)


@pytest.mark.parametrize("read", [read_text, read_documents, read_paragraphs])
def test_what_is_no_file_is_refused(read, tmp_path):
    with pytest.raises(BadData, match=r"nowhere\.txt: no such file"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(BadData, match="is a folder"):
        read(tmp_path)


def test_paragraphs_of_wikitext(file):
    content = ' = A heading that is long enough to count = \n\n It was 3 @.@ 5 km long ( or " so " ) , they said . \n\n Short . \n'
    assert read_paragraphs(file(content), shortest=20) == ['It was 3.5 km long (or "so"), they said.']


def test_paragraphs_of_wrapped_text(file):
    content = "She said 'no' to the\nwhole plan, and left.\n\nAnother short\nparagraph of text.\n"
    assert read_paragraphs(file(content), shortest=25) == ["She said 'no' to the whole plan, and left.", "Another short paragraph of text."]


# --------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("prediction", "answers", "expected_f1", "expected_em", "expected_recall"),
    [
        ("Paris", ["paris"], 100, 100, 100),
        ("The Eiffel Tower!", ["an eiffel-tower", "eiffel tower"], 100, 100, 100),  # articles, punctuation, the best of several
        ("The cat sat.", ["a cat sat down"], 80, 0, 0),  # 2 words of 2 and 3:  2 * 2 / 5
        ("blue", ["red", "blue whale"], 200 / 3, 0, 0),  # 1 of 1 and 2
        ("very very big", ["very big"], 80, 0, 100),  # a repeated word counts once:  2 * 2 / 5
        ("It was built by Ann Lee in 1901", ["Ann Lee"], 40, 0, 100),  # 2 of 8 and 2
        ("in 19011 and 1901st", ["1901"], 0, 0, 0),  # recall takes whole words only
        ("Ann and Lee", ["Ann Lee"], 80, 0, 0),  # and in one piece
        ("the theatre", ["atre"], 0, 0, 0),  # an article is a word, not a prefix
        ("U.S.", ["us"], 100, 100, 100),
        ("", ["Paris"], 0, 0, 0),
        ("the", ["a"], 100, 100, 100),  # SQuAD: nothing left on both sides agrees
    ],
)
def test_metrics_worked_by_hand(prediction, answers, expected_f1, expected_em, expected_recall):
    assert f1(prediction, answers) == pytest.approx(expected_f1)
    assert exact_match(prediction, answers) == expected_em
    assert answer_recall(prediction, answers) == expected_recall


said = st.lists(st.sampled_from(["the", "a", "Ann", "ann", "Lee", "1901", "1901.", "-", ""]), max_size=5).map(" ".join) | st.text(max_size=20)


@given(said, said, said)
def test_metrics_keep_their_promises(one, other, third):
    assert f1(one, [other]) == f1(other, [one])
    assert 0 <= f1(one, [other]) <= f1(one, [other, third]) <= 100
    assert f1(one, [one]) == exact_match(one, [one]) == answer_recall(one, [one]) == 100
    if exact_match(one, [other, third]):
        assert f1(one, [other, third]) == answer_recall(one, [other, third]) == 100
