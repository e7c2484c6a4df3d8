"""Objectives and recipes -> one training loop on accelerate: a start by regression, a log, atomic checkpoints, exact resume."""

import csv
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from einops import einsum
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, one_hot
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Cache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from .formats import CARD, load_generator, refuse_foreign, save_generator, whole_folder
from .generator import Adapter, AdapterGenerator, ContextState, GeneratorConfig, block_inputs, rms_norm, token_embeddings, with_previous
from .models import length, load_lm, padded, repeated, word_tokenizer
from .tasks import (
    DATA,
    BadData,
    Document,
    Question,
    cloze,
    excerpt,
    lesson,
    package_text,
    question_prompt,
    read_documents,
    read_prose,
    read_training,
    shown_by_examples,
    toy_document,
    toy_vocabulary,
    toy_world,
    varied_prose,
    world_dialogue,
    world_document,
    world_task,
)

# ------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Target:
    """Tokens that the LM must predict with the adapter of a context on: tokens[start:], given the tokens before them.

    seen: what its teacher has before them, where it learns from the same LM with the context in its prompt.
    """

    tokens: list[int]
    start: int
    seen: tuple[int, ...] = ()


def answers(document: Document, pieces: list[list[int]], tokenizer, rng: random.Random, asked: int = 4) -> list[list[Target]]:
    """Once all is read, `asked` questions, the document's own and then sentences to complete; loss on the answer only (the paper's instruction tuning)."""
    questions = rng.sample(document.questions, min(asked, len(document.questions)))
    questions += [cloze(document.text, rng) for _ in range(asked - len(questions))]
    return [[] for _ in pieces[1:]] + [[answer_target(question, tokenizer) for question in questions]]


def answer_target(question: Question, tokenizer) -> Target:
    """A question put to the LM, and its first answer as what must be said."""
    return continued(tokenizer, question_prompt(question.text), f" {question.answers[0]}\n")


def continued(tokenizer: PreTrainedTokenizerBase, prompt: str, said: str) -> Target:
    """What is said after a prompt, made into tokens together with it, so that no mark of a text's beginning comes between them."""
    return Target(tokenizer(prompt + said).input_ids, len(tokenizer(prompt).input_ids))


def reconstruction(document: Document, pieces: list[list[int]], tokenizer, rng: random.Random, asked: int = 4, length: int = 24) -> list[list[Target]]:
    """After every piece, a span of what was read so far, starting anywhere in it (the paper's reconstruction)."""
    read, targets = [], []
    for piece in pieces:
        read = read + piece
        start = rng.randrange(max(1, len(read) - length + 1))
        targets.append([Target(read[start : start + length], 1)])
    return targets


def completion(document: Document, pieces: list[list[int]], tokenizer, rng: random.Random, asked: int = 4) -> list[list[Target]]:
    """After every piece but the last, the piece that comes next (the paper's completion)."""
    return [[Target(following, 1)] for following in pieces[1:]] + [[]]


def distillation(document: Document, pieces: list[list[int]], tokenizer, rng: random.Random, asked: int = 4) -> list[list[Target]]:
    """Once all is read, questions as in `answers`, where every token of the answer is to be as likely as with the document in the prompt."""
    seen = (*tokenizer(document.text).input_ids, *tokenizer("\n\n").input_ids)
    return [[replace(target, seen=seen) for target in targets] for targets in answers(document, pieces, tokenizer, rng, asked)]


OBJECTIVES: dict[str, Callable[..., list[list[Target]]]] = {
    "answers": answers,
    "reconstruction": reconstruction,
    "completion": completion,
    "distillation": distillation,
}


def target_logits(
    lm: PreTrainedModel, pad: int, targets: Sequence[Target], begun: Cache | None = None, together: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The LM's logits (fp32) for every target token, the token, and the number of its target; the LM head runs only where there is a target.

    begun: keys and values of what all targets begin with, as `read_beginning` gives it.
    together: how many neighbouring targets stand in each row, unseen by each other, so that little is padding; without it, one. Not with begun.
    """
    if begun is not None and together is not None:
        raise ValueError("targets together in a row asked, and what they begin with from a cache; with one they would see each other, so give either")
    known, order = length(begun), iter(targets)
    rows = [[*islice(order, count)] for count in together or [1] * len(targets)]

    def in_rows(part: Callable[[Target], Iterable[int]], fill: int = 0) -> Tensor:
        return padded([[number for target in row for number in part(target)] for row in rows], fill)[0].to(lm.device)

    ids, following = in_rows(lambda t: t.tokens[known:-1], pad), in_rows(lambda t: t.tokens[known + 1 :])
    wanted = in_rows(lambda t: [place >= t.start for place in range(known + 1, len(t.tokens))]).bool()
    position = in_rows(lambda t: range(known, len(t.tokens) - 1)) if together else None  # attention, too, begins anew where these do
    hidden = lm.base_model(ids, position_ids=position, past_key_values=repeated(begun, len(rows)), use_cache=begun is not None).last_hidden_state
    logits = lm.get_output_embeddings()(hidden[wanted.to(hidden.device)]).float()
    which = [number for number, t in enumerate(targets) for _ in range(max(t.start, known + 1), len(t.tokens))]
    return logits, following[wanted].to(logits.device), torch.tensor(which, device=logits.device)


def target_losses(
    lm: PreTrainedModel, pad: int, targets: Sequence[Target], begun: Cache | None = None, together: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) of every target token, and the number of its target; begun, together: `target_logits`."""
    logits, tokens, which = target_logits(lm, pad, targets, begun, together)
    return cross_entropy(logits, tokens, reduction="none"), which


@torch.no_grad()
def taught(lm: PreTrainedModel, pad: int, targets: list[Target]) -> Tensor:
    """What the plain LM thinks of every target token after what its teacher has seen: log-probabilities of the whole vocabulary."""
    prompted = [Target([*t.seen, *t.tokens], len(t.seen) + t.start) for t in targets]
    return target_logits(lm, pad, prompted)[0].log_softmax(-1)


class Objective(nn.Module):
    """What a step is judged by: read the contexts piece by piece, write an adapter after each, predict every objective's targets with it on.

    An objective names, for every piece, the targets of the adapter that was written after it. Those of one document and piece stand in one
    row, and one pass of the LM predicts them all.
    asked: how many questions about each, where an objective asks any.
    """

    def __init__(
        self,
        generator: AdapterGenerator,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        objectives: Iterable[str],
        pieces: int = 1,
        checkpointing: bool = False,
        asked: int = 4,
    ):
        super().__init__()
        self.generator, self.objectives, self.pieces, self.checkpointing, self.asked = generator, tuple(objectives), pieces, checkpointing, asked
        self._frozen = (lm, tokenizer)  # a tuple, so that the LM is no submodule: neither trained, saved nor synchronised

    def forward(self, documents: list[Document], rngs: list[random.Random], shared: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
        """For each objective the summed loss (nats) and the number of tokens that it was summed over; shared: see `sharing`, of that size."""
        lm, tokenizer = self._frozen
        pieces = [cut(tokenizer(document.text).input_ids, self.pieces) for document in documents]
        group = sharing(documents, shared)
        whose = torch.cat([group + t * len(group.unique()) for t in range(self.pieces)])
        state = added_up(self.prefix_states(pieces), whose)
        rows: list[list[tuple[str, Target]]] = [[] for _ in range(self.pieces * len(documents))]
        for kind in self.objectives:
            for n, (document, read, rng) in enumerate(zip(documents, pieces, rngs, strict=True)):
                for t, found in enumerate(OBJECTIVES[kind](document, read, tokenizer, rng, self.asked)):
                    rows[t * len(documents) + n] += [(kind, target) for target in found]
        used = [n for n, row in enumerate(rows) if row]
        kinds, targets = zip(*(each for n in used for each in rows[n]), strict=True)
        adapter = self.generator.write(state)[whose[used]]
        with adapter.applied_to(lm), blocks_computed_twice(lm, adapter) if self.checkpointing else nullcontext():
            logits, tokens, which = target_logits(lm, tokenizer.pad_token_id, targets, together=[len(rows[n]) for n in used])
        losses, sums = cross_entropy(logits, tokens, reduction="none"), {}
        for kind in self.objectives:
            own = torch.tensor([other == kind for other in kinds], device=which.device)[which]
            if kind == "distillation":  # KL(teacher || adapted LM)
                teacher = taught(lm, tokenizer.pad_token_id, [target for other, target in zip(kinds, targets, strict=True) if other == kind])
                total = kl_div(logits[own].log_softmax(-1), teacher, log_target=True, reduction="sum")
            else:
                total = losses[own].sum()
            sums[kind] = (total, own.sum())
        return sums

    def prefix_states(self, pieces: list[list[list[int]]]) -> ContextState:
        """What is known after each piece, one row per piece and document, pieces first.   S_t = S_{t-1} + A2 H_t^T H_t B1 (eq. 3)"""
        lm, tokenizer = self._frozen
        inputs = (padded([row[t] for row in pieces], tokenizer.pad_token_id) for t in range(self.pieces))
        states = list(accumulate(self.generator.read(lm, ids.to(lm.device), mask.to(lm.device)) for ids, mask in inputs))
        return ContextState(torch.cat([state.S for state in states], dim=1), torch.cat([state.tokens for state in states]))


def sharing(documents: list[Document], size: int) -> Int[Tensor, " b"]:
    """Groups of about so many documents, by number: the states of each are added up, as if it were one long text.

    States add (eq. 3), so practice with long contexts costs no more than with short ones. Every n-th document of a step belongs together,
    n = documents / size; one that shows a task by examples stays alone, for its questions do not name the task.
    """
    count = max(1, len(documents) // size)
    groups = [count + n if document.task else n % count for n, document in enumerate(documents)]
    return torch.tensor(groups).unique(return_inverse=True)[1]


def added_up(state: ContextState, group: Int[Tensor, " b"]) -> ContextState:
    """The state of every group of rows, by number: the sum of theirs (eq. 3)."""
    member = one_hot(group).to(state.S)
    tokens = einsum(member, state.tokens.to(member), "b g, b -> g").long()
    return ContextState(einsum(member, state.S, "b g, l b p q -> l g p q"), tokens)


@contextmanager
def blocks_computed_twice(lm: PreTrainedModel, adapter: Adapter):
    """Within it, the LM keeps only the input of each of its blocks, and computes the rest again for the backward pass (Chen et al. 2016).

    By then the adapter is off, so a block is computed again with it on.
    """
    blocks = lm.get_submodule(re.match(r"(.+?)\.\d+\.", next(iter(adapter.down)))[1])
    again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), adapter.applied_to(lm))}
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **again)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is left


def mean_losses(sums: dict[str, tuple[Tensor, Tensor]], weights: dict[str, float], accelerator: Accelerator) -> dict[str, Tensor]:
    """The mean loss (nats a token) of each objective over all processes, and their weighted sum as "loss".

    A process holds its own part of the sums. Scaled by the number of processes, over which gradients are averaged, they give the
    gradient of the whole batch, however it was shared out.
    """
    means = {kind: total * accelerator.num_processes / accelerator.reduce(tokens) for kind, (total, tokens) in sums.items()}
    return means | {"loss": sum(weight * means[kind] for kind, weight in weights.items())}


def cut(tokens: list[int], pieces: int) -> list[list[int]]:
    """Tokens in so many pieces of equal length, but for one token."""
    ends = [len(tokens) * n // pieces for n in range(pieces + 1)]
    return [tokens[start:end] for start, end in pairwise(ends)]


# -------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run but the LM and the time it gets.

    mixture: share of each source in a step's documents.  sentences / facts / paragraphs: sizes of an excerpt / a world document or dialogue / a raw text.
    asked: how many questions about a context.
    shared: how many contexts' states are added up to one for all of them, drawn from these for each step.
    objectives: name -> weight.  pieces: how many a context is read in, with an adapter after each.  precision: the frozen LM's.
    checkpointing: keep less for the backward pass and compute it again, a third slower.
    steady: share of the run at full learning rate; it then falls linearly to a twentieth.
    optimizer: "adamw", or "muon", which sets the singular values of every matrix's step to one (Jordan et al. 2024).
    start_from / gain: documents for the start by regression, and how loud it begins.
    """

    config: GeneratorConfig
    mixture: dict[str, float]
    objectives: dict[str, float]
    pieces: int = 1
    precision: str = "bfloat16"
    checkpointing: bool = False
    contexts: int = 8
    sentences: tuple[int, int] = (1, 8)
    facts: tuple[int, int] = (1, 8)
    paragraphs: tuple[int, int] = (1, 4)
    asked: int = 4
    shared: tuple[int, ...] = (1,)
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 20
    steady: float = 0.5
    clip: float = 1.0
    start_from: int = 600
    gain: float = 1.8
    seed: int = 0


OURS = {"previous": True, "embedding": True, "gate": True}
LAPTOP = GeneratorConfig(targets=("mlp.down_proj",), blocks=tuple(range(14, 25)), p=384, q=384, rank=128, alpha=384.0, **OURS)
PAPER = GeneratorConfig(targets=("self_attn.o_proj",), p=1024, q=1024, rank=128, alpha=64.0)
TOY = GeneratorConfig(targets=("mlp.c_proj",), p=64, q=64, rank=32, alpha=64.0, chunk=256)
TABLE_2 = Recipe(
    GeneratorConfig(targets=("attn.c_proj",), p=64, q=64, rank=32, alpha=64.0, chunk=256),
    {"toy world": 1.0},
    {"completion": 1.0, "reconstruction": 1.0},
    pieces=4,
    precision="float32",
    contexts=16,
    facts=(8, 16),
    learning_rate=2e-3,
    gain=1.0,
)
TOLD = {"prose": 0.35, "world": 0.05, "closed world": 0.25, "rivals": 0.35}
INSTRUCTED = {"prose": 0.5, "world": 0.03, "closed world": 0.08, "rivals": 0.06, "dialogues": 0.08, "tasks": 0.25}
RECALL = {"answers": 1.0, "reconstruction": 0.2}
FACTS = Recipe(LAPTOP, TOLD, RECALL, sentences=(3, 12), facts=(5, 10), asked=10, optimizer="muon", learning_rate=2.5e-4)
RECIPES = {
    "facts": FACTS,
    "pretrain": Recipe(LAPTOP, {"text": 1.0}, {"completion": 1.0, "reconstruction": 1.0}, pieces=4, optimizer="muon", learning_rate=2.5e-4),
    "instruct": replace(FACTS, config=replace(LAPTOP, task_blocks=(20, 21)), mixture=INSTRUCTED, shared=(1, 2, 4, 8)),
    "mistral-7b": Recipe(PAPER, TOLD, RECALL, facts=(4, 8), checkpointing=True, learning_rate=5e-5, warmup=100),
    "closed-lists": Recipe(LAPTOP, {"closed world": 1.0}, {"answers": 1.0}),
    "toy": Recipe(TOY, {"toy world": 1.0}, {"answers": 1.0}, precision="float32", contexts=32, learning_rate=2e-3, gain=1.0),
    "toy-default": TABLE_2,
    "toy-reconstruction-only": replace(TABLE_2, objectives={"reconstruction": 1.0}),
    "toy-completion-only": replace(TABLE_2, objectives={"completion": 1.0}),
    "toy-frobenius": replace(TABLE_2, config=replace(TABLE_2.config, norm="frobenius")),
    "toy-polar": replace(TABLE_2, config=replace(TABLE_2.config, norm="polar")),
    "toy-feed-forward": replace(TABLE_2, config=replace(TABLE_2.config, targets=("mlp.c_proj",))),
    "toy-previous": replace(TABLE_2, config=replace(TABLE_2.config, previous=True)),
    "toy-embedding": replace(TABLE_2, config=replace(TABLE_2.config, embedding=True)),
    "toy-gate": replace(TABLE_2, config=replace(TABLE_2.config, gate=True)),
}


FILES = {
    "prose": ["data/prose"],
    "world": ["data/world.jsonl"],
    "closed world": ["data/world.jsonl"],
    "rivals": ["data/world.jsonl"],
    "dialogues": ["data/talk.jsonl"],
    "tasks": ["data/lessons.jsonl"],
    "toy world": ["data/toy_world.json"],
}
POOL = 4


class Source:
    """Draws training documents: step s of a seed gives the same ones whenever and wherever it runs.

    files: of the reader's own, by what is in them for prose, dialogues, tasks or text. They are half of what is drawn of that source
    (of raw text, all); the rest is the project's.
    """

    def __init__(self, recipe: Recipe, files: Iterable[str | Path] = ()):
        self.recipe, self.names, self.given = recipe, {kind: [*FILES.get(kind, ())] for kind in recipe.mixture}, {}
        self.prose = read_prose(sorted((DATA / "prose").glob("*.jsonl")))
        for file in files:
            kind, found = read_training(file)
            if kind not in recipe.mixture:
                raise BadData(f"{file} holds {kind}, but the recipe draws {', '.join(recipe.mixture)} only; leave it out, or choose a recipe with {kind}")
            self.given.setdefault(kind, []).extend(found)
            self.names[kind].append(Path(file).name)
        if "text" in recipe.mixture and "text" not in self.given:
            self.given["text"], self.names["text"] = package_text(), ["pydoc_data.topics"]

    def document(self, rng: random.Random, whole: bool = False) -> Document:
        kind = rng.choices(list(self.recipe.mixture), list(self.recipe.mixture.values()))[0]
        if kind == "text":
            start = rng.randrange(len(self.given["text"]))
            text = " ".join(self.given["text"][start : start + rng.randint(*self.recipe.paragraphs)])
            return Document(text, tuple(cloze(text, rng) for _ in range(4)))
        own = rng.choice(self.given[kind]) if kind in self.given and rng.random() < 0.5 else None
        if kind == "prose":
            document = own or varied_prose(rng.choice(self.prose), rng)
            return document if whole else excerpt(document, rng, self.recipe.sentences)
        if kind == "toy world":
            return toy_document(rng, self.recipe.facts)
        if kind == "dialogues":
            return own or world_dialogue(rng, self.recipe.facts)
        if kind == "tasks":
            return shown_by_examples(own, rng) if own else rng.choice((world_task, lesson, lesson))(rng)
        return world_document(rng, self.recipe.facts, "open" if kind == "world" else "closed", rivals=kind == "rivals")

    def shared(self, step: int) -> int:
        """How many of a step's contexts have their states added up; the same in every process."""
        return random.Random(f"{self.recipe.seed} shared {step}").choice(self.recipe.shared)

    def held_out(self) -> list[Document]:
        """Documents to validate on, which no step draws: of the toy world for the toy, else natural prose."""
        if "toy world" in self.recipe.mixture:
            return [toy_document(random.Random(f"held out {n}"), (4, 4)) for n in range(50)]
        return read_documents(DATA / "documents" / "dev.jsonl")

    def batch(self, step: int) -> tuple[list[Document], list[random.Random]]:
        """A step's documents, each with its own random numbers: of a pool for POOL steps the ones of like length, so that little is padding."""
        pool, place = divmod(step, POOL)
        rng = random.Random(f"{self.recipe.seed} {pool}")
        documents = sorted((self.document(rng) for _ in range(POOL * self.recipe.contexts)), key=lambda d: len(d.text))
        order = rng.sample(range(POOL), POOL)
        first = order[place] * self.recipe.contexts
        chosen = range(first, first + self.recipe.contexts)
        return [documents[n] for n in chosen], [random.Random(f"{self.recipe.seed} {pool} {n}") for n in chosen]


# ------------------------------------------------------------------------------------------ a start by regression


def inverse_root(C: Tensor, ridge: float) -> Tensor:
    """C^(-1/2) of a covariance, with `ridge` times its mean variance added."""
    C = C.double()
    values, vectors = torch.linalg.eigh(C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device))
    return (vectors * values.rsqrt()) @ vectors.T


@torch.no_grad()
def start_by_regression(generator: AdapterGenerator, lm, tokenizer, documents: list[Document], gain: float) -> None:
    """Give the generator a start that already copies, from closed forms; gradient descent from zero takes far longer to find it.

    For one adapted layer let h be the (RMS-normed) state of a context token t, k what its key is made from (h, with config.previous
    also the state before it), v its state and its embedding (the value sees the second with config.embedding only), y whether t belongs
    to an answer, and x the layer's input at the question's token after which t must be said. Keys meet queries by canonical correlation,
    values meet tokens by reduced-rank regression, and gates tell answers by linear regression:

        B1 = C_kk^(-1/2) L R,   B2 = R M^T C_xx^(-1/2)   with L R M^T = svd of C_kk^(-1/2) C_kx C_xx^(-1/2)
        A2, A1 from the best rank-p map of v to E[t], the LM's output embedding of t
        w = C_vv^(-1) C_vy, scaled to logits of unit variance

    where C_kx is taken within documents (k minus the document's mean), so that a key tells tokens of one text apart.
    """
    layers, p, q = generator.layers, generator.config.p, generator.config.q
    beside = generator.config.embedding or generator.config.gate  # whether anything sees the embedding of a token
    E = lm.get_output_embeddings().weight.float()
    E = E - E.mean(0)
    sums: list[dict[str, Tensor]] = [{} for _ in layers]

    def add_products(layer: int, **pairs: tuple[Tensor, Tensor]) -> None:
        for name, (left, right) in pairs.items():
            sums[layer][name] = sums[layer].get(name, 0) + (left.T @ right).cpu()  # not every device can count in doubles

    for first in tqdm(range(0, len(documents), 8), desc="start by regression", unit="batch", disable=None):
        batch = documents[first : first + 8]
        ids, mask, rows, pairs = answer_tokens(batch, tokenizer)
        ids, mask = ids.to(lm.device), mask.to(lm.device)
        H = block_inputs(lm, layers, input_ids=ids)
        X = layer_inputs(lm, [layer.name for layer in layers], padded(rows, tokenizer.pad_token_id)[0])
        asked, position, told, n = pairs.T
        real = mask.bool()
        said, embedding = E[ids[real]], token_embeddings(lm, ids)
        answer = torch.zeros_like(ids, dtype=torch.float)
        answer[told, n] = 1
        answer = (answer[real] - answer[real].mean())[:, None]
        for layer in range(len(layers)):
            h = rms_norm(H[layer], torch.ones(layers[layer].h, device=lm.device))
            k = with_previous(h) if generator.config.previous else h
            v = (torch.cat([h, embedding], dim=-1) if beside else h)[real]
            centre = (k * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            x = X[layer][asked, position].float()
            add_products(layer, kk=(k[real], k[real]), vv=(v, v), vy=(v, answer), ev=(said, v), xx=(x, x), kx=(k[told, n] - centre[told], x))
            sums[layer]["tokens"] = sums[layer].get("tokens", 0) + int(real.sum())
            sums[layer]["pairs"] = sums[layer].get("pairs", 0) + len(pairs)

    for g, c in zip(generator.by_layer, sums, strict=True):
        root_k = inverse_root(c["kk"] / c["tokens"], ridge=0.01)
        value = slice(g.A2.shape[1])
        root_v = inverse_root(c["vv"][value, value] / c["tokens"], ridge=0.01)
        root_x = inverse_root(c["xx"] / c["pairs"], ridge=0.1)
        L, R, Mt = torch.linalg.svd(root_k @ (c["kx"] / c["pairs"]).double() @ root_x, full_matrices=False)
        tokens, variance, seen = torch.linalg.svd((c["ev"][:, value] / c["tokens"]).double() @ root_v, full_matrices=False)
        B2 = R[:q, None] * Mt[:q] @ root_x
        g.B1.copy_(unit_variance(root_k @ L[:, :q] * R[:q], g.B1.shape[0]))
        g.A2.copy_(unit_variance(variance[:p, None] * seen[:p] @ root_v, g.A2.shape[1]))
        g.B2.copy_(unit_variance(B2, B2.shape[1]))
        g.A1.copy_(gain * B2.std() * B2.shape[1] ** 0.5 * tokens[:, :p])
        if g.gate is not None:
            C_vv = (c["vv"] / c["tokens"]).double()
            whiten = inverse_root(C_vv, ridge=0.01)
            w = whiten @ whiten @ c["vy"][:, 0].double()
            g.gate.copy_(w / (w @ C_vv @ w).sqrt())


def answer_tokens(documents: list[Document], tokenizer) -> tuple[Tensor, Tensor, list[list[int]], Tensor]:
    """Texts (ids and mask), prompts with their answers, and for every answer token that its text holds: prompt, position before it, text, position of it."""
    encoded = [tokenizer(document.text, return_offsets_mapping=True) for document in documents]
    rows, pairs = [], []
    for row, document in enumerate(documents):
        for question in document.questions:
            target = continued(tokenizer, question_prompt(question.text), f" {question.answers[0]}")
            begin = document.text.find(question.answers[0])
            end = begin + len(question.answers[0])
            place = [n for n, (a, b) in enumerate(encoded[row].offset_mapping) if a < end and b > max(begin, a)]
            for j, (token, n) in enumerate(zip(target.tokens[target.start :], place, strict=False), start=target.start - 1):
                if encoded[row].input_ids[n] == token:
                    pairs.append((len(rows), j, row, n))
            rows.append(target.tokens)
    return *padded([e.input_ids for e in encoded], tokenizer.pad_token_id), rows, torch.tensor(pairs)


def unit_variance(weight: Tensor, fan_in: int) -> Tensor:
    """A weight scaled to the spread of a fresh one; the state's norm makes the scale of A2 and B1 free."""
    return weight / (weight.std() * fan_in**0.5)


@torch.no_grad()
def layer_inputs(lm: PreTrainedModel, names: list[str], input_ids: Tensor) -> list[Tensor]:
    """x for every named layer: what it is given in one pass of the plain LM."""
    inputs: dict[str, Tensor] = {}
    handles = [
        lm.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0])) for name in names
    ]
    try:
        lm.base_model(input_ids.to(lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [inputs[name] for name in names]


# -------------------------------------------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimiser's state, all that resuming needs.

    first: the step of its source that it began at, behind those of the runs that it goes on from.  config: its generator's, as text.
    """

    recipe: str
    begin: str
    config: str = ""
    first: int = 0
    step: int = 0
    seconds: float = 0.0
    contexts: int = 0
    history: list[dict] = field(default_factory=list)


@torch.no_grad()
def transfer(generator: AdapterGenerator, lm, tokenizer, documents: list[Document]) -> dict[str, float]:
    """The loss (nats a token) of answers about held-out documents, with its own adapter and with another document's."""
    ids, mask = padded([tokenizer(document.text).input_ids for document in documents], tokenizer.pad_token_id)
    adapter = generator.write(generator.read(lm, ids.to(lm.device), mask.to(lm.device)))
    rows = [row for row, document in enumerate(documents) for _ in document.questions]
    targets = [answer_target(question, tokenizer) for document in documents for question in document.questions]
    losses = {}
    for name, shift in (("own", 0), ("other", 1)):
        with adapter[[(row + shift) % len(documents) for row in rows]].applied_to(lm):
            losses[name] = target_losses(lm, tokenizer.pad_token_id, targets)[0].mean().item()
    return losses


def train(
    recipe_name: str,
    out: str | Path,
    lm_name: str = "smollm2",
    minutes: float | None = None,
    steps: int | None = None,
    files: list[str] | None = None,
    resume: bool = False,
    begin: str | Path | None = None,
    validate_every: int = 100,
    save_every: float = 300.0,
) -> dict[str, float]:
    """Train a generator for `minutes` or `steps` and leave it in the folder `out`; returns the last validation.

    Several processes (`accelerate launch`) share each step's documents among them, and go the same way as one; only that states are added up
    of at most the documents that a process has.
    out/checkpoint holds the newest complete checkpoint (weights, optimiser, random state, progress); resume=True goes on from
    it: under `steps` the result is the one that an uninterrupted run would have had. begin: a generator's folder to train on
    from, in place of a start by regression, with its settings and the documents that come after its own.
    """
    recipe, out = RECIPES[recipe_name], Path(out)
    refuse_foreign(out / "generator", CARD)
    accelerator = Accelerator()
    set_seed(recipe.seed)
    lm, tokenizer = load_lm(lm_name, getattr(torch, recipe.precision))
    lm.to(accelerator.device)
    source = Source(recipe, files or ())
    held_out = source.held_out()
    try:
        generator = AdapterGenerator.for_lm(lm, recipe.config)
    except ValueError as error:
        raise BadData(f"recipe {recipe_name!r} does not fit {lm_name}: {error}") from None
    if accelerator.num_processes > recipe.contexts:
        raise BadData(f"{accelerator.num_processes} processes asked to share the {recipe.contexts} contexts of a step; start at most as many as these")
    progress = Progress(recipe_name, begin=str(begin or "regression"))
    if begin:
        trained = load_generator(begin, lm)
        shapes = [{name: weight.shape for name, weight in each.state_dict().items()} for each in (trained, generator)]
        if trained.layers != generator.layers or shapes[0] != shapes[1]:
            raise BadData(f"--generator {begin} asked, but recipe {recipe_name!r} trains other layers or sizes; choose the recipe that made it ({CARD})")
        recipe, generator = replace(recipe, config=trained.config), trained.train().requires_grad_()
        before = json.loads((Path(begin) / CARD).read_text())["provenance"]
        progress.first = before.get("first", 0) + before.get("steps", 0)
    elif not resume:
        rng = random.Random(f"{recipe.seed} start")
        start_by_regression(generator, lm, tokenizer, [source.document(rng, whole=True) for _ in range(recipe.start_from)], recipe.gain)
    progress.config = repr(generator.config)
    objective = Objective(generator.to(accelerator.device), lm, tokenizer, recipe.objectives, recipe.pieces, recipe.checkpointing, recipe.asked)
    objective, *optimizers = accelerator.prepare(objective, *recipe_optimizers(recipe, generator))
    if resume:
        progress = Progress(**json.loads((out / "checkpoint" / "progress.json").read_text()))
        if progress.recipe != recipe_name:
            raise BadData(f"--resume of recipe {recipe_name!r} asked, but {out}/checkpoint is of {progress.recipe!r}; name the folder of its own run")
        try:
            accelerator.load_state(str(out / "checkpoint"))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise BadData(
                f"--resume of recipe {recipe_name!r} asked, but {out}/checkpoint is of another generator, or of another number of processes "
                f"({reason}); name the folder of its own run"
            ) from None
        if progress.config != repr(generator.config):
            raise BadData(f"--resume asked, but {out}/checkpoint is of a generator with other settings; give the --generator that its run began with")

    def done() -> float:
        return progress.step / steps if steps else progress.seconds / (60 * minutes)

    def validation() -> dict[str, float]:
        return {f"dev {k}": round(v, 4) for k, v in transfer(generator, lm, tokenizer, held_out).items()}

    def checkpoint() -> None:
        if accelerator.is_main_process:
            with whole_folder(out / "checkpoint") as scratch:
                accelerator.save_state(str(scratch))
                (scratch / "progress.json").write_text(json.dumps(asdict(progress)))

    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=100, unit="%", desc=recipe_name, disable=not accelerator.is_local_main_process, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
    saved = progress.seconds
    while done() < 1:
        began = time.perf_counter()
        learning_rate = recipe.learning_rate * rate(progress.step, done(), recipe)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        with accelerator.accumulate(objective):
            step = progress.first + progress.step
            shared = source.shared(step)
            losses = mean_losses(objective(*(part[share] for part in source.batch(step)), shared), recipe.objectives, accelerator)
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(generator.parameters(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        progress.step += 1
        progress.contexts += recipe.contexts
        progress.seconds += broadcast(torch.tensor(time.perf_counter() - began, device=accelerator.device)).item()
        row = {k: round(accelerator.reduce(v.detach(), "mean").item(), 6) for k, v in losses.items()} | {"lr": learning_rate}
        bar.set_postfix(step=progress.step, loss=row["loss"], lr=f"{row['lr']:.1e}")
        bar.update(min(100, 100 * done()) - bar.n)
        if progress.step % validate_every == 0 or done() >= 1:
            row |= validation()
        progress.history.append({"step": progress.step, "contexts": progress.contexts, "seconds": round(progress.seconds, 1)} | row)
        if accelerator.is_main_process and ("dev own" in row):
            write_log(out / "log.csv", progress.history)
        if progress.seconds - saved > save_every:
            checkpoint()
            saved = progress.seconds
    last = progress.history[-1]
    if "dev own" not in last:  # resumed with no more than was spent
        last |= validation()
        if accelerator.is_main_process:
            write_log(out / "log.csv", progress.history)
    checkpoint()
    if accelerator.is_main_process:
        provenance = {
            "recipe": recipe_name,
            "begin": progress.begin,
            "first": progress.first,
            "settings": asdict(recipe),
            "data": [*dict.fromkeys(name for names in source.names.values() for name in names)],
            "steps": progress.step,
            "contexts": progress.contexts,
            "minutes": round(progress.seconds / 60, 1),
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "validation": {k: last[k] for k in ("dev own", "dev other")},
        }
        save_generator(out / "generator", generator, lm, lm_name, provenance)
    return {k: last[k] for k in ("dev own", "dev other")}


def recipe_optimizers(recipe: Recipe, generator: AdapterGenerator) -> list[torch.optim.Optimizer]:
    """What the recipe trains with: AdamW, or Muon for the matrices, at AdamW's learning rates, and AdamW for the norms' weights."""
    parameters = list(generator.parameters())
    optimizers = []
    if recipe.optimizer == "muon":
        matrices, parameters = [w for w in parameters if w.ndim == 2], [w for w in parameters if w.ndim != 2]
        optimizers = [torch.optim.Muon(matrices, recipe.learning_rate, recipe.weight_decay, adjust_lr_fn="match_rms_adamw")]
    return [*optimizers, torch.optim.AdamW(parameters, recipe.learning_rate, recipe.betas, weight_decay=recipe.weight_decay)]


def rate(step: int, done: float, recipe: Recipe) -> float:
    """The learning rate's share: a linear warm-up, a steady stretch, a linear fall to a twentieth."""
    fall = 1 - 0.95 * max(0.0, done - recipe.steady) / (1 - recipe.steady)
    return min(1.0, (step + 1) / recipe.warmup) * fall


def write_log(path: Path, history: list[dict]) -> None:
    """The loss log as CSV, one row a validation, its losses averaged over the steps since the one before."""
    rows, since = [], []
    for step in history:
        since.append(step)
        if "dev own" in step:
            averaged = {k: round(sum(s[k] for s in since) / len(since), 4) for k in step if k == "loss" or k in OBJECTIVES}
            rows.append(step | averaged)
            since = []
    write_csv(path, rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


# ----------------------------------------------------------------------------------------------- the toy LM


TOY_LM = GPT2Config(n_layer=4, n_embd=144, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
LONGEST = (2, 4, 8, 16)  # facts in a document, at most; the next when the LM answers MASTERED percent over 50 steps
MASTERED = 85


def toy_row(rng: random.Random, longest: int, asked: int = 4) -> str:
    """What the toy LM learns from: a document and some of its questions with answers; later, in a tenth of the rows, one question alone, to guess."""
    document = toy_document(rng, (1, longest))
    alone = longest > LONGEST[0] and rng.random() < 0.1
    questions = rng.sample(document.questions, 1 if alone else min(asked, len(document.questions)))
    told = "" if alone else f"{document.text}\n\n"
    return told + "".join(f"{question_prompt(q.text)} {q.answers[0]}\n" for q in questions)


def waves(positions: int, width: int) -> Tensor:
    """Sines and cosines of a position, so that near positions look alike from the first step on; wavelengths 2 pi to 4,000."""
    angles = torch.arange(positions)[:, None] * torch.logspace(0, -2.8, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def train_toy_lm(out: str | Path, steps: int, resume: bool = False, rows: int = 32) -> dict[str, float]:
    """Train the toy GPT-2 from scratch until it reads, and leave it in the folder `out` with its tokenizer and a log.

    Loss (nats): next-token cross-entropy, an answer counting ten times, plus 0.3 times that of naming, halfway up, the person whom
    a value or a question is about. Without this help so small an LM soon finds a value of the kind asked for, but not in minutes whose
    it is. Documents grow as it learns: in short ones it finds out that answers can be looked up (induction), and whose they are.
    resume: train the LM that is in `out` for so many steps more, on the longest documents and at a quarter of the learning rate.
    """
    refuse_foreign(out, "lm_log.csv")
    tokenizer = word_tokenizer([*re.findall(r"\w+", question_prompt("")), *toy_vocabulary()], TOY_LM.n_positions)
    accelerator = Accelerator()
    log = [*csv.DictReader((Path(out) / "lm_log.csv").open())] if resume else []
    before = int(log[-1]["step"]) if resume else 0
    set_seed(before)
    if resume:
        lm = GPT2LMHeadModel.from_pretrained(out)
    else:
        lm = GPT2LMHeadModel(GPT2Config(**TOY_LM.to_dict() | {"vocab_size": len(tokenizer)}))
        lm.transformer.wpe.weight.data = 0.03 * waves(TOY_LM.n_positions, TOY_LM.n_embd)
    learning_rate = 5e-4 if resume else 2e-3
    optimizer = torch.optim.AdamW(lm.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    lm, optimizer = accelerator.prepare(lm, optimizer)

    def ids_of(words: Iterable[str]) -> Tensor:
        return torch.tensor(tokenizer.convert_tokens_to_ids(list(words)), device=accelerator.device)

    names, answer = ids_of(toy_world()["names"]), ids_of(["Answer"])
    has_owner = ids_of([":", *(value for relation in toy_world()["relations"] for value in relation["values"])])
    rng, history, stage, since = random.Random(before), [], (len(LONGEST) - 1) * resume, 0
    for step in (bar := tqdm(range(steps), desc="toy-lm", unit="step")):
        if step - since >= 50 and statistics.fmean(row["exact"] for row in history[-50:]) > MASTERED:
            stage, since = min(stage + 1, len(LONGEST) - 1), step
        longest = LONGEST[stage]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 50, 1.03 - step / steps)
        ids, mask = padded(tokenizer([toy_row(rng, longest) for _ in range(rows)]).input_ids, tokenizer.pad_token_id)
        ids, mask = ids.to(accelerator.device), mask.to(accelerator.device)
        read, following = ids[:, :-1], ids[:, 1:]
        output = lm(read, output_hidden_states=True)
        answers = nn.functional.pad(read[:, :-1] == answer, (1, 0))  # the word after "Answer" and ":"
        weight = mask[:, 1:] * torch.where(answers, 1.0, 0.1)
        loss = (cross_entropy(output.logits.mT, following, reduction="none") * weight).sum() / weight.sum()

        place = torch.arange(read.shape[1], device=read.device).expand_as(read)
        latest = torch.where(torch.isin(read, names), place, -1).cummax(1).values  # where the name before stands
        owned = torch.isin(read, has_owner) & (latest >= 0)
        transformer = accelerator.unwrap_model(lm).transformer
        halfway = transformer.ln_f(output.hidden_states[TOY_LM.n_layer // 2][owned]) @ transformer.wte.weight.T
        halfway = halfway.scatter(1, read[owned][:, None], -torch.inf)  # the word itself may stay as readable as it likes
        owner_loss = cross_entropy(halfway, read.gather(1, latest.clamp_min(0))[owned])

        accelerator.backward(loss + 0.3 * owner_loss)
        accelerator.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        exact = (output.logits.argmax(-1) == following)[answers].float().mean()
        history.append({"step": before + step + 1, "facts": longest, "loss": loss.item(), "owner": owner_loss.item(), "exact": 100 * exact.item()})
        bar.set_postfix(facts=longest, owner=f"{owner_loss.item():.2f}", loss=f"{loss.item():.2f}", exact=f"{100 * exact.item():.0f} %")
    spans = [history[n : n + 25] for n in range(0, steps, 25)]
    recent = [span[-1] | {k: round(statistics.fmean(row[k] for row in span), 4) for k in ("loss", "owner", "exact")} for span in spans]
    with whole_folder(out) as scratch:
        accelerator.unwrap_model(lm).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_csv(scratch / "lm_log.csv", log + recent)
    return recent[-1]
