"""Methods (closed-book, prompting, adapter, fine-tuning) x suites (documents, demonstrations, dialogues, objectives), with what each costs; memory by arithmetic."""

import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .generator import NORMS, Adapter, AdapterGenerator, ContextState, GeneratorConfig
from .gist import GISTS, count_tokens, load_gist
from .models import answer, read_beginning, window
from .tasks import BadData, Document, Question, answer_recall, exact_match, f1, question_prompt
from .training import Target, blocks_computed_twice, continued, target_losses

NEW_TOKENS = 20
BATCH, HELD = 32, 2**15  # prompts answered side by side, and tokens of them together
TUNED_RANK, TUNED_RATE, TUNED_STEPS = 16, 1e-3, 20  # of the fine-tuned baselines
PASSAGES = 3  # that retrieval puts into the prompt


@dataclass(frozen=True)
class Reader:
    """An LM, its tokenizer, the generator that was trained for it, and how prompting words a question.

    wording: a name in WORDINGS; None for "led chat", the one that did best on data/documents/dev.jsonl, or "plain" for an LM that cannot chat.
    gist: the folder of trained gist tokens, for the method of that name.
    """

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generator: AdapterGenerator
    wording: str | None = None
    gist: Path | None = None

    def read(self, text: str) -> ContextState:
        """The state of a text, as it stands, without a template around it."""
        return self.generator.read(self.lm, self.tokenizer(text, return_tensors="pt").input_ids.to(self.lm.device))

    @torch.no_grad()
    def adapter(self, text: str) -> Adapter:
        """The adapter of a text."""
        return self.generator.write(self.read(text))


# ------------------------------------------------------------------------------------------------- methods


Decode = Callable[[Reader, Sequence[str]], list[str]]


def greedy(reader: Reader, prompts: Sequence[str]) -> list[str]:
    """What the LM says to every prompt, a batch at a time; what all begin with is read once."""
    rows = [reader.tokenizer(prompt).input_ids for prompt in prompts]
    begun = read_beginning(reader.lm, rows)
    size = max(1, min(BATCH, HELD // max(map(len, rows))))
    batches = (prompts[first : first + size] for first in range(0, len(prompts), size))
    return [said for batch in batches for said in answer(reader.lm, reader.tokenizer, batch, NEW_TOKENS, begun)]


def likeliest(options: Sequence[Sequence[str]]) -> Decode:
    """For every prompt the one of its options that has the lowest loss a token (as MetaICL scores a choice); greedy where it has none."""

    @torch.no_grad()
    def choose(reader: Reader, prompts: Sequence[str]) -> list[str]:
        asked = [[continued(reader.tokenizer, prompt, f" {option}\n") for option in given] for prompt, given in zip(prompts, options, strict=True)]
        begun = read_beginning(reader.lm, [target.tokens[: target.start + 1] for targets in asked for target in targets])
        chosen = []
        for prompt, given, targets in zip(prompts, options, asked, strict=True):
            if given:
                losses, rows = target_losses(reader.lm, reader.tokenizer.pad_token_id, targets, begun)
                means = [losses[rows == row].mean().item() for row in range(len(given))]
                chosen.append(given[means.index(min(means))])
            else:
                chosen += greedy(reader, [prompt])
        return chosen

    return choose


def closed_book(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The plain LM without the text: what it knows, or guesses, anyway."""
    return decode(reader, [question_prompt(question) for question in questions])


def prompting(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The plain LM with the text in every prompt; of a text that its window does not hold, the end."""
    return _prompted(reader, [context] * len(questions), questions, decode)


def _prompted(reader: Reader, contexts: Sequence[str], questions: Sequence[str], decode: Decode) -> list[str]:
    wording = partial(WORDINGS[reader.wording or ("led chat" if reader.tokenizer.chat_template else "plain")], reader.tokenizer)
    around = max(len(reader.tokenizer(wording("", question)).input_ids) for question in questions)
    room = max(1, window(reader.lm) - NEW_TOKENS - around)
    tokens = {context: reader.tokenizer(context).input_ids for context in {*contexts}}
    seen = {text: text if len(ids) <= room else reader.tokenizer.decode(ids[-room:]) for text, ids in tokens.items()}
    return decode(reader, [wording(seen[context], question) for context, question in zip(contexts, questions, strict=True)])


def adapter(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The LM with the adapter of the text merged into its weights, and the question alone in its prompt."""
    update = reader.adapter(context)
    update.merge_into(reader.lm)
    try:
        return closed_book(reader, context, questions, decode)
    finally:
        update.restore(reader.lm)


def sequential_adapter(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """As the adapter, but every chunk of the text is read with the adapter of the chunks before it (encode="sequential")."""
    generator = copy(reader.generator)
    generator.config = replace(generator.config, encode="sequential")
    return adapter(replace(reader, generator=generator), context, questions, decode)


def retrieval(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The plain LM with the PASSAGES passages of the text in the prompt that BM25 finds nearest to the question, in the text's order."""
    import bm25s

    passages = _passages(context)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
    found, _ = index.retrieve(bm25s.tokenize(list(questions), show_progress=False), k=min(PASSAGES, len(passages)), show_progress=False)
    return _prompted(reader, ["\n\n".join(passages[n] for n in sorted(row)) for row in found], questions, decode)


def _passages(context: str) -> list[str]:
    """What retrieval chooses from: the parts between empty lines where there are enough to choose, else the sentences."""
    parts = re.split(r"\n\s*\n", context.strip())
    return parts if len(parts) > PASSAGES else re.split(r"(?<=[.!?])\s+|\n+", context.strip())


def continual_pretraining(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The LM with a LoRA that was trained on the text itself, token after token, and the question alone in its prompt (the paper's baseline)."""
    ids = reader.tokenizer(context).input_ids
    with tuned(reader, [Target(ids[first : first + window(reader.lm)], 1) for first in range(0, len(ids), window(reader.lm))]):
        return closed_book(reader, context, questions, decode)


def few_shot_tuning(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The LM with a LoRA that was trained to give the demonstrations' outputs for their inputs (the paper's baseline)."""
    shown = [block.rpartition("Answer:") for block in context.split("\n\n")]
    if not all(asked for asked, _, _ in shown):
        raise BadData('"few-shot tuning" asked of a text that shows no demonstrations; use it with the suite demonstrations')
    with tuned(reader, [continued(reader.tokenizer, f"{asked}Answer:", f"{said}\n") for asked, _, said in shown]):
        return closed_book(reader, context, questions, decode)


def gist(reader: Reader, context: str, questions: Sequence[str], decode: Decode = greedy) -> list[str]:
    """The LM with a trained LoRA and of the text only the keys and values of trained tokens behind it; with none of these, tuned prompting."""
    if reader.gist is None or decode is not greedy:
        raise BadData(f'"gist" asked {"to choose" if reader.gist else "without --gist DIR"}; train one ({", ".join(GISTS)}), for the suites documents and dialogues')
    trained = load_gist(reader.gist, reader.lm, reader.tokenizer)
    try:
        return trained.answer(context, questions, NEW_TOKENS)
    finally:
        trained.lm.unload()


@contextmanager
def tuned(reader: Reader, targets: list[Target]):
    """Within it the LM has a LoRA in the layers that the generator adapts, trained on these targets; afterwards it is as it was."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import, which no other method needs

    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=TUNED_RANK, lora_alpha=2 * TUNED_RANK, target_modules=[layer.name for layer in reader.generator.layers])
        peft = get_peft_model(reader.lm, lora)  # puts its layers into the LM itself
    try:
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=TUNED_RATE)
        for _ in range(TUNED_STEPS):
            target_losses(reader.lm, reader.tokenizer.pad_token_id, targets)[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield
    finally:
        peft.unload()


METHODS: dict[str, Callable[..., list[str]]] = {"closed-book": closed_book, "prompting": prompting, "adapter": adapter}
BASELINES: dict[str, Callable[..., list[str]]] = {
    "sequential adapter": sequential_adapter,
    "retrieval": retrieval,
    "continual pretraining": continual_pretraining,
    "few-shot tuning": few_shot_tuning,
    "gist": gist,
}


def plain_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> str:
    return f"{context}\n\n{question_prompt(question)}"


def instructed_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> str:
    return f"Answer the question with a few words from the text.\n\nText: {context}\n\n{question_prompt(question)}"


def chat_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> str:
    return _chat(tokenizer, f"{context}\n\n{question}")


def brief_chat_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> str:
    return _chat(tokenizer, f"{context}\n\n{question} Answer with a few words from the text.")


def led_chat_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> str:
    return _chat(tokenizer, f"{context}\n\n{question}") + "The answer is:"


def _chat(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    if tokenizer.chat_template is None:
        return f"{message}\n"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)
    return chat.removeprefix(tokenizer.decode(tokenizer("").input_ids))  # a mark that the tokenizer puts before every text would stand there twice


WORDINGS: dict[str, Callable[[PreTrainedTokenizerBase, str, str], str]] = {
    "plain": plain_prompt,
    "instructed": instructed_prompt,
    "chat": chat_prompt,
    "brief chat": brief_chat_prompt,
    "led chat": led_chat_prompt,
}


# ------------------------------------------------------------------------------------------------ controls


def empty_context(documents: Sequence[Document], n: int) -> str:
    return "\n"


def wrong_context(documents: Sequence[Document], n: int) -> str:
    following = (*documents[n + 1 :], *documents[:n])
    return next((d.text for d in following if not d.task or d.task != documents[n].task), documents[n].text)


def shuffled_context(documents: Sequence[Document], n: int) -> str:
    words = documents[n].text.split()
    random.Random(n).shuffle(words)
    return " ".join(words)


CONTROLS = {"empty": empty_context, "wrong": wrong_context, "shuffled": shuffled_context}


# -------------------------------------------------------------------------------------------------- suites


def evaluate_documents(reader: Reader, documents: Sequence[Document], methods: Sequence[str], controls: bool = True) -> dict:
    """Ask every question of every document by every method; scores in percent, seconds and TFLOPs a question.

    The controls ask the adapter method the same questions with an empty, another document's, and a word-shuffled context.
    """
    return _evaluate(reader, documents, methods, controls, partial(_ask, reader), score)


def evaluate_demonstrations(reader: Reader, tasks: Sequence[Document], methods: Sequence[str]) -> dict:
    """Put the test's inputs of every task by every method, where the context is its demonstrations; accuracy in percent, the mean over tasks.

    accuracy: of the option with the lowest loss; em: of the greedy answer, as the authors score. Prompting is few-shot prompting.
    """
    reader = replace(reader, wording=reader.wording or "plain")

    def choose(method: str, context: str, task: Document) -> list[str]:
        return _ask(reader, method, context, task, likeliest([q.options for q in task.questions]))

    result = _evaluate(reader, tasks, methods, True, choose, accuracy)
    authors = _evaluate(reader, tasks, methods, False, partial(_ask, reader), accuracy)
    for name, scores in result["methods"].items():
        scores["em"] = authors["methods"][name]["accuracy"]
    return result


def _ask(reader: Reader, method: str, context: str, document: Document, decode: Decode = greedy) -> list[str]:
    return (METHODS | BASELINES)[method](reader, context, [q.text for q in document.questions], decode)


def check_room(reader: Reader, question: str) -> None:
    """Refuse a question that would not leave room for a text and an answer."""
    count, room = len(reader.tokenizer(question_prompt(question), verbose=False).input_ids), window(reader.lm) // 2 - NEW_TOKENS
    if count > room:
        raise BadData(f"the question has {count:,} tokens, but at most {room:,} fit; ask with fewer words")


def _evaluate(reader: Reader, documents: Sequence[Document], methods: Sequence[str], controls: bool, ask: Callable, scored: Callable) -> dict:
    examples, results, control_scores = [], {}, {}
    for document in documents:
        for question in document.questions:
            check_room(reader, question.text)
    for name in methods:
        began = time.perf_counter()
        said = [ask(name, d.text, d) for d in tqdm(documents, desc=name, unit="document", disable=None)]
        seconds = time.perf_counter() - began
        results[name] = scored(documents, said) | {"seconds": round(seconds / max(1, sum(map(len, said))), 4)} | cost(reader, name, documents)
        for number, (document, predictions) in enumerate(zip(documents, said, strict=True)):
            examples += [
                {"document": number, "method": name, "question": q.text, "answers": list(q.answers), "prediction": p, "f1": round(f1(p, q.answers), 1)}
                for q, p in zip(document.questions, predictions, strict=True)
            ]
    if controls and "adapter" in methods:
        for name, context in CONTROLS.items():
            if len(documents) == 1 and context is wrong_context:
                continue
            shown = enumerate(tqdm(documents, desc=f"control: {name}", unit="document", disable=None))
            control_scores[name] = scored(documents, [ask("adapter", context(documents, n), d) for n, d in shown])
    return {"n": sum(len(d.questions) for d in documents), "methods": results, "controls": control_scores, "examples": examples}


def accuracy(tasks: Sequence[Document], predictions: Sequence[Sequence[str]]) -> dict:
    """The share of outputs that were met, but for case, as the mean over tasks in percent; its bootstrap 95 % interval draws tasks."""
    right: dict[str, list[float]] = {}
    for shown, said in zip(tasks, predictions, strict=True):
        right.setdefault(shown.task, []).extend(100.0 * (p.lower() == q.answers[0].lower()) for p, q in zip(said, shown.questions, strict=True))
    by_task = [statistics.fmean(hits) for hits in right.values()]
    return {"accuracy": round(statistics.fmean(by_task), 1), "ci95": _interval(by_task)}


def score(documents: Sequence[Document], predictions: Sequence[Sequence[str]]) -> dict:
    """F1 with its bootstrap 95 % interval, exact match and answer recall, in percent over all questions.

    Of several right answers the best counts; in "authors", F1 as the authors score it, only the shortest.
    """
    pairs: list[tuple[str, Question]] = [
        (p, q) for document, said in zip(documents, predictions, strict=True) for p, q in zip(said, document.questions, strict=True)
    ]
    f1s = [f1(p, q.answers) for p, q in pairs]
    return {
        "f1": round(statistics.fmean(f1s), 1),
        "em": round(statistics.fmean(exact_match(p, q.answers) for p, q in pairs), 1),
        "recall": round(statistics.fmean(answer_recall(p, q.answers) for p, q in pairs), 1),
        "authors": round(statistics.fmean(f1(p, [min(q.answers, key=len)]) for p, q in pairs), 1),
        "ci95": _interval(f1s),
    }


def _interval(values: Sequence[float]) -> list[float]:
    """The bootstrap 95 % interval of a mean."""
    rng = random.Random(0)
    resampled = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(1000))
    return [round(resampled[25], 1), round(resampled[974], 1)]


def cost(reader: Reader, method: str, documents: Sequence[Document]) -> dict:
    """TFLOPs to answer one question of the mean document once it was read, and the floats kept of it meanwhile (a token of the text counts as one)."""
    questions = [q.text for d in documents for q in d.questions]
    asked = statistics.fmean(len(reader.tokenizer(question_prompt(q)).input_ids) for q in questions) + NEW_TOKENS
    lengths = [len(reader.tokenizer(d.text).input_ids) for d in documents]
    context, seen = statistics.fmean(lengths), statistics.fmean(min(length, window(reader.lm)) for length in lengths)
    config, made = reader.lm.config, reader.generator.config
    rank = NORMS[made.norm](torch.eye(made.p, made.q), made.rank)[0].shape[-1]
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    kv = 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads)
    widths = sum(layer.i + layer.o for layer in reader.generator.layers)
    shown = {"prompting": seen, "retrieval": context * statistics.fmean(min(1.0, PASSAGES / len(_passages(d.text))) for d in documents)}
    tuned_floats = TUNED_RANK * widths
    kept = {"prompting": kv * seen, "retrieval": context, "continual pretraining": tuned_floats, "few-shot tuning": tuned_floats}
    if reader.gist:
        count = count_tokens(reader.gist)
        shown["gist"], kept["gist"] = (0.0, kv * count) if count else (seen, kv * seen)
    kept |= dict.fromkeys(("adapter", "sequential adapter"), rank * widths)
    tokens = asked + shown.get(method, 0)
    return {"tflops": round(forward_flops(reader.lm, tokens) / 1e12, 5), "storage_floats": round(kept.get(method, 0))}


def forward_flops(lm: PreTrainedModel, tokens: float) -> float:
    """Floating-point operations of one pass over n tokens, two a multiply-add.   2 n (weights of the matrices) + 4 n^2 h layers / 2"""
    tables = {module.weight for module in lm.modules() if isinstance(module, nn.Embedding)} - {lm.get_output_embeddings().weight}
    weights = sum(p.numel() for p in {*lm.parameters()} - tables if p.ndim == 2)
    return 2 * tokens * weights + 2 * tokens**2 * lm.config.hidden_size * lm.config.num_hidden_layers


@torch.no_grad()
def evaluate_objectives(reader: Reader, texts: Sequence[str]) -> dict:
    """Perplexity of raw text, paragraph by paragraph, with no context but an adapter.

    reconstruction: a paragraph under its own adapter; completion: its second half under the adapter of its first; each against the plain
    LM, against prompting (what the adapter read stands before it; of what is too long for the window, the end) and against the adapter
    of another paragraph. "examples" has the mean loss (nats a token) of each paragraph.
    """
    tokens = [ids for text in texts if len(ids := reader.tokenizer(text).input_ids) >= 8]
    if len(tokens) < 2:
        raise BadData(f"{len(tokens)} paragraphs of 8 tokens or more found, two are needed (one is the other's control); give a longer text")
    reads = [ids[: window(reader.lm)] for ids in tokens]
    halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in reads]
    suites = {"reconstruction": [(ids, ids) for ids in reads], "completion": halves}
    results, examples = {}, []
    for objective, pairs in suites.items():
        adapters = [reader.generator.write(reader.generator.read(reader.lm, torch.tensor([read], device=reader.lm.device))) for read, _ in pairs]
        losses: dict[str, list] = {"plain": [], "prompting": [], "adapter": [], "wrong adapter": []}
        for n, (read, said) in enumerate(tqdm(pairs, desc=objective, unit="paragraph", disable=None)):
            seen = read[max(0, len(read) + len(said) - window(reader.lm)) :]
            losses["plain"].append(_losses(reader, said))
            losses["prompting"].append(_losses(reader, said, seen=seen))
            losses["adapter"].append(_losses(reader, said, adapters[n]))
            losses["wrong adapter"].append(_losses(reader, said, adapters[(n + 1) % len(pairs)]))
            examples.append({"paragraph": n, "objective": objective} | {name: round(values[n].mean().item(), 4) for name, values in losses.items()})
        results[objective] = {name: round(torch.cat(values).mean().exp().item(), 2) for name, values in losses.items()}
    return {"n": len(tokens), "perplexity": results, "examples": examples}


def _losses(reader: Reader, tokens: list[int], update: Adapter | None = None, seen: Sequence[int] = ()) -> Tensor:
    with update.applied_to(reader.lm) if update else nullcontext():
        return target_losses(reader.lm, 0, [Target([*seen, *tokens], len(seen) + 1)])[0]


# -------------------------------------------------------------------------------------------------- memory


def memory(shape: PretrainedConfig, settings: GeneratorConfig, context: int, targets: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Bytes that each part of reading a context takes, and of training on target tokens, with an LM of this shape.

    context, targets: how many tokens are read, and how many the adapted LM is trained on, in one step of one device.

    Nothing is loaded: the LM is built and run on fake tensors, which have shapes and dtypes but no memory. Activations are what autograd
    saves for the backward pass, as it saves it; with checkpointing, what one block saves while it is computed again comes on top.
    """
    with FakeTensorMode():
        lm = AutoModelForCausalLM.from_config(deepcopy(shape), dtype=dtype).eval().requires_grad_(False)
        generator = AdapterGenerator.for_lm(lm, settings)
        streams = [torch.zeros(1, context, shape.hidden_size, dtype=dtype) for _ in generator.layers]
        weights = [*lm.parameters(), *generator.parameters()]
        reading, state = saved_for_backward(lambda: generator.contribution(streams, streams[0], torch.ones(1, context, dtype=torch.bool)), weights)

        def answer_with(keeping: Callable) -> Adapter:
            update = generator.write(state)
            with update.applied_to(lm), keeping(lm, update):
                lm(torch.zeros(1, targets, dtype=torch.long), use_cache=False).logits.float().log_softmax(-1)
            return update

        answering, update = saved_for_backward(lambda: answer_with(lambda lm, update: nullcontext()), weights)
        checkpointed, _ = saved_for_backward(lambda: answer_with(blocks_computed_twice), weights)
        trained = sum(p.numel() for p in generator.parameters())
        return {
            "LM": sum(p.nbytes for p in lm.parameters()),
            "generator, fp32": 4 * trained,
            "streams of the context": sum({layer.block: h.nbytes for layer, h in zip(generator.layers, streams, strict=True)}.values()),
            "state": state.S.nbytes,
            "adapter": sum(factor.nbytes for side in (update.down, update.up) for factor in side.values()),
            "gradients and Adam, fp32": 3 * 4 * trained,
            "activations of reading": reading,
            "activations of answering": answering,
            "the same, checkpointed": checkpointed + (answering - checkpointed) // shape.num_hidden_layers,
        }


def saved_for_backward(run: Callable[[], object], weights: Sequence[Tensor]) -> tuple[int, object]:
    """Bytes that autograd keeps of a computation, the weights that it would find anyway left out; and what the computation returned."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    known = {weight.untyped_storage()._cdata for weight in weights}
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in known), result
