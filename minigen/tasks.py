"""Contexts and questions: a synthetic world with open values, our own prose, raw text, readers for other people's files, and the metrics."""

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics as pydoc_topics

DATA = Path(__file__).parent.parent / "data"


@dataclass(frozen=True)
class Question:
    """A question about a document, every answer that counts as right (the first is the one trained on), and what there is to choose from, if anything."""

    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A context, what is asked about it, and the task that it shows by examples, if it does."""

    text: str
    questions: tuple[Question, ...]
    task: str = ""


class BadData(ValueError):
    """A file that cannot be used; its message names the file, the place and the remedy."""


def question_prompt(question: str) -> str:
    """How a question is put to the LM, with an adapter or without."""
    return f"Question: {question}\nAnswer:"


# ------------------------------------------------------------------------------------------------ values

ONSETS = "b bl br c ch cl cr d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk sl st t th tr v w y z".split()
VOWELS = "a e i o u a e i o ai ea ou ie".split()
CODAS = "n r l s m t d k x nd rt st lm rn ck th v sk".split()
MONTHS = "January February March April May June July August September October November December".split()
QUALITIES = (
    "amber ancient bent blue brass broken bronze carved ceramic cheap copper cracked crimson crooked dented dusty empty enamel folding frozen "
    "giant gilded glass golden green hollow iron ivory lacquered leather linen long marble narrow nickel oak old orange padded paper pewter "
    "plastic polished purple rare red round rubber rusty secret sharp silent silk silver small spare square steel stolen striped tin velvet "
    "wicker wooden woollen yellow"
).split()
OBJECTS = (
    "anchor anvil apron axe balloon barometer barrel basket bell bicycle blanket boat bottle bracelet brush bucket button cage camera candle "
    "canoe carpet chair chess set clock coat coin comb compass cradle crown cup desk doll door drum fan feather flag flute fork globe glove "
    "hammer harp hat helmet horn jar kettle key kite ladder lamp lantern lens lock map mask medal mirror mug necklace needle oar organ paddle "
    "pan pen pillow pipe pistol plate plough pump puppet raft ring rope rug saddle saw scarf shield shoe sled spoon stamp statue stove sword "
    "table teapot telescope tent thimble trumpet trunk umbrella vase violin wagon wheel whistle window"
).split()
BRANCHES = "Bakery Bank Brothers Books Cement Chemicals Films Foundry Freight Gas Glass Motors Mills Optics Paper Press Radio Steel Textiles Tools".split()
OCCASIONS = "Boat Race,Book Fair,Chess Cup,Cycling Tour,Film Week,Flower Show,Jazz Nights,Kite Day,Marathon,Science Fair,Ski Games,Song Contest".split(",")
WARES = "bicycle boiler camera clock drill engine heater kettle lamp loom mixer piano printer pump radio saw scooter stove tractor watch".split()


def invented_word(rng: random.Random, syllables: Sequence[int] = (2, 3)) -> str:
    """A name that nobody bears, of two or three syllables: several tokens, new in every document."""
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice(syllables)))
    return (word + (rng.choice(CODAS) if rng.random() < 0.6 else "")).capitalize()


INVENT: dict[str, Callable[[random.Random], str]] = {
    "person": lambda rng: f"{invented_word(rng, (1, 2))} {invented_word(rng)}",
    "place": lambda rng: invented_word(rng) + rng.choice(["", "", "ton", "burg", "mere", "port"]),
    "organisation": lambda rng: f"{invented_word(rng)} {rng.choice(BRANCHES)}",
    "name": invented_word,
    "title": lambda rng: f"The {rng.choice(QUALITIES).capitalize()} {rng.choice(OBJECTS).capitalize()}",
    "thing": lambda rng: f"{rng.choice(QUALITIES)} {rng.choice(OBJECTS)}",
    "year": lambda rng: str(rng.randint(1500, 2060)),
    "number": lambda rng: str(rng.randint(11, 9999)),
    "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
    "code": lambda rng: f"{rng.choice(string.ascii_uppercase)}{rng.choice(string.ascii_uppercase)}-{rng.randint(100, 9999)}",
    "product": lambda rng: f"{invented_word(rng)} {rng.choice(WARES)}",
    "event": lambda rng: f"{invented_word(rng)} {rng.choice(OCCASIONS)}",
}


def open_value(kind: str, rng: random.Random) -> str:
    """A value drawn fresh, as good as never seen before."""
    return INVENT[kind](rng)


def closed_value(kind: str, rng: random.Random) -> str:
    """One of sixteen values that every document of the world shares: a list that a generator can learn by heart."""
    return INVENT[kind](random.Random(f"{kind} {rng.randrange(16)}"))


VALUES = {"open": open_value, "closed": closed_value}


# --------------------------------------------------------------------------------------- documents of our own


@cache
def _records(file: str) -> tuple[dict, ...]:
    return tuple(json.loads(line) for line in (DATA / file).read_text().splitlines())


def world_document(rng: random.Random, facts: tuple[int, int] = (4, 8), values: str = "open", rivals: bool = False) -> Document:
    """A document of the synthetic world: facts about a few subjects in shuffled order, one question a fact.

    values: "open" (drawn fresh) or "closed" (lists of sixteen); the subjects' names are always fresh.
    rivals: all subjects are of one kind and the same is told of each, so that only whose a value is tells it from the others.
    """
    count = rng.randint(*facts)
    told = []
    while len(told) < count:
        anew = not (rivals and told)
        if anew:
            about = rng.choice(("person", "person", "place", "organisation", "product", "event"))
        subject = open_value(about, rng)
        if anew:
            own = [relation for relation in _records("world.jsonl") if relation["about"] == about]
            relations = rng.sample(own, min(rng.randint(1, 4), count - len(told)))
        told += [(subject, relation, VALUES[values](relation["value"], rng)) for relation in relations[: count - len(told)]]
    rng.shuffle(told)
    return tell(told, rng)


def tell(facts: Sequence[tuple[str, dict, str]], rng: random.Random) -> Document:
    """Facts (subject, relation, value) as sentences, with one question each."""
    text = " ".join(_capital(rng.choice(r["says"]).format(s=s, v=v)) for s, r, v in facts)
    return Document(text, tuple(Question(rng.choice(r["asks"]).format(s=s), (v,)) for s, r, v in facts))


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


REPLIES = (
    "Really? Tell me more. / Oh, I did not know that. / That sounds good to me. / How nice! / And how was it? / I am sorry, go on. / You never told me. / "
    "No, is that so? / Ha, that is just like you. / I have to think about that. / Good to hear from you. / Let us talk about it on Sunday. / Well, well."
).split(" / ")


def world_dialogue(rng: random.Random, facts: tuple[int, int] = (4, 8)) -> Document:
    """Two speakers who tell each other about themselves in two or three sessions, one question a fact; who said it matters as much as what.

    Speakers are numbered, as in Multi-Session Chat, or have fresh names.
    """
    speakers = rng.choice([("Speaker 1", "Speaker 2"), (invented_word(rng), invented_word(rng))])
    told = [(rng.choice(speakers), relation, open_value(relation["value"], rng)) for relation in rng.sample(_records("talk.jsonl"), rng.randint(*facts))]
    again = [(*(s for s in speakers if s != speaker), relation, open_value(relation["value"], rng)) for speaker, relation, _ in told if rng.random() < 0.3]
    told = rng.sample(told + again, len(told))
    breaks = set(rng.sample(range(1, len(told)), min(rng.randint(1, 2), len(told) - 1)))
    lines = []
    for n, (speaker, relation, value) in enumerate(told):
        lines += [""] * (n in breaks) + [f"{speaker}: {rng.choice(relation['says']).format(v=value)}"]
        if rng.random() < 0.4:
            lines.append(f"{speakers[speaker == speakers[0]]}: {rng.choice(REPLIES)}")
    return Document("\n".join(lines), tuple(Question(rng.choice(r["asks"]).format(s=s), (v,)) for s, r, v in told))


def world_task(rng: random.Random) -> Document:
    """A task shown by examples: sort things into kinds, by the kinds' own names or by words that mean nothing else; new things are the questions."""
    kinds = rng.sample(["person", "place", "title", "thing", "year", "date", "code", "product", "event"], rng.randint(2, 4))
    named = rng.random() < 0.5
    labels = {kind: kind if named else invented_word(rng).lower() for kind in kinds}
    shown = [kind for kind in kinds for _ in range(rng.randint(1, 3))]
    rng.shuffle(shown)
    text = "\n\n".join(f"{question_prompt(open_value(kind, rng))} {labels[kind]}" for kind in shown)
    asked = [rng.choice(kinds) for _ in range(10)]
    return Document(text, tuple(Question(open_value(kind, rng), (labels[kind],), tuple(labels.values())) for kind in asked), "examples")


def lesson(rng: random.Random) -> Document:
    """A task of data/lessons.jsonl shown by 4 to 8 examples, and new ones as questions; half of the kinds to sort into have invented names."""
    task = rng.choice(_records("lessons.jsonl"))
    examples, options = task.get("pairs"), ()
    if "kinds" in task:
        kinds = rng.sample(list(task["kinds"]), rng.randint(2, len(task["kinds"])))
        options = tuple(kinds) if rng.random() < 0.5 else tuple(invented_word(rng).lower() for _ in kinds)
        examples = [(thing, label) for kind, label in zip(kinds, options, strict=True) for thing in task["kinds"][kind]]
    return shown_by_examples([Question(given, (wanted,), options) for given, wanted in examples], rng)


def shown_by_examples(examples: Sequence[Question], rng: random.Random) -> Document:
    """A task shown by 4 to 8 of its examples, and up to ten others as questions; of a task with options only such as were shown."""
    examples, count = rng.sample(examples, len(examples)), rng.randint(4, 8)
    known = {example.answers[0] for example in examples[:count]}
    asked = [example for example in examples[count:] if example.answers[0] in known or not example.options]
    return Document(demonstrated(examples[:count]), tuple(asked[:10]), "examples")


def demonstrated(examples: Sequence[Question]) -> str:
    """Examples as a context: each put as a question is, with its answer."""
    return "\n\n".join(f"{question_prompt(example.text)} {example.answers[0]}" for example in examples)


@cache
def toy_world() -> dict:
    """All there is in the toy LM's world: {"names": [...], "relations": [{"says": [...], "asks": [...], "values": [...]}]}."""
    return json.loads((DATA / "toy_world.json").read_text())


def toy_document(rng: random.Random, facts: tuple[int, int] = (4, 8)) -> Document:
    """A document of the toy world: a few things about each of several people, in any order, one question a fact.

    Most things are told of more than one person, so that who was asked about matters as much as what.
    """
    count = rng.randint(*facts)
    people = rng.sample(toy_world()["names"], min(count, rng.randint(2, 2 + count // 3)))
    relations = rng.sample(toy_world()["relations"], -(-count // len(people)))
    pairs = rng.sample(list(product(people, relations)), count)
    return tell([(name, relation, rng.choice(relation["values"])) for name, relation in pairs], rng)


def toy_vocabulary() -> list[str]:
    """Every word of the toy world, in alphabetical order."""
    sentences = [sentence for relation in toy_world()["relations"] for sentence in relation["says"] + relation["asks"]]
    words = re.findall(r"\w+", " ".join(sentences).replace("{s}", "").replace("{v}", ""))
    return sorted({*words, *toy_world()["names"], *(value for relation in toy_world()["relations"] for value in relation["values"])})


def read_prose(paths: Sequence[Path]) -> list[dict]:
    """Our own prose: JSON lines {"text", "values": {name: kind}, "qas": [[question, answer]]}."""
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]


def prose_document(record: dict) -> Document:
    """A record of our own prose as it was written."""
    return Document(record["text"], tuple(Question(q, (a,)) for q, a in record["qas"]))


def varied_prose(record: dict, rng: random.Random, share: float = 0.7) -> Document:
    """The same prose with most of its names, dates and numbers replaced by fresh ones, alike in text, questions and answers."""
    fresh: dict[str, str] = {}
    for value, kind in record["values"].items():
        if rng.random() > share:
            continue
        if kind == "year":
            fresh[value] = open_value("year", rng)
        elif kind == "number":
            fresh[value] = re.sub(r"\d", lambda _: str(rng.randint(1, 9)), value)
        elif kind == "date":
            moved = re.sub("|".join(MONTHS), lambda _: rng.choice(MONTHS), value)
            fresh[value] = re.sub(r"\d+", lambda m: open_value("year", rng) if len(m[0]) == 4 else str(rng.randint(1, 28)), moved)
        else:
            fresh.update({word: invented_word(rng) for word in re.findall(r"\b[A-Z][a-z]{2,}\b", value) if word != "The"})
    if not fresh:
        return prose_document(record)
    known = re.compile(r"\b(" + "|".join(map(re.escape, sorted(fresh, key=len, reverse=True))) + r")\b")

    def renamed(text: str) -> str:
        return known.sub(lambda m: fresh[m[0]], text)

    return Document(renamed(record["text"]), tuple(Question(renamed(q), (renamed(a),)) for q, a in record["qas"]))


def excerpt(document: Document, rng: random.Random, sentences: tuple[int, int]) -> Document:
    """A few neighbouring sentences (of a conversation, turns) of a document with the questions that they answer; the whole of it where they answer none."""
    turns = document.text.startswith("Speaker ")
    parts = re.findall(r".+\n*" if turns else r"(?s:.+?(?:[.!?]\s+|$))", document.text)
    count = rng.randint(*sentences)
    start = rng.randrange(max(1, len(parts) - count + 1))
    text = "".join(parts[start : start + count]).strip()
    questions = tuple(q for q in document.questions if re.search(rf"(?<!\w){re.escape(q.answers[0])}(?!\w)", text))
    return Document(text, questions) if questions else document


def cloze(text: str, rng: random.Random) -> Question:
    """A question that any text answers: a sentence broken off before a name or a number (or, having none, before any word)."""
    sentence = rng.choice([s for s in re.split(r"(?<=[.!?])\s+", text) if " " in s] or [text])
    marked = list(re.finditer(r"(?<=\w )(?:[A-Z][\w-]*(?: [A-Z][\w-]*)*|\d[\d,.]*\b)", sentence))
    chosen = rng.choice(marked or list(re.finditer(r"(?<=\S\s)\w+", sentence)) or [re.search(r"\S+", sentence)])
    return Question(sentence[: chosen.start()].strip() or "...", (chosen[0],))


# ------------------------------------------------------------------------------------------- other people's files


def read_text(path: str | Path) -> str:
    """A UTF-8 text file that is not empty, or BadData."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadData(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise BadData(f"{path} is a folder; name a text file in it") from None
    except UnicodeDecodeError as error:
        raise BadData(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    if not text.strip():
        raise BadData(f"{path}: the file is empty; give a text to read")
    return text


def read_documents(path: str | Path) -> list[Document]:
    """Documents with questions: a SQuAD v1.1 JSON file, or JSON lines {"context", "qas": [{"question", "answers"}]}."""
    text = read_text(path)
    try:
        squad = json.loads(text)
        records = [p for article in squad["data"] for p in article["paragraphs"]] if "data" in squad else [squad]
    except json.JSONDecodeError:
        records = [record for _, record in _json_lines(path, text)]
    except (KeyError, TypeError) as error:
        raise BadData(f"{path}: field {error} is missing or of the wrong type; expected SQuAD's data / paragraphs / context, qas") from None
    if not records:
        raise BadData(f"{path}: no documents in it; expected at least one context with questions")
    return [_squad_document(f"{path}, document {number}", record) for number, record in enumerate(records, 1)]


def _json_lines(path, text: str) -> list[tuple[str, object]]:
    """Every record, with the file and the line where it stands."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            records += [(f"{path}, line {number}", json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise BadData(f"{path}, line {number}: not JSON ({error.msg}); write one object a line") from None
    return records


def _need(where: str, value, field: str, kind: type, holder: str = "it"):
    """A field that has to be there, of its type and not empty."""
    if not isinstance(value, dict) or not isinstance(value.get(field), kind) or not value[field]:
        found = type(value.get(field)).__name__ if isinstance(value, dict) and field in value else "nothing"
        raise BadData(f"{where}: {holder} needs a {kind.__name__} {field!r} that is not empty, found {found}")
    return value[field]


def _answers(where: str, record, holder: str) -> tuple[str, ...]:
    answers = [a["text"] if isinstance(a, dict) and "text" in a else a for a in _need(where, record, "answers", list, holder)]
    if not all(isinstance(a, str) for a in answers):
        raise BadData(f"{where}: 'answers' must be strings or {{'text': string}}, found {answers[0]!r}")
    return tuple(answers)


def _squad_document(where: str, record) -> Document:
    asked = _need(where, record, "qas", list)
    questions = tuple(Question(answers=_answers(where, qa, "a question"), text=_need(where, qa, "question", str, "a question")) for qa in asked)
    return Document(_need(where, record, "context", str), questions)


def together(documents: Sequence[Document], asked: int | None = None) -> Document:
    """Documents as one context, an empty line between them, with the questions of the first `asked` of them, or of all."""
    questions = tuple(question for document in documents[:asked] for question in document.questions)
    return Document("\n\n".join(document.text for document in documents), questions)


def joined(documents: Sequence[Document], tokens: int, count: Callable[[str], int]) -> list[Document]:
    """Neighbouring documents joined to contexts of about so many tokens, all their questions asked (the paper's protocol).

    count: how many tokens a text has. The last context is filled up with the first documents' texts, whose questions it does not ask again.
    """
    lengths = [count(document.text) for document in documents]
    if sum(lengths) < tokens:
        raise BadData(f"contexts of {tokens} tokens asked, but all the documents have {sum(lengths)}; ask for shorter ones or give more documents")
    contexts, first = [], 0
    while first < len(documents):
        last, length = first, 0
        while length < tokens and (last == first or length + lengths[last % len(documents)] / 2 <= tokens):
            length += lengths[last % len(documents)]
            last += 1
        parts = [documents[n % len(documents)] for n in range(first, last)]
        contexts.append(together(parts, asked=len(documents) - first))
        first = last
    return contexts


def read_dialogues(path: str | Path) -> list[Document]:
    """Conversations with questions: JSON lines {"sessions": [[{"speaker", "text"}]], "question", "answers"}; lines with the same sessions in one."""
    asked: dict[str, list[Question]] = {}
    for where, record in _json_lines(path, read_text(path)):
        sessions = _need(where, record, "sessions", list)
        if not all(isinstance(session, list) and session for session in sessions):
            raise BadData(f"{where}: every session must be a list of turns that is not empty, as [{{'speaker', 'text'}}]")
        turns = [[f"{_need(where, turn, 'speaker', str, 'a turn')}: {_need(where, turn, 'text', str, 'a turn')}" for turn in s] for s in sessions]
        text = "\n\n".join("\n".join(session) for session in turns)
        asked.setdefault(text, []).append(Question(_need(where, record, "question", str), _answers(where, record, "it")))
    return [Document(text, tuple(questions)) for text, questions in asked.items()]


def read_demonstrations(folder: str | Path) -> list[Document]:
    """Tasks shown by examples, a MetaICL folder: TASK/TASK_K_SEED_train.jsonl and ..._test.jsonl, lines {"task", "input", "output", "options"}.

    A document for every K and seed of a task: the demonstrations as questions with their answers; the test's inputs are its questions.
    """
    folder = Path(folder)
    shown = sorted(path for path in folder.glob("*/*_train.jsonl") if re.fullmatch(r".+_\d+_\d+_train\.jsonl", path.name))
    if not shown:
        raise BadData(f"{folder}: no demonstrations in it; expected TASK/TASK_K_SEED_train.jsonl and TASK/TASK_K_SEED_test.jsonl")
    documents = []
    for path in shown:
        task, test = path.parent.name, path.with_name(path.name.replace("_train.jsonl", "_test.jsonl"))
        documents.append(Document(demonstrated(_examples_of(task, path)), tuple(_examples_of(task, test)), task))
    return documents


def _examples_of(task: str, path: Path) -> list[Question]:
    examples = []
    for where, record in _json_lines(path, read_text(path)):
        if (other := _need(where, record, "task", str)) != task:
            raise BadData(f"{where}: task {other!r} in the folder of {task!r}; keep the examples of each task in a folder of its name")
        examples.append(_example(where, record))
    return examples


def _example(where: str, record: dict) -> Question:
    output, options = _need(where, record, "output", str), record.get("options", [])
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        raise BadData(f"{where}: 'options' must be a list of strings that are not empty, found {options!r}")
    if options and output not in options:
        raise BadData(f"{where}: 'output' {output!r} is none of the 'options' {options}")
    return Question(_need(where, record, "input", str), (output,), tuple(options))


def read_examples(path: str | Path, fewest: int = 12) -> list[list[Question]]:
    """The examples of every task in a file, JSON lines {"task", "input", "output", "options"} of one task or of several, at least `fewest` of each."""
    by_task: dict[str, list[Question]] = {}
    for where, record in _json_lines(path, read_text(path)):
        by_task.setdefault(_need(where, record, "task", str), []).append(_example(where, record))
    for task, examples in by_task.items():
        if len(examples) < fewest:
            raise BadData(f"{path}: {len(examples)} examples of the task {task!r}, {fewest} are needed to show some and to ask others; give more")
    return [*by_task.values()]


def read_training(path: str | Path) -> tuple[str, list]:
    """What a file offers to train on: the name of the source that it belongs to, and its documents, tasks, dialogues or paragraphs."""
    if Path(path).suffix not in (".json", ".jsonl"):
        return "text", read_paragraphs(path)
    first_line = read_text(path).lstrip().partition("\n")[0]
    if re.search(r'(?<!\\)"task"\s*:', first_line):
        return "tasks", read_examples(path)
    if re.search(r'(?<!\\)"sessions"\s*:', first_line):
        return "dialogues", read_dialogues(path)
    return "prose", read_documents(path)


def read_paragraphs(path: str | Path, shortest: int = 200) -> list[str]:
    """Raw text as paragraphs of at least `shortest` characters; WikiText's spaced punctuation and headings are undone."""
    text = read_text(path)
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "it")):
        text = text.replace(spaced, plain)
    text = re.sub(r" ([.,;:!?)\]%]|'(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    found = []
    for part in re.split(r"\n\s*\n", text):  # one paragraph, broken into short lines, or several of one line each
        lines = part.splitlines()
        lines = lines if any(len(line) >= shortest for line in lines) else [part]
        found += [line for line in (" ".join(line.split()) for line in lines) if len(line) >= shortest and not line.startswith("=")]
    if not found:
        raise BadData(f"{path}: no paragraph of at least {shortest} characters; give a longer text")
    return found


def package_text(shortest: int = 200) -> list[str]:
    """Raw text that comes with Python: the paragraphs of its manual (pydoc's topics) that are prose, not code or grammar."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", "\n\n".join(pydoc_topics.values()))]
    return [part for part in parts if len(part) >= shortest and re.match(r"[A-Z][a-z]* [a-z]", part) and ">>>" not in part]


# --------------------------------------------------------------------------------------------------- metrics


def normalised(answer: str) -> list[str]:
    """SQuAD's view of an answer: lower case, no punctuation, no articles, as words."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD F1 in percent: the bag-of-words overlap with the best of the accepted answers."""
    return 100 * max(_overlap(normalised(prediction), normalised(answer)) for answer in answers)


def _overlap(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """100 where the normalised prediction is one of the accepted answers, else 0."""
    return 100.0 * any(normalised(prediction) == normalised(answer) for answer in answers)


def answer_recall(prediction: str, answers: Sequence[str]) -> float:
    """100 where an accepted answer stands, whole, somewhere in the prediction, else 0: fair to an LM that talks around it."""
    said = f" {' '.join(normalised(prediction))} "
    return 100.0 * any(f" {' '.join(normalised(answer))} " in said for answer in answers)
