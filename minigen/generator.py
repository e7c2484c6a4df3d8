"""Generative Adapter (arXiv 2411.05877) in one module: a frozen LM's hidden states of a context become a low-rank adapter.

For one adapted linear layer W (o x i) in a transformer block with residual stream H:

    S       = sum_n (A2 h_n)(B1^T h_n)^T        what the context leaves behind, one outer product per token   (eq. 3)
    W_delta = s A1 norm_r(S) B2                 norm_r keeps the r leading singular directions, each with gain one

Axes, the same letters everywhere: b batch, n tokens, h hidden width (d_h), i / o input / output width of an adapted
layer, r rank kept, p / q the value and key side of the state (both d_r in the paper), l adapted layer.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

NULL_DIRECTION = 1e-5  # a singular value below this share of the largest is rounding noise, not content
DAMPING = 1e-3  # of the gradient, where two singular values (relative to the largest) nearly coincide
ValueSide = Float[Tensor, "p h"] | Float[Tensor, "p 2*h"]  # A2, for a value of the hidden state, and of the token's embedding too
KeySide = Float[Tensor, "h q"] | Float[Tensor, "2*h q"]  # B1, for a key of the hidden state, and of the one before it too
States = Float[Tensor, "b n h"]  # H, of every token of a context
Mask = Bool[Tensor, "b n"]  # which tokens are real, not padding
Gate = Float[Tensor, " 2*h"] | None  # w, for how much of its value a token writes; without it, all


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of a generator; the defaults are for a quick trial, the paper's for its 7B stand behind each.

    targets: name suffixes of the linear layers to adapt, in any family (paper: attention output of every block).
    blocks: indices of the transformer blocks to adapt, or None for all of them.
    p, q: value and key side of the state (paper: d_r = 1024 both).  rank: directions kept (128).  alpha: s = alpha / p (64).
    previous / embedding: whether a key also sees the token before its own, and a value its token's embedding (paper: neither).
    gate: whether tokens write more or less of themselves, by what they are (paper: all the same).
    task_blocks, task_values: blocks whose last values are for the task that examples show (`with_task`), and how many (paper: none).
    norm: a name in NORMS.  chunk: longest stretch of tokens read in one pass (1024).  encode: how later ones are, "parallel" or "sequential".
    """

    targets: tuple[str, ...] = ("self_attn.o_proj", "attn.c_proj")
    blocks: tuple[int, ...] | None = None
    p: int = 128
    q: int = 128
    rank: int = 32
    alpha: float = 128.0
    previous: bool = False
    embedding: bool = False
    gate: bool = False
    task_blocks: tuple[int, ...] = ()
    task_values: int = 64
    norm: str = "svd"
    encode: str = "parallel"
    chunk: int = 1024

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} asked, but only {sorted(NORMS)} are known; use one of these or add yours to NORMS")
        if self.encode not in ("parallel", "sequential"):
            raise ValueError(f"encode={self.encode!r} asked, but only 'parallel' and 'sequential' exist; use one of these")
        if not 1 <= self.rank <= min(self.p, self.q):
            raise ValueError(f"rank={self.rank} asked of a {self.p} x {self.q} state; choose 1 to {min(self.p, self.q)}")
        if not 1 <= self.task_values < self.p and self.task_blocks:
            raise ValueError(f"task_values={self.task_values} asked of {self.p} values; choose 1 to {self.p - 1}")


def rms_norm(H: States, weight: Float[Tensor, " h"], eps: float = 1e-6) -> States:
    """The generator's own norm of the residual stream.   weight * h / sqrt(mean(h^2) + eps), statistics in fp32"""
    H = H.float()
    return weight * H * torch.rsqrt(H.square().mean(-1, keepdim=True) + eps)


def with_previous(H: States) -> Float[Tensor, "b n 2*h"]:
    """Each token's state beside that of the token before it in the chunk (zero before the first).   [h_n, h_(n-1)]"""
    return torch.cat([H, nn.functional.pad(H, (0, 0, 1, -1))], dim=-1)


def token_keys(H: States, B1: KeySide) -> Float[Tensor, "b n q"]:
    """What every token is found by.   B1^T h_n, or with a B1 of twice the height   B1^T [h_n, h_(n-1)]

    The second is not in the paper. A question ends just before its answer, and so does h_(n-1); h_n looks to what follows it.
    """
    seen = with_previous(H) if len(B1) == 2 * H.shape[-1] else H
    return einsum(seen, B1, "b n k, k q -> b n q")


def token_values(H: States, A2: ValueSide, E: States | None = None, w: Gate = None) -> Float[Tensor, "b n p"]:
    """What every token says when it is found.   g_n A2 h_n, or with an A2 of twice the width   g_n A2 [h_n, e_n], e_n the token's embedding

    g_n = sigmoid(w^T [h_n, e_n]), or 1 without a gate w. Neither is in the paper. Deep in the LM h_n looks to what follows, and no longer
    tells in full which token it is of; and what articles and commas write, which nobody asks for, is in the way of names and nouns.
    """
    seen = H if w is None and A2.shape[1] == H.shape[-1] else torch.cat([H, E], dim=-1)
    values = einsum(seen[..., : A2.shape[1]], A2, "b n v, p v -> b n p")
    return values if w is None else values * torch.sigmoid(einsum(seen, w, "b n k, k -> b n"))[..., None]


def outer_products(H: States, A2: ValueSide, B1: KeySide, mask: Mask, E: States | None = None, w: Gate = None) -> Float[Tensor, "b p q"]:
    """What a context leaves behind: one outer product per real token, summed (eq. 3).   S = sum_n (A2 h_n)(B1^T h_n)^T, E, w: `token_values`"""
    H = H.masked_fill(~mask[..., None], 0.0)
    values = token_values(H, A2, E, w).masked_fill(~mask[..., None], 0.0)
    return einsum(values, token_keys(H, B1), "b n p, b n q -> b p q")


def with_task(S: Float[Tensor, "b p q"], H: States, later: States, A2: ValueSide, B1: KeySide, mask: Mask, values: int) -> Float[Tensor, "b p q"]:
    """S, its last values and last key set apart for the task that examples show.   diag(S[:-values, :-1], sum_n sigmoid(b^T h_n) A2 h'_n)

    b, the last column of B1, tells where an example's answer begins; h'_n is the state in a later block, where the LM knows which.
    """
    opened = torch.sigmoid(token_keys(H.masked_fill(~mask[..., None], 0.0), B1[:, -1:])) * mask[..., None]
    task = einsum(opened, later, A2[-values:, : H.shape[-1]], "b n one, b n h, p h -> b p one")
    return nn.functional.pad(S[:, :-values, :-1], (0, 1, 0, values)) + nn.functional.pad(task, (S.shape[2] - 1, 0, S.shape[1] - values, 0))


class LeadingDirections(torch.autograd.Function):
    """The r leading singular directions of S, null ones set to zero:  S -> U_r, V_r, for losses that see only U_r V_r^T.

    With dP = U^T dS V the differential of N = U_r V_r^T is, in the same bases, dN_ij = a_ij dP_ij + b_ij dP_ji where
        i, j both kept:        a = 1 / (sigma_i + sigma_j),                    b = -a       (the polar factor)
        k kept, d dropped:     a = sigma_k / (sigma_k^2 - sigma_d^2),          b = sigma_d / (sigma_k^2 - sigma_d^2)
        k kept, d beyond:      a = 1 / sigma_k,                                b = 0  (what only the longer side of a rectangular S has)
    and zero where both are dropped. Equal kept values do no harm. Every 1/x above, x a sum or difference in units of sigma_1, is damped to
    x / (x^2 + DAMPING^2), finite also where the gap at the cut closes or S is zero.   dL/dS = U (a * G + b * G^T) V^T,  G = U^T dL/dN V
    """

    @staticmethod
    def forward(ctx, S: Float[Tensor, "*b p q"], rank: int):
        U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
        kept = (torch.arange(sigma.shape[-1], device=S.device) < rank) & (sigma > NULL_DIRECTION * sigma[..., :1])
        V = Vh.mT
        ctx.save_for_backward(U, V, sigma, kept)
        kept = kept[..., None, :rank]
        return U[..., :rank] * kept, V[..., :rank] * kept

    @staticmethod
    def backward(ctx, grad_left: Float[Tensor, "*b p r"], grad_right: Float[Tensor, "*b q r"]):
        U, V, sigma, kept = ctx.saved_tensors
        rank = grad_left.shape[-1]
        columns, rows = (nn.functional.pad(W.mT @ grad, (0, sigma.shape[-1] - rank)) for W, grad in ((U, grad_left), (V, grad_right)))
        G = torch.where(kept[..., None, :], columns, rows.mT)  # each where it is kept
        unit = sigma[..., :1, None].clamp_min(torch.finfo(sigma.dtype).tiny)
        x, y = sigma[..., :, None] / unit, sigma[..., None, :] / unit
        both = kept[..., :, None] & kept[..., None, :]
        one = kept[..., :, None] ^ kept[..., None, :]
        per_sum, per_gap = ((d / (d.square() + DAMPING**2)) for d in (x + y, (x - y).abs()))
        a = both * per_sum + one * per_sum * per_gap * torch.maximum(x, y)
        b = one * per_sum * per_gap * torch.minimum(x, y) - both * per_sum
        beyond = kept[..., None, :rank] * (x / (x.square() + DAMPING**2)).mT[..., :rank]
        left = (grad_left - U @ (U.mT @ grad_left)) * beyond
        right = (grad_right - V @ (V.mT @ grad_right)) * beyond
        return (U @ (a * G + b * G.mT) @ V.mT + left @ V[..., :rank].mT + U[..., :rank] @ right.mT) / unit, None


def svd_norm(S: Float[Tensor, "*b p q"], rank: int) -> tuple[Float[Tensor, "*b p r"], Float[Tensor, "*b q r"]]:
    """SVDnorm: the leading singular directions with gain one, as factors.   norm_r(S) = U_r V_r^T, null directions zero"""
    return LeadingDirections.apply(S, rank)


def frobenius_norm(S: Float[Tensor, "*b p q"], rank: int) -> tuple[Float[Tensor, "*b p q"], Float[Tensor, "*b q q"]]:
    """The ablation of table 2: the state scaled to length one, every direction kept.   norm(S) = S / ||S||_F"""
    length = torch.linalg.matrix_norm(S, keepdim=True)
    return no_norm(S / length.clamp_min(torch.finfo(S.dtype).tiny), rank)


def no_norm(S: Float[Tensor, "*b p q"], rank: int) -> tuple[Float[Tensor, "*b p q"], Float[Tensor, "*b q q"]]:
    """The state as it is, every direction kept.   norm(S) = S I"""
    return S, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand(*S.shape[:-2], -1, -1)


NORMS: dict[str, Callable] = {"svd": svd_norm, "frobenius": frobenius_norm, "none": no_norm}


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer that gets an adapter: its module's name, its transformer block's, and the widths h, i, o."""

    name: str
    block: str
    h: int
    i: int
    o: int


def weight_matrix(module: nn.Module) -> Tensor:
    """A linear layer's weight as W (o x i); GPT-2's Conv1D stores its transpose."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def adapted_layers(lm: nn.Module, config: GeneratorConfig) -> list[AdaptedLayer]:
    """The LM's linear layers whose names end with one of config.targets, in the order of its blocks."""
    found = []
    for name, module in lm.named_modules():
        block = re.match(r".*?\.(\d+)(?=\.)", name)
        if block and name.endswith(config.targets) and (config.blocks is None or int(block[1]) in config.blocks):
            quantised = not module.weight.is_floating_point()  # then the weight's own shape is that of its packing
            o, i = (module.out_features, module.in_features) if quantised else weight_matrix(module).shape
            found.append(AdaptedLayer(name, block[0], lm.config.hidden_size, i, o))
    if not found:
        linear = {re.sub(r".*\.\d+\.", "", name) for name, m in lm.named_modules() if re.search(r"\.\d+\.", name) and hasattr(m, "weight")}
        asked = f"targets {config.targets} in blocks {config.blocks or 'all'} asked"
        raise ValueError(f"{asked}, but {type(lm).__name__} has none; its blocks hold {sorted(linear)}")
    return found


class _LastBlockReached(Exception):
    """Ends a forward pass whose later blocks nobody will look at."""


def block_inputs(lm: nn.Module, layers: list[AdaptedLayer], **inputs: Tensor) -> list[States]:
    """H for every adapted layer: the residual stream as it enters the layer's block (before its norm), in one LM pass."""
    streams: dict[str, Tensor] = {}

    def keep(name, module, args, kwargs):
        streams[name] = (args[0] if args else kwargs["hidden_states"]).detach()
        if name == layers[-1].block:
            raise _LastBlockReached

    with suppress(_LastBlockReached), torch.no_grad(), ExitStack() as hooks:
        for name in dict.fromkeys(layer.block for layer in layers):
            hooks.enter_context(lm.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True))
        lm(**inputs, use_cache=False)
    return [streams[layer.block] for layer in layers]


@torch.no_grad()
def token_embeddings(lm: nn.Module, input_ids: Int[Tensor, "b n"]) -> States:
    """E, every token's own vector in the LM's table, `rms_norm`ed; what the first block of a Llama or a Mistral is given."""
    E = lm.get_input_embeddings()(input_ids)
    return rms_norm(E, torch.ones(E.shape[-1], device=E.device))


@dataclass
class ContextState:
    """All that is kept of a context: S per adapted layer and how many tokens went in; its size never grows (eq. 3). Those of
    separate documents add; subtracting a document's state forgets it, to rounding (parallel encoding)."""

    S: Float[Tensor, "l b p q"]
    tokens: Int[Tensor, " b"]

    def __add__(self, other: "ContextState") -> "ContextState":
        return ContextState(self.S + other.S, self.tokens + other.tokens)

    def __sub__(self, other: "ContextState") -> "ContextState":
        return ContextState(self.S - other.S, self.tokens - other.tokens)

    def __getitem__(self, rows) -> "ContextState":
        return ContextState(self.S[:, rows], self.tokens[rows])


class Adapter:
    """Rank-r factors for every adapted layer, one adapter per batch row:   W_delta = scale * up @ down

    down: name -> (b, r, i) = V_r^T B2,  up: name -> (b, o, r) = A1 U_r: peft's lora_A and lora_B.
    """

    def __init__(self, down: dict[str, Float[Tensor, "b r i"]], up: dict[str, Float[Tensor, "b o r"]], scale: float):
        self.down, self.up, self.scale = down, up, scale
        self._replaced: dict[str, Tensor] = {}

    def __getitem__(self, rows) -> "Adapter":
        """The adapters of some batch rows, also repeated ones: adapter[[0, 0, 1]]."""
        return Adapter({k: v[rows] for k, v in self.down.items()}, {k: v[rows] for k, v in self.up.items()}, self.scale)

    @property
    def batch(self) -> int:
        return len(next(iter(self.down.values())))

    def delta(self, name: str) -> Float[Tensor, "b o i"]:
        """The dense update of one layer.   W_delta = scale * up @ down"""
        return self.scale * self.up[name] @ self.down[name]

    @contextmanager
    def applied_to(self, lm: nn.Module):
        """Within the block, y = W x + scale * up (down x) in every adapted layer; off afterwards, whatever happens inside.

        A batch of k times as many rows as adapters gives each adapter k neighbouring rows; a single one serves them all.
        """
        def add_update(down, up, module, args, y):
            x = args[0]
            if len(x) % len(down):
                raise ValueError(f"{len(down)} adapters for a batch of {len(x)} rows; give one per row (adapter[rows]) or per equal group of rows")
            update = rearrange(x, "(b k) n i -> b (k n) i", b=len(down)) @ down.mT.to(x) @ up.mT.to(x)
            return y + self.scale * rearrange(update, "b (k n) o -> (b k) n o", n=x.shape[1])

        with ExitStack() as hooks:
            for name in self.down:
                hooks.enter_context(lm.get_submodule(name).register_forward_hook(partial(add_update, self.down[name], self.up[name])))
            yield lm

    @torch.no_grad()
    def merge_into(self, lm: nn.Module) -> None:
        """Add W_delta to the LM's weights, so that generation costs nothing extra; `restore` undoes it bit by bit."""
        if any(hasattr(lm.get_submodule(name), "merged_adapter") for name in self.down):
            raise ValueError("an adapter is merged into this LM already; restore it first (to merge two texts, add their states)")
        if self.batch != 1:
            raise ValueError(f"merging needs one adapter, this holds {self.batch}; choose a row first: adapter[[0]]")
        if not all(lm.get_submodule(name).weight.is_floating_point() for name in self.down):
            raise ValueError("merging into quantised weights asked, but they hold packed integers; use applied_to, or load the LM without quantisation")
        for name in self.down:
            W = weight_matrix(lm.get_submodule(name))
            lm.get_submodule(name).merged_adapter, self._replaced[name] = True, W.clone()
            W += self.delta(name)[0].to(W)

    @torch.no_grad()
    def restore(self, lm: nn.Module) -> None:
        """Put back the very weights that `merge_into` replaced."""
        for name, W in self._replaced.items():
            weight_matrix(lm.get_submodule(name)).copy_(W)
            del lm.get_submodule(name).merged_adapter
        self._replaced = {}


class LayerGenerator(nn.Module):
    """The parameters of one adapted layer, in the paper's names. A1 starts at zero: an untrained generator changes nothing."""

    def __init__(self, layer: AdaptedLayer, config: GeneratorConfig):
        super().__init__()
        p, q, by_value, by_key = config.p, config.q, layer.h * (1 + config.embedding), layer.h * (1 + config.previous)
        self.norm = nn.Parameter(torch.ones(layer.h))
        self.A1 = nn.Parameter(torch.zeros(layer.o, p))
        self.A2 = nn.Parameter(torch.randn(p, by_value) / by_value**0.5)
        self.B1 = nn.Parameter(torch.randn(by_key, q) / by_key**0.5)
        self.B2 = nn.Parameter(torch.randn(q, layer.i) / layer.i**0.5)
        self.gate = nn.Parameter(torch.zeros(2 * layer.h)) if config.gate else None


class AdapterGenerator(nn.Module):
    """The trained part: `read` a context into a state, `write` a state out as an adapter."""

    def __init__(self, config: GeneratorConfig, layers: list[AdaptedLayer]):
        super().__init__()
        self.config, self.layers = config, layers
        self.by_layer = nn.ModuleList(LayerGenerator(layer, config) for layer in layers)
        blocks = [int(layer.block.rpartition(".")[2]) for layer in layers]
        if max(blocks) in config.task_blocks:
            raise ValueError(f"task_blocks={config.task_blocks} asked, but tasks are read in a later block and {max(blocks)} is the last; leave it out")
        self.later = {n: next(m for m, b in enumerate(blocks) if b > block) for n, block in enumerate(blocks) if block in config.task_blocks}

    @classmethod
    def for_lm(cls, lm: nn.Module, config: GeneratorConfig = GeneratorConfig()) -> "AdapterGenerator":
        """An untrained generator for this LM."""
        return cls(config, adapted_layers(lm, config))

    def contribution(self, H: list[States], E: States, mask: Mask) -> ContextState:
        """The state that one chunk adds (eq. 3), from its `block_inputs` and its `token_embeddings`."""
        home = self.by_layer[0].norm.device  # an LM that is spread over devices leaves its streams on all of them
        E, mask = E.to(home), mask.to(home)
        H = [rms_norm(h.to(home), g.norm) for h, g in zip(H, self.by_layer, strict=True)]
        S = [outer_products(h, g.A2, g.B1, mask, E, g.gate) for h, g in zip(H, self.by_layer, strict=True)]
        for n, m in self.later.items():
            S[n] = with_task(S[n], H[n], H[m], self.by_layer[n].A2, self.by_layer[n].B1, mask, self.config.task_values)
        return ContextState(torch.stack(S), mask.sum(1))

    def read_chunks(self, lm: nn.Module, input_ids: Int[Tensor, "b n"], attention_mask: Int[Tensor, "b n"] | None = None) -> Iterator[ContextState]:
        """Read a context chunk by chunk and yield what each adds; positions restart in every chunk, padding never enters.

        Each row is cut on its own real tokens, so its state does not depend on its neighbours. parallel: every chunk is read
        by the plain LM; sequential: by the LM with the adapter of the chunks before it.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} differ; give one 0 or 1 per token")
        if not attention_mask.any(1).all():
            raise ValueError("a context without a single token was given; every row needs at least one")
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        chunks = [balanced_chunks(row, self.config.chunk) for row in rows]
        so_far = None
        for t in range(max(map(len, chunks))):
            parts = [row[t] if t < len(row) else row[0][:0] for row in chunks]
            ids, mask = (nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (parts, [torch.ones_like(part).bool() for part in parts]))
            with self.write(so_far).applied_to(lm) if so_far else nullcontext():
                state = self.contribution(block_inputs(lm, self.layers, input_ids=ids), token_embeddings(lm, ids), mask)
            if self.config.encode == "sequential":
                so_far = so_far + state if so_far else state
            yield state
            del state  # not to be held while the next chunk is read

    def read(self, lm: nn.Module, input_ids: Int[Tensor, "b n"], attention_mask: Int[Tensor, "b n"] | None = None) -> ContextState:
        """One pass of the frozen LM over a context, summed into its state (eq. 3); O(1) memory in the length of the stream."""
        return deque(accumulate(self.read_chunks(lm, input_ids, attention_mask)), maxlen=1).pop()  # reduce would also hold the state before

    def write(self, state: ContextState) -> Adapter:
        """The adapter of a state.   W_delta = (alpha / p) A1 norm_r(S) B2, as factors up = A1 U_r and down = V_r^T B2"""
        left, right = NORMS[self.config.norm](state.S, self.config.rank)
        down, up = {}, {}
        for layer, g, U, V in zip(self.layers, self.by_layer, left, right, strict=True):
            up[layer.name] = einsum(g.A1, U, "o p, b p r -> b o r")
            down[layer.name] = einsum(V, g.B2, "b q r, q i -> b r i")
        return Adapter(down, up, self.config.alpha / self.config.p)


def balanced_chunks(row: Int[Tensor, " n"], longest: int) -> list[Int[Tensor, " m"]]:
    """Cut n tokens into ceil(n / longest) chunks of (but for the last) equal size."""
    return list(row.split(-(-len(row) // -(-len(row) // longest))))
