"""The command line:  python -m minigen ask | train | evaluate | export | import-official | bench"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from .bench import bench, bench_norms, bench_training
from .evaluation import BASELINES, METHODS, WORDINGS, Reader, check_room, evaluate_demonstrations, evaluate_documents, evaluate_objectives
from .formats import BadGenerator, import_official, load_generator, official_config, save_generator, save_peft, whole_file
from .gist import GISTS, train_gist
from .models import UnknownLM, load_lm, load_weights, window
from .tasks import DATA, BadData, joined, read_demonstrations, read_dialogues, read_documents, read_paragraphs, read_text
from .training import RECIPES, train, train_toy_lm

out = Console()


def reader(asked: argparse.Namespace) -> Reader:
    """The LM, its tokenizer and its generator, checked to fit each other."""
    with out.status(f"loading {asked.lm}"):
        lm, tokenizer = load_lm(asked.lm)
        return Reader(lm, tokenizer, load_generator(asked.generator or DATA / asked.lm, lm), asked.wording, asked.gist)


def write_json(path: Path | None, result: dict) -> None:
    if path:
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run_ask(asked: argparse.Namespace) -> None:
    """Answer questions about a text three ways side by side: closed-book, prompting, adapter."""
    text = read_text(asked.context)
    if not all(question.strip() for question in asked.question):
        raise BadData("an empty question was given; ask something: --question 'Who ...?'")
    it = reader(asked)
    for question in asked.question:
        check_room(it, question)
    ids = it.tokenizer(text).input_ids
    tokens = len(ids)
    chunk = it.generator.config.chunk
    notes = [f"{asked.context}: {tokens} tokens"]
    if tokens > chunk:
        notes.append(f"longer than one pass of {chunk} tokens, so read in {-(-tokens // chunk)} chunks")
    if tokens > window(it.lm):
        notes.append(f"longer than the LM's window of {window(it.lm)} tokens, so prompting sees only its end")
    if unknown := ids.count(it.tokenizer.unk_token_id):
        notes.append(f"{unknown} of them are words that this LM does not know")
    out.print(escape("; ".join(notes)))
    with out.status("reading"):
        began = time.perf_counter()
        it.adapter(text)
        seconds = {"read and write": time.perf_counter() - began}
    answers = {}
    for name, method in METHODS.items():
        with out.status(name):
            began = time.perf_counter()
            answers[name] = method(it, text, asked.question)
            seconds[name] = time.perf_counter() - began
    table = Table("question", *METHODS, show_lines=True)
    for row, question in enumerate(asked.question):
        table.add_row(escape(question), *(escape(answers[name][row]) for name in METHODS))
    table.add_row("[dim]seconds", *(f"[dim]{seconds[name]:.1f}" for name in METHODS))
    out.print(table)
    out.print(f"Reading the text and writing its adapter alone takes {seconds['read and write']:.1f} s, once for all questions.")
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    write_json(asked.json, {"context_tokens": tokens, "questions": asked.question, "answers": answers, "seconds": rounded})


def run_train(asked: argparse.Namespace) -> None:
    """Train a generator, or (toy-lm) the toy language model itself."""
    if asked.recipe in ("toy-lm", *GISTS):
        if PartialState().num_processes > 1:
            raise BadData(f"{asked.recipe} is trained by one process; start it without accelerate launch")
        if asked.generator or asked.data:
            raise BadData(f"{asked.recipe} begins with no generator and chooses its own texts; leave --generator and --data out")
    if asked.recipe == "toy-lm":
        if not asked.steps:
            raise BadData("toy-lm is trained for a number of steps, so that everybody gets the same weights; say --steps 4000")
        if asked.resume and not (asked.out / "lm_log.csv").exists():
            raise BadData(f"--resume of toy-lm asked, but {asked.out}/lm_log.csv does not exist; leave --resume out, or name the folder of an earlier run")
        out.print(train_toy_lm(asked.out, asked.steps, asked.resume))
        return
    if asked.recipe in GISTS:
        if not asked.steps or asked.resume:
            raise BadData(f"{asked.recipe} is trained for a number of steps at once; say --steps 1100, without --resume")
        out.print(train_gist(asked.recipe, asked.out, asked.lm, asked.steps))
        return
    if asked.resume and not (asked.out / "checkpoint").is_dir():
        raise BadData(f"--resume asked, but {asked.out}/checkpoint does not exist; leave --resume out, or name the folder of an earlier run")
    out.print(train(asked.recipe, asked.out, asked.lm, asked.minutes, asked.steps, asked.data, asked.resume, asked.generator))


SUITES = {"documents": read_documents, "demonstrations": read_demonstrations, "dialogues": read_dialogues}


def run_evaluate(asked: argparse.Namespace) -> None:
    """Score the methods on documents or dialogues with questions or on tasks shown by examples, or the perplexity of raw text."""
    methods = [*METHODS] if asked.methods is None else asked.methods.split(",")
    unknown = [name for name in methods if name not in METHODS | BASELINES]
    if unknown:
        raise BadData(f"method {unknown[0]!r} asked, but only {sorted(METHODS | BASELINES)} are known; choose from these")
    if asked.tokens is not None and asked.suite != "documents":
        raise BadData(f"--tokens {asked.tokens} asked of the suite {asked.suite!r}, but only documents are joined; leave it out")
    of_questions = {"--methods": asked.methods, "--questions": asked.questions, "--wording": asked.wording, "--gist": asked.gist}
    if asked.suite not in SUITES and any(of_questions.values()):
        option = next(name for name, given in of_questions.items() if given)
        raise BadData(f"{option} asked of the suite {asked.suite!r}, which puts no questions; leave it out")
    if asked.suite in SUITES:
        items = SUITES[asked.suite](asked.data)
    elif asked.data.suffix in (".json", ".jsonl"):
        items = [document.text for document in read_documents(asked.data)]
    else:
        items = read_paragraphs(asked.data)
    it = reader(asked)
    if asked.tokens is not None:
        items = joined(items, asked.tokens, lambda text: len(it.tokenizer(text).input_ids))
    if asked.limit is not None:
        items = random.Random(0).sample(items, min(asked.limit, len(items)))
    if asked.questions is not None:
        items = [replace(item, questions=tuple(random.Random(0).sample(item.questions, min(asked.questions, len(item.questions))))) for item in items]
    if asked.suite in SUITES:
        main = "accuracy" if asked.suite == "demonstrations" else "f1"
        result = (evaluate_demonstrations if asked.suite == "demonstrations" else evaluate_documents)(it, items, methods)
        table = Table("method", main, "95 %", "em", "recall", "seconds", "TFLOPs", "floats kept")
        for name, r in result["methods"].items():
            low, high = r["ci95"]
            scores = [f"{r[main]}", f"{low}-{high}", f"{r['em']}", f"{r.get('recall', '')}"]
            table.add_row(name, *scores, f"{r['seconds']}", f"{r['tflops']}", f"{r['storage_floats']:,}")
        for name, r in result["controls"].items():
            table.add_row(f"[dim]adapter, {name} context", f"{r[main]}", "", f"{r.get('em', '')}", f"{r.get('recall', '')}")
    else:
        result = evaluate_objectives(it, items)
        table = Table("perplexity", *result["perplexity"]["reconstruction"])
        for name, r in result["perplexity"].items():
            table.add_row(name, *(f"{value}" for value in r.values()))
    out.print(table)
    write_json(asked.json, {"suite": asked.suite, "lm": asked.lm} | made_by() | result)


def run_export(asked: argparse.Namespace) -> None:
    """Write the adapter of a text as a PEFT LoRA folder."""
    text = read_text(asked.context)
    it = reader(asked)
    adapter = it.adapter(text)
    save_peft(adapter, asked.out, it.lm)
    rank = next(iter(adapter.down.values())).shape[1]
    out.print(f"{asked.out}: a LoRA of rank {rank} for {len(adapter.down)} layers of {asked.lm}")


def run_import(asked: argparse.Namespace) -> None:
    """Turn one of the authors' checkpoints into a generator folder."""
    base = official_config(asked.folder)["base_model_name_or_path"]
    beside = asked.folder / base  # a base named by a relative path lies beside the checkpoint
    name = asked.lm or (str(beside.resolve()) if beside.is_dir() else base)
    if Path(name).name != Path(base).name:
        raise BadGenerator(f"{asked.folder}: made for {base}, but --lm {name} was given; leave --lm out, or name a copy of that LM")
    with out.status(f"loading {name}"):
        lm, _ = load_weights(name, torch.bfloat16)
        generator = import_official(asked.folder, lm)
    provenance = {"recipe": "import-official", "checkpoint": asked.folder.name, "base": base}
    save_generator(asked.out, generator, lm, name, provenance, next(generator.parameters()).dtype)
    out.print(f"{asked.out}: a generator for {len(generator.layers)} layers of {base}; read it with --lm {name} --generator {asked.out}")


def run_bench(asked: argparse.Namespace) -> None:
    """Speed, memory and cost, each as a ratio within the run."""
    if asked.norms:
        rows = bench_norms(reader(asked), "\n\n".join(d.text for d in read_documents(DATA / "documents" / "dev.jsonl")))
    elif asked.training:
        if asked.generator:
            raise BadData(f"--generator {asked.generator} asked, but --training times a recipe's own generator; leave one of the two out")
        rows = bench_training(asked.lm, RECIPES[asked.training])
    else:
        rows = bench(reader(asked))
    table = Table("ratio", "value", title=machine())
    for row in rows:
        table.add_row(row["name"], f"{row['ratio']}")
    out.print(table)
    write_json(asked.json, made_by() | {"rows": rows})


def made_by() -> dict[str, str]:
    """What a result is traced by: the command that ran, the commit of the code and whether the code was changed since, the machine."""
    command = " ".join(["python -m minigen", *sys.argv[1:]])
    git = ["git", "-C", DATA.parent]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "minigen"]).returncode
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return {"command": command, "commit": "unknown", "machine": machine()}
    return {"command": command, "commit": commit + ", changed" * bool(changed), "machine": machine()}


def machine() -> str:
    """What the numbers were measured on: the CPU, for only `train` looks for another device."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line."""

    def error(self, message: str) -> None:
        print(f"minigen: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def above_zero(kind: type) -> Callable[[str], float]:
    """An argparse type: a finite number of this kind above zero."""

    def parse(text: str) -> float:
        if not 0 < (value := kind(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} asked; choose a number above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def parser() -> Parser:
    """The whole command line, one sub-command a verb."""
    everything = Parser(prog="python -m minigen", description="A text becomes an adapter of a language model.")
    verbs = everything.add_subparsers(required=True, metavar="ask | train | evaluate | export | import-official | bench")

    def verb(name: str, run) -> Parser:
        sub = verbs.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run, wording=Reader.wording, gist=Reader.gist)
        sub.add_argument("--lm", default="smollm2", help="smollm2, toy, a folder, or a hub id")
        own = "the start by regression" if run is run_train else "the one shipped for the LM"
        sub.add_argument("--generator", type=Path, help=f"a generator's folder; by default {own}")
        return sub

    sub = verb("ask", run_ask)
    sub.add_argument("--context", type=Path, required=True, help="a UTF-8 text file")
    sub.add_argument("--question", action="append", required=True, help="may be given several times")
    sub.add_argument("--json", type=Path, help="write the result here as well")

    sub = verb("train", run_train)
    sub.add_argument("recipe", choices=[*RECIPES, *GISTS, "toy-lm"])
    sub.add_argument("--out", type=Path, required=True, help="where checkpoint, log and generator go")
    budget = sub.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=above_zero(float), help="train for so long")
    budget.add_argument("--steps", type=above_zero(int), help="train for so many steps")
    sub.add_argument("--data", action="append", default=[], help="documents, dialogues, tasks or raw text, a file each; may be given several times")
    sub.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint; toy-lm: train the LM in OUT for so many steps more")

    sub = verb("evaluate", run_evaluate)
    sub.add_argument("suite", choices=[*SUITES, "objectives"])
    sub.add_argument("--data", type=Path, required=True, help="SQuAD JSON or JSON lines; a MetaICL folder; for objectives also plain text")
    sub.add_argument("--methods", help=f"comma-separated, by default {','.join(METHODS)}; besides these: {', '.join(BASELINES)}")
    sub.add_argument("--wording", choices=WORDINGS, default=Reader.wording, help="how prompting puts the text and the question")
    sub.add_argument("--gist", type=Path, help="a folder of trained gist tokens, for the method gist")
    sub.add_argument("--tokens", type=above_zero(int), help="join neighbouring documents to contexts of about so many tokens")
    sub.add_argument("--limit", type=above_zero(int), help="only a seeded sample of so many contexts or paragraphs")
    sub.add_argument("--questions", type=above_zero(int), help="only a seeded sample of so many questions of each context")
    sub.add_argument("--json", type=Path, help="write the result here as well")

    sub = verb("export", run_export)
    sub.add_argument("--context", type=Path, required=True, help="a UTF-8 text file")
    sub.add_argument("--out", type=Path, required=True, help="the folder to write")

    sub = verbs.add_parser("import-official", help=run_import.__doc__, description=run_import.__doc__)
    sub.set_defaults(run=run_import)
    sub.add_argument("folder", type=Path, metavar="DIR", help="the checkpoint: adapter_config.json and adapter_model.safetensors")
    sub.add_argument("--out", type=Path, required=True, help="the generator's folder")
    sub.add_argument("--lm", help="where its base LM is; by default where the checkpoint says")

    sub = verb("bench", run_bench)
    instead = sub.add_mutually_exclusive_group()
    instead.add_argument("--training", choices=RECIPES, metavar="RECIPE", help="instead, contexts a minute, and what each way to save work brings")
    instead.add_argument("--norms", action="store_true", help="instead, what the ways to normalise a state cost, and how exact they are")
    sub.add_argument("--json", type=Path, help="write the result here as well")
    return everything


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2."""
    asked = parser().parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        asked.run(asked)
    except (BadData, UnknownLM, BadGenerator) as error:
        print(f"minigen: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"minigen: {error.strerror or error} ({error.filename or 'while writing'}); nothing was changed", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
