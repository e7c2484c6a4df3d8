"""The command line on a tiny LM: bad input ends in one line, exit code 2 and nothing written; good runs write what they promise."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from minigen import bench, evaluation, training
from minigen.__main__ import main
from minigen.evaluation import CONTROLS, METHODS, WORDINGS, Reader, evaluate_objectives, likeliest
from minigen.formats import WEIGHTS, load_generator, save_generator
from minigen.generator import GeneratorConfig
from minigen.models import answer, last_tokens, load_lm
from minigen.tasks import DATA, exact_match, f1, read_documents, read_text
from minigen.training import RECIPES, Recipe, question_prompt

ROOT = Path(__file__).parent.parent
TEXT = "Ann Lee is a vet in Brackwell. She has nine cats, and a boat called Otter. " * 2


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch):
    config = GeneratorConfig(targets=("mlp.down_proj",), p=16, q=16, rank=8, alpha=16.0)
    monkeypatch.setitem(RECIPES, "tiny", Recipe(config, {"world": 1.0}, {"answers": 1.0}, contexts=2, facts=(1, 2), start_from=8))


@pytest.fixture
def here(tmp_path, lm_folder, tiny_lm, generator_for, monkeypatch):
    """A folder to work in, with good and bad files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lm_folder, "lm")
    shutil.copytree(lm_folder, "cut")
    Path("cut", "model.safetensors").write_bytes(Path("cut", "model.safetensors").read_bytes()[:999])
    lm, _ = load_lm("lm")
    save_generator("generator", generator_for(lm, chunk=64), lm, "lm", {})
    save_generator("foreign", generator_for(tiny_lm("llama")), tiny_lm("llama"), "another", {})
    shutil.copytree("generator", "truncated")
    Path("truncated", WEIGHTS).write_bytes(Path("generator", WEIGHTS).read_bytes()[:999])
    Path("folder").mkdir()
    Path("official").mkdir()
    method = {"peft_type": "FASTLORA", "fastlora_arch": "aassbb", "fastlora_merge": "pre-norm-sum", "fastlora_gist_len": 0, "lora_r": 0}
    Path("official", "adapter_config.json").write_text(json.dumps(method | {"base_model_name_or_path": "../base"}))
    Path("text.txt").write_text(TEXT)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    records = [json.dumps({"context": d.text, "qas": [{"question": q.text, "answers": q.answers} for q in d.questions[:2]]}) for d in dev_documents()]
    Path("dev.jsonl").write_text("\n".join(records))
    talk = [[{"speaker": "A", "text": "I keep bees."}, {"speaker": "B", "text": "How many?"}], [{"speaker": "A", "text": "Nine hives."}]]
    said = [{"sessions": talk, "question": q, "answers": [a]} for q, a in (("What does A keep?", "bees"), ("How many hives?", "nine"))]
    Path("talk.jsonl").write_text("\n".join(map(json.dumps, said)))
    for task, options in (("colour", ["red", "blue"]), ("capital", [])):
        Path("tasks", task).mkdir(parents=True)
        for part, inputs in (("train", "ab"), ("test", "cde")):
            lines = [{"task": task, "input": f"What of {x}?", "output": "red", "options": options} for x in inputs]
            Path("tasks", task, f"{task}_2_13_{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("broken.jsonl").write_text(records[0] + '\n{"context": ')
    return tmp_path


def dev_documents():
    return read_documents(DATA / "documents" / "dev.jsonl")[:3]


@pytest.fixture
def minigen(here, monkeypatch, capsys):
    """A function: a command line -> its exit code, stdout (spaces and line breaks alike) and stderr."""

    def run(command: str | list[str]):
        monkeypatch.setattr(sys, "argv", ["minigen", *(command.split() if isinstance(command, str) else command)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, " ".join(shown.out.split()), shown.err

    return run


# ------------------------------------------------------------------------------------------------- bad input

ASK = "ask --lm lm --generator generator --json out/r.json"
TRAIN = "train tiny --lm lm --out out"
EVALUATE = "--lm lm --generator generator --json out/r.json"
BAD = [
    (f"{ASK} --context nowhere.txt --question Who?", "nowhere.txt: no such file; check the path"),
    (f"{ASK} --context empty.txt --question Who?", "empty.txt: the file is empty; give a text"),
    (f"{ASK} --context latin.txt --question Who?", "latin.txt: not UTF-8 .byte 3.; save it as UTF-8"),
    (f"{ASK} --context folder --question Who?", "folder is a folder; name a text file"),
    (f"{ASK} --context text.txt", "required: --question"),
    ([*ASK.split(), "--context", "text.txt", "--question", "Who?", "--question", " "], "an empty question"),
    (f"{ASK} --question Who?", "required: --context"),
    ([*ASK.split(), "--context", "text.txt", "--question", "why " * 5000], "the question has .* tokens, but at most .* fit"),
    ("ask --lm cut --generator generator --json out/r.json --context text.txt --question Who?", "LM 'cut' asked.*check the name"),
    ("ask --lm no/such-lm --generator generator --json out/r.json --context text.txt --question Who?", "LM 'no/such-lm' asked.*check the name"),
    ("ask --lm folder --generator generator --json out/r.json --context text.txt --question Who?", "LM 'folder' asked.*check the name"),
    ("ask --lm lm --generator foreign --json out/r.json --context text.txt --question Who?", "foreign: made for another .*use --lm another"),
    ("ask --lm lm --generator truncated --json out/r.json --context text.txt --question Who?", "truncated/.*truncated or not safetensors"),
    ("ask --lm lm --generator nowhere --json out/r.json --context text.txt --question Who?", "nowhere: generator.json is missing"),
    ("ask --lm lm --generator text.txt --json out/r.json --context text.txt --question Who?", "text.txt"),
    ("train nothing --lm lm --out out --steps 2", "'nothing'.*choose from.*facts"),
    (TRAIN, "--minutes --steps is required"),
    (f"{TRAIN} --minutes 1 --steps 2", "--steps: not allowed with argument --minutes"),
    (f"{TRAIN} --steps many", "--steps: invalid int value: 'many'"),
    (f"{TRAIN} --steps 2 --resume", "out/checkpoint does not exist; leave --resume out"),
    ("train tiny --lm no/such-lm --out out --steps 2", "LM 'no/such-lm' asked"),
    (f"{TRAIN} --steps 2 --generator generator", "--generator generator asked, but recipe 'tiny' trains other layers or sizes"),
    (f"{TRAIN} --steps 2 --data nowhere.txt", "nowhere.txt: no such file"),
    (f"{TRAIN} --steps 2 --data talk.jsonl", "talk.jsonl holds dialogues, but the recipe draws .* only"),
    ("train tiny --lm lm --steps 2", "required: --out"),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --methods adapter,magic", "method 'magic' asked.*closed-book"),
    (f"evaluate documents {EVALUATE} --data broken.jsonl", "broken.jsonl, line 2: not JSON"),
    (f"evaluate documents {EVALUATE} --data nowhere.jsonl", "nowhere.jsonl: no such file"),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --limit few", "--limit: invalid int value: 'few'"),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --tokens 5000", "contexts of 5000 tokens asked, but all the documents have"),
    (f"evaluate objectives {EVALUATE} --data dev.jsonl --questions 2", "--questions asked of the suite 'objectives'"),
    (f"evaluate dialogues {EVALUATE} --data talk.jsonl --tokens 50", "--tokens 50 asked of the suite 'dialogues'"),
    (f"evaluate objectives {EVALUATE} --data empty.txt", "empty.txt: the file is empty"),
    (f"evaluate poems {EVALUATE} --data dev.jsonl", "'poems'.*documents"),
    (f"evaluate demonstrations {EVALUATE} --data folder", "folder: no demonstrations in it; expected TASK/TASK_K_SEED_train.jsonl"),
    (f"evaluate dialogues {EVALUATE} --data dev.jsonl", "dev.jsonl, line 1: it needs a list 'sessions'"),
    ("export --lm lm --generator generator --out out --context latin.txt", "latin.txt: not UTF-8"),
    ("export --lm lm --generator foreign --out out --context text.txt", "foreign: made for another"),
    ("train toy-lm --out out --minutes 1", "toy-lm.*--steps"),
    ("train toy-lm --out out --steps 5 --resume", "out/lm_log.csv does not exist"),
    ("train toy-gist-4 --lm toy --out out --minutes 1", "toy-gist-4 is trained for a number of steps"),
    ("train toy-gist-4 --lm toy --out out --steps 2 --resume", "without --resume"),
    ("train toy-gist-4 --lm toy --out out --steps 2 --data text.txt", "leave --generator and --data out"),
    ("train toy-gist-4 --lm toy --out tasks --steps 2", "holds other files; name a new folder.*tasks"),
    ("train toy-lm --out tasks --steps 2", "holds other files; name a new folder.*tasks"),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --methods gist", '"gist" asked without --gist DIR'),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --methods gist --gist folder", "folder: no gist found there"),
    ("bench --lm lm --norms --training toy", "not allowed with"),
    ("bench --lm lm --generator generator --training toy", "times a recipe's own generator; leave one"),
    ("evaluate objectives --lm lm --generator generator --data text.txt --methods adapter", "puts no questions; leave it out"),
    ("import-official folder --out out", "folder: adapter_config.json is missing"),
    ("import-official nowhere --out out", "nowhere: adapter_config.json is missing"),
    ("import-official official --out out --lm lm", "made for ../base, but --lm lm was given"),
    ("import-official official --out out", "LM '../base' asked"),
    ("bench --lm lm --generator foreign --json out/r.json", "foreign: made for another"),
    ("", r"required: ask \| train \| evaluate"),
    ("dance", "dance"),
    ("train facts --lm lm --out out --steps 2", "targets .*blocks"),
    (f"{TRAIN} --steps 0", "steps"),
    (f"{TRAIN} --minutes 0", "minutes"),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --limit 0", "limit"),
    (f"evaluate documents {EVALUATE} --data dev.jsonl --limit -1", "limit"),
    (f"evaluate objectives {EVALUATE} --data short.txt", "short.txt"),
    (f"{TRAIN} --steps -1", "steps"),
    (f"{TRAIN} --minutes -1", "minutes"),
]


@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input_ends_in_one_line(command, message, minigen, here):
    Path("short.txt").write_text("Too short to be a paragraph.")
    before = sorted(here.rglob("*"))
    code, _, complaint = minigen(command)
    assert code == 2
    assert re.fullmatch(f"minigen: .*{message}.*\n", complaint), complaint  # . is no line break
    assert sorted(here.rglob("*")) == before


def test_a_full_disk_ends_in_one_line(minigen, here):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code, _, complaint = minigen("export --lm lm --generator generator --out out --context text.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and complaint.count("\n") == 1
    assert not list(here.glob("*out*"))


def test_as_a_process_of_its_own(here):
    """What the terminal sees: the real entry point, its exit code and its two streams."""

    def run(*arguments: str):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run([sys.executable, "-m", "minigen", *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})

    bad = run(*f"{ASK} --context nowhere.txt --question Who?".split())
    assert (bad.returncode, bad.stdout) == (2, "")
    assert re.fullmatch("minigen: nowhere.txt: no such file.*\n", bad.stderr)
    good = run(*f"{ASK} --context text.txt --question Who?".split())
    assert (good.returncode, good.stderr) == (0, "")
    assert all(name in good.stdout for name in METHODS) and Path("out/r.json").exists()


# ------------------------------------------------------------------------------------------------- good runs


def result(path: str = "out/r.json") -> dict:
    return json.loads(Path(path).read_text("utf-8"))


def test_ask_gives_three_answers_a_question(minigen):
    questions = ["Who is a vet?", "How many cats?"]
    code, shown, complaint = minigen([*ASK.split(), "--context", "text.txt", "--question", questions[0], "--question", questions[1]])
    assert (code, complaint) == (0, "")
    found = result()
    lm, tokenizer = load_lm("lm")
    assert found["questions"] == questions
    assert found["context_tokens"] == len(tokenizer(TEXT).input_ids)
    assert found["seconds"].keys() == METHODS.keys() | {"read and write"}
    bare = [question_prompt(question) for question in questions]
    with Reader(lm, tokenizer, load_generator("generator")).adapter(TEXT).applied_to(lm):
        adapted = answer(lm, tokenizer, bare)
    prompted = answer(lm, tokenizer, [WORDINGS["plain"](tokenizer, TEXT, question) for question in questions])
    assert found["answers"] == {"closed-book": answer(lm, tokenizer, bare), "prompting": prompted, "adapter": adapted}
    assert len(set(map(tuple, found["answers"].values()))) == 3
    assert all(name in shown for name in METHODS)


def test_an_answer_is_over_at_a_line_break_or_the_end_of_the_text(here):
    lm, tokenizer = load_lm("lm")
    over = last_tokens(tokenizer)
    assert tokenizer.eos_token_id in over and tokenizer("\n").input_ids[0] in over
    assert all("\n" in tokenizer.decode([n]) for n in over if n != tokenizer.eos_token_id) and len(over) < 20
    assert all("\n" not in said for said in answer(lm, tokenizer, ["Who?", "What is a vet?"]))


def test_prompting_is_plain_for_an_lm_that_cannot_chat(here, monkeypatch):
    lm, tokenizer = load_lm("lm")
    seen = []
    monkeypatch.setattr(evaluation, "answer", lambda lm, tokenizer, prompts, *rest: seen.extend(prompts) or [])
    for template in (None, "{% for m in messages %}[{{ m.content }}]{% endfor %}"):
        tokenizer.chat_template = template
        METHODS["prompting"](Reader(lm, tokenizer, None), TEXT, ["Who?"])
    assert seen == [f"{TEXT}\n\n{question_prompt('Who?')}", f"[{TEXT}\n\nWho?]The answer is:"]


def test_ask_shows_brackets_as_they_are(minigen):
    code, shown, _ = minigen([*ASK.split(), "--context", "text.txt", "--question", "[/b] [red]?"])
    assert code == 0 and "[/b] [red]?" in shown


def test_a_long_context_is_read_in_chunks_and_says_so(minigen):
    Path("long.txt").write_text(TEXT * 12)
    code, shown, complaint = minigen(f"{ASK} --context long.txt --question Who?")
    tokens = result()["context_tokens"]
    assert (code, complaint) == (0, "") and tokens > 256
    assert f"{tokens} tokens; longer than one pass of 64 tokens, so read in {-(-tokens // 64)} chunks" in shown
    assert "longer than the LM's window of 256 tokens, so prompting sees only its end" in shown
    minigen(f"{ASK} --context text.txt --question Who?")
    assert "window" not in minigen(f"{ASK} --context text.txt --question Who?")[1]


def test_evaluate_documents(minigen):
    command = f"evaluate documents {EVALUATE} --data dev.jsonl"
    assert minigen(command)[::2] == (0, "")
    first = result()
    assert minigen(command)[0] == 0
    assert first["examples"] == result()["examples"]

    assert first.keys() >= {"suite", "lm", "n", "command", "methods", "controls", "examples"}
    assert (first["suite"], first["lm"], first["n"]) == ("documents", "lm", 6) and first["command"].endswith(command)
    assert first["methods"].keys() == METHODS.keys() and first["controls"].keys() == CONTROLS.keys()
    questions = [q for d in dev_documents() for q in d.questions[:2]]
    for name, scores in first["methods"].items():
        assert scores.keys() >= {"f1", "em", "ci95", "seconds", "tflops", "storage_floats"}
        examples = [example for example in first["examples"] if example["method"] == name]
        assert [(e["question"], tuple(e["answers"])) for e in examples] == [(q.text, q.answers) for q in questions]
        assert scores["f1"] == pytest.approx(sum(f1(e["prediction"], e["answers"]) for e in examples) / 6, abs=0.051)
        assert scores["em"] == pytest.approx(sum(exact_match(e["prediction"], e["answers"]) for e in examples) / 6, abs=0.051)
        assert scores["ci95"][0] <= scores["f1"] <= scores["ci95"][1]
    costs = [(scores["tflops"], scores["storage_floats"]) for scores in first["methods"].values()]
    assert costs[0][0] == costs[2][0] <= costs[1][0] and costs[0][1] == 0 < costs[1][1]
    assert costs[2][1] == 2 * 4 * (32 + 32)  # two layers of rank 4


def test_evaluate_some_methods_on_a_sample(minigen):
    assert minigen(f"evaluate documents {EVALUATE} --data dev.jsonl --methods closed-book --limit 2")[0] == 0
    found = result()
    assert (found["n"], list(found["methods"]), found["controls"]) == (4, ["closed-book"], {})


def test_a_single_document_has_no_other_to_be_its_wrong_context(minigen):
    assert minigen(f"evaluate documents {EVALUATE} --data dev.jsonl --methods adapter --limit 1")[0] == 0
    assert result()["controls"].keys() == {"empty", "shuffled"}


def test_evaluate_some_questions_of_each(minigen):
    assert minigen(f"evaluate documents {EVALUATE} --data dev.jsonl --methods closed-book --questions 1")[0] == 0
    assert [example["document"] for example in result()["examples"]] == [0, 1, 2]


def test_evaluate_joined_documents_and_say_what_made_the_result(minigen):
    assert minigen(f"evaluate documents {EVALUATE} --data dev.jsonl --methods closed-book --tokens 1000 --json joined.json")[0] == 0
    found = result("joined.json")
    assert found["n"] == 6 and found["command"].endswith("--tokens 1000 --json joined.json")
    assert len({example["document"] for example in found["examples"]}) < 3
    assert re.fullmatch(r"[0-9a-f]{7,}(, changed)?|unknown", found["commit"]) and "torch" in found["machine"]


def test_evaluate_dialogues(minigen):
    assert minigen(f"evaluate dialogues {EVALUATE} --data talk.jsonl")[::2] == (0, "")
    found = result()
    assert (found["suite"], found["n"]) == ("dialogues", 2) and found["methods"].keys() == METHODS.keys()
    assert found["methods"]["adapter"].keys() >= {"f1", "em", "ci95", "seconds", "tflops", "storage_floats"}


def test_evaluate_demonstrations(minigen):
    assert minigen(f"evaluate demonstrations {EVALUATE} --data tasks")[::2] == (0, "")
    found = result()
    assert (found["suite"], found["n"]) == ("demonstrations", 6) and found["controls"].keys() == CONTROLS.keys()
    for name, scores in found["methods"].items():
        assert scores.keys() >= {"accuracy", "em", "ci95", "seconds", "tflops", "storage_floats"}
        examples = [example for example in found["examples"] if example["method"] == name]
        chosen = [example["prediction"] for example in examples if example["document"] == 1]  # "colour" comes second
        assert len(examples) == 6 and {*chosen} <= {"red", "blue"}
        right = [example["prediction"].lower() == "red" for example in examples]
        assert scores["accuracy"] == pytest.approx(100 * sum(right) / 6, abs=0.051)


def test_the_likeliest_option_is_the_one_with_the_lowest_loss(here, generator_for):
    lm, tokenizer = load_lm("lm")
    reader = Reader(lm, tokenizer, generator_for(lm))
    prompt, options = question_prompt("What of a?"), ["red", "blue and grey", "a pale green"]

    def mean_log_probability(option: str) -> float:
        start, said = tokenizer(prompt).input_ids, tokenizer(f" {option}\n").input_ids
        logits = lm(torch.tensor([start + said])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        return logits[range(len(said)), said].mean().item()

    chosen = METHODS["closed-book"](reader, "", ["What of a?", "Who?"], likeliest([options, []]))
    assert chosen == [max(options, key=mean_log_probability), *METHODS["closed-book"](reader, "", ["Who?"])]


def test_evaluate_objectives(minigen):
    Path("raw.txt").write_text("\n\n".join(" ".join(d.text.split()) for d in dev_documents()))
    status, printed, errors = minigen(f"evaluate objectives {EVALUATE} --data raw.txt")
    assert (status, errors) == (0, "") and re.search("perplexity .* plain .* prompting .* adapter .* wrong adapter", printed)
    found = result()
    assert (found["suite"], found["n"]) == ("objectives", 3) and found["perplexity"].keys() == {"reconstruction", "completion"}
    assert [(each["objective"], each["paragraph"]) for each in found["examples"]] == [(o, n) for o in found["perplexity"] for n in range(3)]
    for values in found["perplexity"].values():
        assert values.keys() == {"plain", "prompting", "adapter", "wrong adapter"} and min(values.values()) > 1
        assert len({values[name] for name in ("plain", "adapter", "wrong adapter")}) == 3


@pytest.mark.parametrize("positions", [512, 40])
def test_prompting_perplexity_is_that_of_the_text_behind_what_was_read(lm_folder, generator_for, positions):
    lm, tokenizer = load_lm(str(lm_folder))
    lm.config.max_position_embeddings = positions
    texts = [" ".join(d.text.split()) for d in dev_documents()]
    found = evaluate_objectives(Reader(lm, tokenizer, generator_for(lm)), texts)
    for example in found["examples"]:
        ids = tokenizer(texts[example["paragraph"]]).input_ids[:positions]
        seen, said = (ids, ids) if example["objective"] == "reconstruction" else (ids[: len(ids) // 2], ids[len(ids) // 2 :])
        row = torch.tensor([[*seen, *said][-positions:]])
        losses = torch.nn.functional.cross_entropy(lm(row).logits[0, -len(said) : -1], row[0, -len(said) + 1 :])
        assert example["prompting"] == pytest.approx(losses.item(), abs=2e-4)


def test_export_is_a_lora_folder(minigen):
    code, shown, complaint = minigen("export --lm lm --generator generator --out lora --context text.txt")
    assert (code, complaint) == (0, "") and "rank 4 for 2 layers" in shown
    lm, tokenizer = load_lm("lm")
    query = torch.tensor([tokenizer("Who is a vet?").input_ids])
    plain = lm(query).logits
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("lm"), "lora")
    assert (adapted(query).logits - plain).abs().max() > 1e-3


def test_bench_rows(minigen, monkeypatch):
    monkeypatch.setattr(bench, "STREAMS", (64, 640))
    assert minigen("bench --lm lm --generator generator --json out/r.json")[::2] == (0, "")
    rows = {row["name"]: row for row in result()["rows"]}
    assert rows.keys() == {
        "read / forward pass",
        "write / forward pass",
        "generation merged / plain",
        "generation hooked / plain",
        "state bytes chunk 32 / chunk 1",
        "peak memory of tensors, long / short stream",
        "peak memory of the process, long / short stream",
    }
    assert 0.9 < rows["peak memory of the process, long / short stream"]["ratio"] < 1.1
    assert all(row["ratio"] > 0 and row["sizes"] for row in rows.values()) and result()["machine"]
    assert rows["state bytes chunk 32 / chunk 1"]["ratio"] == 1


def test_train_then_ask(minigen, monkeypatch):
    monkeypatch.setattr(training, "read_documents", lambda path: dev_documents())
    assert minigen(f"{TRAIN} --steps 2")[0] == 0
    assert minigen(f"{TRAIN} --steps 4 --resume")[0] == 0
    assert json.loads(read_text("out/generator/generator.json"))["provenance"]["steps"] == 4
    assert minigen("ask --lm lm --generator out/generator --context text.txt --question Who?")[::2] == (0, "")


def test_a_run_is_not_resumed_as_another_size(minigen, monkeypatch):
    monkeypatch.setattr(training, "read_documents", lambda path: dev_documents())
    assert minigen(f"{TRAIN} --steps 2")[0] == 0
    weights = Path("out/generator", WEIGHTS).read_bytes()
    wider = replace(RECIPES["tiny"], config=replace(RECIPES["tiny"].config, q=20))
    monkeypatch.setitem(RECIPES, "tiny", wider)
    code, _, complaint = minigen(f"{TRAIN} --steps 4 --resume")
    assert code == 2 and "is of another generator" in complaint and complaint.count("\n") == complaint.endswith("\n")
    assert Path("out/generator", WEIGHTS).read_bytes() == weights


def test_a_run_is_not_resumed_by_another_recipe(minigen, monkeypatch):
    monkeypatch.setattr(training, "read_documents", lambda path: dev_documents())
    monkeypatch.setitem(RECIPES, "other", RECIPES["tiny"])
    assert minigen(f"{TRAIN} --steps 2")[0] == 0
    code, _, complaint = minigen("train other --lm lm --out out --steps 4 --resume")
    assert code == 2 and "out/checkpoint is of 'tiny'" in complaint and complaint.count("\n") == 1


def test_words_that_the_toy_does_not_know_are_counted(minigen):
    Path("toy.txt").write_text("Ada lives in Cairo. Ada flies zeppelins.")
    assert "2 of them are words that this LM does not know" in minigen(["ask", "--lm", "toy", "--context", "toy.txt", "--question", "Where does Ada live?"])[1]
    assert "does not know" not in minigen("ask --lm lm --generator generator --context text.txt --question Who?")[1]
