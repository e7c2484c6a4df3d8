"""The command line:  python -m minigen ask | train | evaluate | export | bench"""

import json
import platform
import sys
import time
from enum import StrEnum
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from . import formats, training
from .evaluation import METHODS, Reader, bench, evaluate_documents, evaluate_objectives
from .formats import BadGenerator, load_generator, save_peft
from .models import UnknownLM, load_lm, window
from .tasks import DATA, BadData, read_documents, read_paragraphs, read_text

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="A text becomes an adapter of a language model.")
out = Console()

LM = typer.Option("smollm2", help="smollm2, toy, a folder, or a hub id.")
GENERATOR = typer.Option(None, help="A generator's folder; by default the one shipped for the LM.")
JSON = typer.Option(None, "--json", help="Write the result here as JSON.")


class Suite(StrEnum):
    documents = "documents"
    objectives = "objectives"


def reader(lm_name: str, generator: Path | None) -> Reader:
    """The LM, its tokenizer and its generator, checked to fit each other."""
    with out.status(f"loading {lm_name}"):
        lm, tokenizer = load_lm(lm_name)
        return Reader(lm, tokenizer, load_generator(generator or DATA / lm_name, lm))


def write_json(path: Path | None, result: dict) -> None:
    if path:
        with formats.whole_file(path) as scratch:
            scratch.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def ask(
    context: Path = typer.Option(..., help="A UTF-8 text file."),
    question: list[str] = typer.Option(..., help="May be given several times."),
    lm: str = LM,
    generator: Path = GENERATOR,
    json_file: Path = JSON,
) -> None:
    """Answer questions about a text three ways side by side: closed-book, prompting, adapter."""
    text = read_text(context)
    if not all(q.strip() for q in question):
        raise BadData("an empty question was given; ask something: --question 'Who ...?'")
    it = reader(lm, generator)
    tokens = len(it.tokenizer(text).input_ids)
    chunk = it.generator.config.chunk
    notes = [f"{context}: {tokens} tokens"]
    if tokens > chunk:
        notes.append(f"longer than one pass of {chunk} tokens: read in {-(-tokens // chunk)} chunks")
    if tokens > window(it.lm):
        notes.append(f"longer than the LM's window of {window(it.lm)} tokens: prompting sees only its end")
    out.print("; ".join(notes))
    began = time.perf_counter()
    it.adapter(text)
    seconds = {"read and write": time.perf_counter() - began}
    answers = {}
    for name, method in METHODS.items():
        with out.status(name):
            began = time.perf_counter()
            answers[name] = method(it, text, question)
            seconds[name] = time.perf_counter() - began
    table = Table("question", *METHODS, show_lines=True)
    for row, q in enumerate(question):
        table.add_row(q, *(answers[name][row] for name in METHODS))
    table.add_row("[dim]seconds", *(f"[dim]{seconds[name]:.1f}" for name in METHODS))
    out.print(table)
    out.print(f"The adapter was read and written in {seconds['read and write']:.1f} s; its prompts hold the question alone.")
    write_json(json_file, {"context_tokens": tokens, "questions": question, "answers": answers, "seconds": {k: round(v, 3) for k, v in seconds.items()}})


@app.command()
def train(
    recipe: str = typer.Argument(help=f"One of {', '.join(training.RECIPES)}."),
    out_dir: Path = typer.Option(..., "--out", help="Where the checkpoint, the log and the generator go."),
    lm: str = LM,
    minutes: float = typer.Option(None, help="Train for so long."),
    steps: int = typer.Option(None, help="Train for so many steps."),
    data: list[str] = typer.Option([], help="Raw text to train on, for recipes that read it."),
    resume: bool = typer.Option(False, help="Go on from OUT/checkpoint."),
) -> None:
    """Train a generator."""
    if recipe not in training.RECIPES:
        raise BadData(f"recipe {recipe!r} asked, but only {sorted(training.RECIPES)} are known; choose one of these")
    if (minutes is None) == (steps is None):
        raise BadData("give either --minutes or --steps")
    if resume and not (out_dir / "checkpoint").is_dir():
        raise BadData(f"--resume asked, but {out_dir}/checkpoint does not exist; leave --resume out, or name the folder of an earlier run")
    out.print(training.train(recipe, out_dir, lm, minutes, steps, data, resume))


@app.command()
def evaluate(
    suite: Suite,
    data: Path = typer.Option(..., help="documents: SQuAD JSON or JSON lines; objectives: plain text."),
    lm: str = LM,
    generator: Path = GENERATOR,
    methods: str = typer.Option(",".join(METHODS), help="Comma-separated."),
    limit: int = typer.Option(None, help="Only a seeded sample of so many documents or paragraphs."),
    json_file: Path = JSON,
) -> None:
    """Score the methods on a file of documents with questions, or the perplexity of raw text."""
    unknown = [name for name in methods.split(",") if name not in METHODS]
    if unknown:
        raise BadData(f"method {unknown[0]!r} asked, but only {sorted(METHODS)} are known; choose from these")
    items = read_documents(data) if suite is Suite.documents else read_paragraphs(data)
    if limit is not None:
        items = training.random.Random(0).sample(items, min(limit, len(items)))
    it = reader(lm, generator)
    result = evaluate_documents(it, items, methods.split(",")) if suite is Suite.documents else evaluate_objectives(it, items)
    if suite is Suite.documents:
        table = Table("method", "F1", "95 %", "exact", "recall", "seconds", "TFLOPs", "floats kept")
        for name, r in result["methods"].items():
            low, high = r["ci95"]
            table.add_row(name, f"{r['f1']}", f"{low}-{high}", f"{r['em']}", f"{r['recall']}", f"{r['seconds']}", f"{r['tflops']}", f"{r['storage_floats']:,}")
        for name, r in result["controls"].items():
            table.add_row(f"[dim]adapter, {name} context", f"{r['f1']}", "", f"{r['em']}", f"{r['recall']}")
    else:
        table = Table("objective", "plain LM", "own adapter", "another's adapter", title="perplexity")
        for name, r in result["perplexity"].items():
            table.add_row(name, *(f"{value}" for value in r.values()))
    out.print(table)
    command = f"python -m minigen evaluate {suite} --data {data} --lm {lm}" + (f" --generator {generator}" if generator else "")
    command += f" --methods {methods}" + (f" --limit {limit}" if limit is not None else "")
    write_json(json_file, {"suite": suite.value, "lm": lm, "command": command, "machine": machine()} | result)


@app.command()
def export(
    context: Path = typer.Option(..., help="A UTF-8 text file."),
    out_dir: Path = typer.Option(..., "--out", help="The PEFT folder to write."),
    lm: str = LM,
    generator: Path = GENERATOR,
) -> None:
    """Write the adapter of a text as a PEFT LoRA folder."""
    text = read_text(context)
    it = reader(lm, generator)
    save_peft(it.adapter(text), out_dir, it.lm)
    out.print(f"{out_dir}: a LoRA of rank {min(it.generator.config.rank, it.generator.config.q)} for {len(it.generator.layers)} layers")


@app.command("bench")
def bench_command(lm: str = LM, generator: Path = GENERATOR, json_file: Path = JSON) -> None:
    """Speed, memory and cost, each as a ratio within the run."""
    rows = bench(reader(lm, generator))
    table = Table("ratio", "value", title=machine())
    for row in rows:
        table.add_row(row["name"], f"{row['ratio']}")
    out.print(table)
    write_json(json_file, {"machine": machine(), "rows": rows})


def machine() -> str:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{platform.machine()} {device}, torch {torch.__version__.split('+')[0]}"


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        app()
    except (BadData, UnknownLM, BadGenerator) as error:
        print(f"minigen: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"minigen: {error.strerror or error} ({error.filename or 'while writing'}); nothing was changed", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
