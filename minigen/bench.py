"""What reading, writing, answering, training and normalising cost: seconds and bytes, as ratios within one run."""

import random
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from .evaluation import Reader
from .generator import AdapterGenerator, adapted_layers, block_inputs, svd_norm, token_embeddings
from .models import load_lm, padded
from .polar import polar_norm
from .tasks import Document, question_prompt
from .training import POOL, Recipe, Source, answers, target_losses

STREAMS = (2048, 32768)  # tokens, of which the longer must not need more memory


@torch.no_grad()
def bench(reader: Reader, tokens: int = 512, repeats: int = 7) -> list[dict]:
    """Speed and size as ratios within one run: medians of interleaved repetitions, in seconds (bytes for the state and for memory)."""
    lm, generator = reader.lm, reader.generator

    def stream(tokens: int) -> Tensor:
        return torch.arange(tokens, device=lm.device)[None] % (lm.config.vocab_size - 10) + 5

    def read(length: int) -> None:  # again and again, for what an allocator keeps for itself grows with the work done
        for _ in range(STREAMS[1] // length):
            generator.read(lm, stream(length))

    peaks = [peak_memory(partial(read, length), lm.device) for length in STREAMS]
    held = [tensor_memory(partial(generator.read, lm, stream(length))) for length in STREAMS]
    ids = stream(tokens)
    state = generator.read(lm, ids)
    update = generator.write(state)
    prompt = reader.tokenizer(question_prompt("What is it?"), return_tensors="pt").input_ids.to(lm.device)

    def generate() -> None:
        lm.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=32, max_new_tokens=32, do_sample=False, pad_token_id=0)

    def merged() -> float:
        update.merge_into(lm)
        try:
            return seconds(generate)
        finally:
            update.restore(lm)

    def hooked() -> float:
        with update.applied_to(lm):
            return seconds(generate)

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    timed = {
        "forward pass": lambda: seconds(lambda: lm(ids)),
        "read": lambda: seconds(lambda: generator.read(lm, ids)),
        "write": lambda: seconds(lambda: generator.write(state)),
        "generation plain": lambda: seconds(generate),
        "generation merged": merged,
        "generation hooked": hooked,
    }
    medians = _medians({name: lambda _, work=work: work() for name, work in timed.items()}, repeats, "bench")
    sizes = {"tokens": tokens, "new_tokens": 32, "repeats": repeats}

    def row(top: str, bottom: str, name: str | None = None) -> dict:
        return _ratio(name or f"{top} / {bottom}", medians[top], medians[bottom], sizes)

    chunks = [generator.read(lm, chunk) for chunk in ids.chunk(32, dim=1)]
    one, many = chunks[0].S.nbytes, reduce(add, chunks).S.nbytes
    return [
        row("read", "forward pass"),
        row("write", "forward pass"),
        row("generation merged", "generation plain", "generation merged / plain"),
        row("generation hooked", "generation plain", "generation hooked / plain"),
        _ratio("state bytes chunk 32 / chunk 1", many, one, {"tokens": tokens}),
        _ratio("peak memory of tensors, long / short stream", *held[::-1], {"tokens": STREAMS[::-1]}),
        _ratio("peak memory of the process, long / short stream", *peaks[::-1], {"tokens": STREAMS[::-1]}),
    ]


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that the process held at any time of a piece of work: of the GPU where that is its device, else of main memory, looked at every 5 ms."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    process, seen, done = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while True:
            seen.append(process.memory_info().rss)
            if done.wait(0.005):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


def tensor_memory(work: Callable[[], object]) -> int:
    """The most bytes that tensors which a piece of work made held at any time of it."""
    with _Storages() as storages:
        work()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until nobody refers to it."""

    now = peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in {s._cdata: s for s in _storages(made) if s._cdata not in given}.values():
            self._count(storage.nbytes())
            weakref.finalize(storage, self._count, -storage.nbytes())
        return made

    def _count(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _medians(timed: dict[str | None, Callable[[int], float]], repeats: int, what: str) -> dict[str | None, float]:
    """The median seconds of every piece of work over interleaved rounds, whose number it is told; the first one warms up."""
    runs: dict[str | None, list[float]] = {name: [] for name in timed}
    for nth in tqdm(range(repeats + 1), desc=what, unit="round", disable=None):
        for name, work in timed.items():
            taken = work(nth)
            if nth:
                runs[name].append(taken)
    return {name: statistics.median(values) for name, values in runs.items()}


def _ratio(name: str, numerator: float, denominator: float, sizes: dict) -> dict:
    return {"name": name, "ratio": round(numerator / denominator, 4), "numerator": round(numerator, 5), "denominator": round(denominator, 5), "sizes": sizes}


NORMED = ((30, 128, 32), (8, 1024, 128))  # layers, side of the state, rank: of a small generator, and of a fourth of Mistral-7B's


def bench_norms(reader: Reader, text: str, shapes: Sequence[tuple[int, int, int]] = NORMED, repeats: int = 5) -> list[dict]:
    """Seconds (medians of interleaved repetitions) and relative error of ways to U_r V_r^T, as ratios to the exact decomposition's.

    The states have random directions and the spectra 1/k, 0.95^k, one that is flat but for a gap of 5 % at r, and that of the
    generator's middle layer after `text`, stretched to the size on a logarithmic scale.
    """
    trained = torch.linalg.svdvals(reader.read(text).S[len(reader.generator.layers) // 2, 0]).log()
    rows = []
    for layers, side, rank in shapes:
        k = torch.arange(1.0, side + 1)
        spectra = {
            "trained": torch.nn.functional.interpolate(trained[None, None], side, mode="linear", align_corners=True)[0, 0].exp(),
            "1/k": 1 / k,
            "0.95^k": 0.95**k,
            "flat, gap 1.05": torch.where(k <= rank, 1.05, 1.0),
        }
        for spectrum, sigma in spectra.items():
            U, V = (torch.linalg.qr(torch.randn(layers, side, side, generator=torch.Generator().manual_seed(seed))).Q for seed in (0, 1))
            what = f"{layers} x {side} x {side}, {spectrum}"
            medians, errors = _time_norms((U * sigma) @ V.mT, U[..., :rank] @ V[..., :rank].mT, rank, repeats, what)
            sizes = {"layers": layers, "side": side, "rank": rank, "spectrum": spectrum, "repeats": repeats}
            for name, median in medians.items():
                against = "svd backward" if name.endswith("backward") else "svd"
                error = {"error": float(f"{errors[name]:.2g}")} if name in errors else {}
                rows.append(_ratio(f"{name} / {against}", median, medians[against], sizes) | error)
    return rows


def _time_norms(S: Tensor, exact: Tensor, rank: int, repeats: int, what: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of every way, forward and where there is one backward, and how far each is from the exact result."""
    S, weight = S.requires_grad_(), torch.randn(S.shape, generator=torch.Generator().manual_seed(2))
    ways: dict[str, Callable] = {"svd": partial(svd_norm, S, rank), "polar": partial(polar_norm, S, rank)}
    ways |= {f"svd_lowrank {n}": partial(_lowrank, S.detach(), rank, n) for n in (1, 2, 4, 8, 16)}
    seconds: dict[str, list[float]] = {}
    errors = {}
    for _ in tqdm(range(repeats), desc=what, unit="round", disable=None):
        for name, way in ways.items():
            began = time.perf_counter()
            left, right = way()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            N = left @ right.mT
            errors[name] = ((N.detach() - exact).norm() / exact.norm()).item()
            if N.requires_grad:
                loss = (N * weight).sum()
                began = time.perf_counter()
                loss.backward()
                seconds.setdefault(f"{name} backward", []).append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, errors


def _lowrank(S: Tensor, rank: int, power_iterations: int) -> tuple[Tensor, Tensor]:
    U, _, V = torch.svd_lowrank(S, q=rank, niter=power_iterations)
    return U, V


TRICKS = (
    "one context pass for all its questions",
    "context pass without gradient",
    "no block above the last adapted one",
    "LM head only where there is loss",
    "contexts of like length in a step",
    "the questions about a context in one row",
)


def bench_training(lm_name: str, recipe: Recipe, repeats: int = 2) -> list[dict]:
    """Contexts a minute of training by a recipe's mixture on answers, as it is and without each of TRICKS; medians of interleaved repetitions.

    The optimiser's step, which is the same everywhere, is left out.
    """
    lm, tokenizer = load_lm(lm_name, getattr(torch, recipe.precision))
    generator, source, pad = AdapterGenerator.for_lm(lm, recipe.config), Source(recipe), tokenizer.pad_token_id
    every_block = adapted_layers(lm, replace(recipe.config, blocks=None))

    def contexts(step: int, without: str | None) -> list[Document]:
        if without != "contexts of like length in a step":
            return source.batch(step)[0]
        rng = random.Random(step)
        return [source.document(rng) for _ in range(recipe.contexts)]

    def context_pass(ids: Tensor, without: str | None) -> list[Tensor]:
        if without == "context pass without gradient":
            H = lm.base_model(inputs_embeds=lm.get_input_embeddings()(ids).requires_grad_(), use_cache=False, output_hidden_states=True).hidden_states
            return [H[int(layer.block.rpartition(".")[2])] for layer in generator.layers]
        layers = every_block if without == "no block above the last adapted one" else generator.layers
        return [h for h, layer in zip(block_inputs(lm, layers, input_ids=ids), layers, strict=True) if layer in generator.layers]

    def step(number: int, without: str | None) -> float:
        documents = contexts(number, without)
        began = time.perf_counter()
        texts = [tokenizer(document.text).input_ids for document in documents]
        rng = random.Random(number)
        targets = [target for d, ids in zip(documents, texts, strict=True) for target in answers(d, [ids], tokenizer, rng, recipe.asked)[0]]
        if without == "one context pass for all its questions":
            texts = [ids for ids in texts for _ in range(len(targets) // len(texts))]
        if without == "LM head only where there is loss":
            targets = [replace(target, start=1) for target in targets]
        ids, mask = padded(texts, pad)
        together = None if without == "the questions about a context in one row" else [len(targets) // len(texts)] * len(texts)
        with generator.write(generator.contribution(context_pass(ids, without), token_embeddings(lm, ids), mask.bool())).applied_to(lm):
            target_losses(lm, pad, targets, together=together)[0].mean().backward()
        generator.zero_grad()
        return time.perf_counter() - began

    def steps(nth: int, without: str | None) -> float:
        return statistics.fmean(step(POOL * nth + place, without) for place in range(POOL))

    medians = _medians({way: partial(steps, without=way) for way in (None, *TRICKS)}, repeats, "bench of training")
    a_minute = {way: 60 * recipe.contexts / seconds for way, seconds in medians.items()}
    sizes = {"contexts": recipe.contexts, "steps": POOL * repeats}
    return [_ratio(f"contexts a minute, with / without {way}", a_minute[None], a_minute[way], sizes) for way in TRICKS]
