"""minigen.generator against loops, dense matrices, finite differences and plain calls of the LM."""

import jaxtyping
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from minigen import generator as method
from minigen.generator import (
    AdaptedLayer,
    Adapter,
    AdapterGenerator,
    ContextState,
    GeneratorConfig,
    adapted_layers,
    balanced_chunks,
    block_inputs,
    outer_products,
    rms_norm,
    svd_norm,
    token_embeddings,
    weight_matrix,
    with_task,
)

b, n, h, i, o, p, q, r = 2, 19, 17, 13, 11, 7, 5, 3  # different primes: a mistyped axis cannot fit by accident
CLOSE = dict(atol=1e-4, rtol=1e-4)  # fp32, states up to about 30


def assert_same_state(ours: ContextState, theirs: ContextState):
    assert_close(ours.S, theirs.S, **CLOSE)
    assert ours.tokens.tolist() == theirs.tokens.tolist()


def rank_r(S: Tensor, rank: int) -> Tensor:
    left, right = svd_norm(S, rank)
    return left @ right.mT


# ----------------------------------------------------------------------------------------------- shapes, enforced


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rms_norm(torch.ones(b, n, h), torch.ones(i)),
        lambda: outer_products(torch.ones(b, n, h), torch.ones(p, h), torch.ones(q, h), torch.ones(b, n).bool()),
        lambda: outer_products(torch.ones(b, n, h), torch.ones(p, h), torch.ones(3 * h, q), torch.ones(b, n).bool()),
        lambda: outer_products(torch.ones(b, n, h), torch.ones(p, 3 * h), torch.ones(h, q), torch.ones(b, n).bool(), torch.ones(b, n, h)),
        lambda: ContextState(torch.ones(p, q), torch.ones(b).long()),
        lambda: Adapter({"layer": torch.ones(b, r, i)}, {"layer": torch.ones(b, o, r + 1)}, 1.0),
    ],
)
def test_announced_shapes_are_enforced(wrong):
    with pytest.raises(jaxtyping.TypeCheckError):
        wrong()


# ----------------------------------------------------------------------------------------------- the maths


def test_rms_norm_is_each_token_divided_by_its_root_mean_square(random):
    H, weight = 1e-3 * random(b, n, h), random(h)  # small: eps shows
    expected = torch.stack([weight * token / (token @ token / h + 1e-6).sqrt() for token in H.reshape(b * n, h)]).reshape(b, n, h)
    assert_close(rms_norm(H, weight), expected)
    assert torch.equal(rms_norm(H.bfloat16(), weight), rms_norm(H.bfloat16().float(), weight))


def test_outer_products_is_a_loop_over_real_tokens(random):
    H, A2, B1, mask = random(b, n, h), random(p, h), random(h, q), random(b, n) > 0
    expected = torch.zeros(b, p, q)
    for row in range(b):
        for token in range(n):
            if mask[row, token]:
                expected[row] += torch.outer(A2 @ H[row, token], B1.T @ H[row, token])
    assert_close(outer_products(H, A2, B1, mask), expected, **CLOSE)
    H[~mask] = torch.nan  # padding never enters, whatever the LM made of it
    assert_close(outer_products(H, A2, B1, mask), expected, **CLOSE)


def test_a_key_of_twice_the_height_is_a_loop_over_neighbours(random):
    H, A2, B1 = random(b, n, h), random(p, h), random(2 * h, q)
    lengths = torch.arange(n, n - b, -1)
    expected = torch.zeros(b, p, q)
    for row, length in enumerate(lengths):
        before = torch.zeros(h)
        for token in H[row, :length]:
            expected[row] += torch.outer(A2 @ token, B1[:h].T @ token + B1[h:].T @ before)
            before = token
    assert_close(outer_products(H, A2, B1, torch.arange(n) < lengths[:, None]), expected, **CLOSE)


def test_a_value_of_twice_the_width_is_a_loop_over_states_and_embeddings(random):
    H, E, A2, B1, mask = random(b, n, h), random(b, n, h), random(p, 2 * h), random(h, q), random(b, n) > 0
    expected = torch.zeros(b, p, q)
    for row in range(b):
        for token in range(n):
            if mask[row, token]:
                expected[row] += torch.outer(A2[:, :h] @ H[row, token] + A2[:, h:] @ E[row, token], B1.T @ H[row, token])
    H[~mask] = torch.nan
    assert_close(outer_products(H, A2, B1, mask, E), expected, **CLOSE)


def test_a_gate_says_how_much_of_its_value_a_token_writes(random):
    H, E, A2, B1, mask, w = random(b, n, h), random(b, n, h), random(p, h), random(h, q), random(b, n) > 0, random(2 * h)
    expected = torch.zeros(b, p, q)
    for row in range(b):
        for token in range(n):
            if mask[row, token]:
                share = 1 / (1 + (-(w[:h] @ H[row, token] + w[h:] @ E[row, token])).exp())
                expected[row] += share * torch.outer(A2 @ H[row, token], B1.T @ H[row, token])
    H[~mask] = torch.nan
    assert_close(outer_products(H, A2, B1, mask, E, w), expected, **CLOSE)
    assert_close(outer_products(H, A2, B1, mask, E, torch.zeros(2 * h)), outer_products(H, A2, B1, mask) / 2)


@pytest.mark.parametrize("keys", [h, 2 * h])
def test_tasks_are_apart_and_a_loop_over_states_of_a_later_block(random, keys):
    H, later, A2, B1, mask, values = random(b, n, h), random(b, n, h), random(p, 2 * h), random(keys, q), random(b, n) > 0, 3
    S = outer_products(H, A2, B1, mask, random(b, n, h))
    expected = torch.zeros(b, p, q)
    expected[:, :-values, :-1] = S[:, :-values, :-1]
    for row in range(b):
        for token in range(n):
            if mask[row, token]:
                seen = H[row, token] if keys == h else torch.cat([H[row, token], H[row, token - 1] * bool(token and mask[row, token - 1])])
                expected[row, -values:, -1] += torch.sigmoid(seen @ B1[:, -1]) * A2[-values:, :h] @ later[row, token]
    H[~mask] = torch.nan
    assert_close(with_task(S, H, later, A2, B1, mask, values), expected, **CLOSE)


@pytest.mark.parametrize("targets", [("self_attn.o_proj",), ("self_attn.o_proj", "mlp.down_proj")])
def test_a_task_is_read_where_the_next_adapted_block_begins(llama, generator_for, tokens, targets):
    plain, apart = (generator_for(llama, targets=targets, blocks=(0, 2), chunk=32, task_values=5, **more) for more in ({}, {"task_blocks": (0,)}))
    ids, own = tokens(b, n), len(targets)
    H = [rms_norm(each, g.norm) for each, g in zip(block_inputs(llama, apart.layers, input_ids=ids), apart.by_layer, strict=True)]
    S = plain.read(llama, ids).S
    for layer, g in enumerate(apart.by_layer[:own]):
        S[layer] = with_task(S[layer], H[layer], H[own], g.A2, g.B1, torch.ones(b, n, dtype=torch.bool), 5)
    assert_same_state(apart.read(llama, ids), ContextState(S, torch.full((b,), n)))


@pytest.mark.parametrize("norm", method.NORMS)
def test_write_is_the_dense_formula(norm, random):
    layers = [AdaptedLayer("first", "0", h, i, o), AdaptedLayer("second", "1", h, o, i)]
    generator = AdapterGenerator(GeneratorConfig(p=p, q=q, rank=r, alpha=21.0, norm=norm), layers).requires_grad_(False)
    state = ContextState(random(2, b, p, q), torch.full((b,), n))
    for g in generator.by_layer:
        g.A1.copy_(random(*g.A1.shape))
    adapter = generator.write(state)
    for g, layer, S_layer in zip(generator.by_layer, layers, state.S, strict=True):
        for row, S in enumerate(S_layer):
            U, _, Vh = torch.linalg.svd(S, full_matrices=False)
            normed = {"svd": U[:, :r] @ Vh[:r], "polar": U[:, :r] @ Vh[:r], "frobenius": S / S.square().sum().sqrt(), "none": S}[norm]
            assert_close(adapter.delta(layer.name)[row], 21.0 / p * g.A1 @ normed @ g.B2, **CLOSE)
            if norm in ("svd", "polar"):
                assert torch.linalg.matrix_rank(adapter.delta(layer.name)[row]) == r


# ----------------------------------------------------------------------------------- null directions and the gradient


def test_fewer_tokens_than_rank_leave_no_noise_in_the_adapter(llama, generator_for, tokens, random):
    count, generator = 3, generator_for(llama, rank=8)
    state = generator.read(llama, tokens(1, count))
    noise = 1e-7 * state.S.abs().max() * random(*state.S.shape)  # as of another machine's rounding
    adapter, again = generator.write(state), generator.write(ContextState(state.S + noise, state.tokens))
    for layer in generator.layers:
        assert torch.linalg.matrix_rank(adapter.delta(layer.name)[0], rtol=1e-4) == count
        assert_close(again.delta(layer.name), adapter.delta(layer.name), **CLOSE)


@pytest.mark.parametrize(("p", "q", "rank"), [(7, 5, 3), (5, 7, 3), (7, 5, 5), (5, 7, 5), (5, 5, 5), (5, 5, 4), (5, 5, 1)])
def test_gradient_of_svd_norm_against_finite_differences(p, q, rank, random, monkeypatch):
    S, weight = random(b, p, q, dtype=torch.float64).requires_grad_(), random(b, p, q, dtype=torch.float64)

    def gradient():
        return torch.autograd.grad((rank_r(S, rank) * weight).sum(), S)[0]

    damped = gradient()
    monkeypatch.setattr(method, "DAMPING", 1e-9)
    assert torch.autograd.gradcheck(lambda S: rank_r(S, rank), S)
    exact = gradient()
    assert (damped - exact).norm() < 0.01 * exact.norm()


@st.composite
def states(draw) -> tuple[Tensor, int]:
    """Some S with the spectrum that hypothesis likes, among them rank-deficient, degenerate and tiny ones, and a rank."""
    p, q = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    values = st.sampled_from([0.0, 1e-7, 1e-3, 0.999, 1.0]) | st.floats(0, 1, width=32)
    spectrum = torch.tensor(draw(st.lists(values, min_size=min(p, q), max_size=min(p, q))))
    source = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    left, right = (torch.linalg.qr(torch.randn(side, min(p, q), generator=source))[0] for side in (p, q))
    return draw(st.sampled_from([1e-6, 1.0, 1e4])) * left * spectrum @ right.mT, draw(st.integers(1, min(p, q)))


@given(states())
@example((torch.zeros(4, 3), 2))
@example((torch.ones(4, 3), 2))
@example((torch.eye(4), 4))
@example((torch.eye(4), 2))
@example((torch.diag(torch.tensor([3.0, 2.0, 2.0 - 1e-6, 1.0])), 2))
@example((torch.diag(torch.tensor([3.0, 1.0, 1.0 - 1e-3, 0.0])), 2))
def test_gain_one_and_a_bounded_gradient_for_every_state(state):
    S, rank = state
    S = S.clone().requires_grad_()
    normed = rank_r(S, rank)
    gains = torch.linalg.svdvals(normed.detach())
    assert ((gains < 1e-3) | ((gains - 1).abs() < 1e-3)).all() and (gains > 0.5).sum() <= rank
    normed.sum().backward()
    length = torch.linalg.matrix_norm
    assert length(S.grad) * length(S.detach(), 2) <= length(torch.ones_like(S)) / method.DAMPING


@pytest.mark.parametrize("norm", ["svd", "frobenius"])
def test_a_state_of_zeros_stays_zero_with_a_finite_gradient(norm):
    S = torch.zeros(b, p, q, requires_grad=True)
    left, right = method.NORMS[norm](S, r)
    assert not (left @ right.mT).any()
    (left @ right.mT).sum().backward()
    assert S.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------- reading


def test_block_inputs_are_the_hidden_states_of_a_plain_call(any_lm, tokens):
    ids = tokens(b, n)
    layers = adapted_layers(any_lm, GeneratorConfig(p=16, q=12, rank=4))
    expected = any_lm(ids, output_hidden_states=True).hidden_states[:-1]
    for ours, theirs in zip(block_inputs(any_lm, layers, input_ids=ids), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_token_embeddings_are_normed_rows_of_the_table(any_lm, tokens):
    ids = tokens(b, n)
    E = token_embeddings(any_lm, ids)
    table = any_lm.get_input_embeddings().weight
    for row, place in ((0, 0), (1, 7), (b - 1, n - 1)):
        own = table[ids[row, place]]
        assert_close(E[row, place], own / (own.square().mean() + 1e-6).sqrt())
    assert not token_embeddings(any_lm.requires_grad_(), ids).requires_grad


def test_only_the_asked_blocks_are_read(llama, tokens):
    ids = tokens(b, n)
    (layer,) = adapted_layers(llama, GeneratorConfig(targets=("mlp.down_proj",), blocks=(1,)))
    assert (layer.name, layer.h, layer.i, layer.o) == ("model.layers.1.mlp.down_proj", 32, 40, 32)
    expected = llama(ids, output_hidden_states=True).hidden_states[1]
    llama.model.layers[2].register_forward_pre_hook(lambda module, args: pytest.fail("a later block ran"))
    (H,) = block_inputs(llama.requires_grad_(), [layer], input_ids=ids)
    assert torch.equal(H, expected) and not H.requires_grad


@pytest.mark.parametrize("encode", ["parallel", "sequential"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("ours", [False, True])
def test_a_padded_row_equals_itself_read_alone(any_lm, generator_for, tokens, encode, side, ours):
    generator = generator_for(any_lm, encode=encode, previous=ours, embedding=ours, gate=ours)
    rows = [tokens(1, count) for count in (19, 11, 3)]  # 3, 2 and 1 chunks
    ids, mask = tokens(3, 23), torch.zeros(3, 23, dtype=torch.long)
    for k, row in enumerate(rows):
        spare = 23 - row.shape[1]
        start = {"left": spare, "right": 0, "both": spare // 2}[side]
        ids[k, start : start + row.shape[1]], mask[k, start : start + row.shape[1]] = row[0], 1
    together = generator.read(any_lm, ids, mask)
    for k, row in enumerate(rows):
        assert_same_state(together[[k]], generator.read(any_lm, row))


@given(st.integers(1, 200), st.integers(1, 50))
@example(21, 10)
def test_chunks_are_balanced(length, longest):
    row = torch.arange(length)
    chunks = balanced_chunks(row, longest)
    sizes = [len(chunk) for chunk in chunks]
    assert torch.equal(torch.cat(chunks), row) and max(sizes) <= longest
    assert set(sizes[:-1]) <= {sizes[0]} and 0 < sizes[-1] <= sizes[0]
    assert sizes[0] == -(-length // -(-length // longest))


@pytest.mark.parametrize("ours", [False, True])
def test_a_stream_is_the_sum_of_its_chunks(any_lm, generator_for, tokens, ours):
    generator, ids = generator_for(any_lm, chunk=8, previous=ours, embedding=ours, gate=ours), tokens(b, 24)
    stream = generator.read(any_lm, ids)
    parts = [generator.read(any_lm, part) for part in ids.split(8, dim=1)]
    assert_same_state(stream, parts[0] + parts[1] + parts[2])
    assert_same_state(stream - parts[1], parts[0] + parts[2])
    assert stream.S.shape == parts[0].S.shape == (3, b, 16, 12)


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("encode", ["parallel", "sequential"])
def test_reading_is_a_plain_loop(any_lm, generator_for, tokens, encode, gate, embedding, previous):
    generator, ids = generator_for(any_lm, encode=encode, chunk=8, previous=previous, embedding=embedding, gate=gate), tokens(1, 22)
    W = {layer.name: weight_matrix(any_lm.get_submodule(layer.name)) for layer in generator.layers}
    plain = {name: weight.clone() for name, weight in W.items()}
    S = torch.zeros(3, 1, 16, 12)
    for chunk in (ids[:, :8], ids[:, 8:16], ids[:, 16:]):
        streams = any_lm(chunk, output_hidden_states=True).hidden_states
        for k, (layer, g) in enumerate(zip(generator.layers, generator.by_layer, strict=True)):
            H = rms_norm(streams[k], g.norm)
            seen = torch.cat([H, torch.cat([torch.zeros_like(H[:, :1]), H[:, :-1]], dim=1)], dim=2) if previous else H
            E = any_lm.get_input_embeddings()(chunk)
            both = torch.cat([H, rms_norm(E, torch.ones(E.shape[-1]))], dim=2)
            share = torch.sigmoid(both @ g.gate)[..., None] if gate else 1
            S[k] += (share * ((both if embedding else H) @ g.A2.T)).mT @ (seen @ g.B1)
            if encode == "sequential":
                U, _, Vh = torch.linalg.svd(S[k, 0])
                W[layer.name].copy_(plain[layer.name] + 16.0 / 16 * g.A1 @ U[:, :4] @ Vh[:4] @ g.B2)
    for name, weight in plain.items():
        W[name].copy_(weight)
    assert_same_state(generator.read(any_lm, ids), ContextState(S, torch.tensor([22])))


# ----------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapted(any_lm, generator_for, tokens):
    """An LM of each family, two contexts' adapters for it, a query, and the plain logits."""
    generator = generator_for(any_lm)
    query = tokens(b, 6)
    return any_lm, generator.write(generator.read(any_lm, tokens(b, n))), query, any_lm(query).logits


def test_hook_equals_merged_weights_equals_dense_delta(adapted):
    lm, adapter, query, plain = adapted
    one = adapter[[0]]
    with one.applied_to(lm):
        hooked = lm(query).logits
    assert (hooked - plain).abs().max() > 0.1

    W = {name: weight_matrix(lm.get_submodule(name)) for name in one.down}
    before = {name: weight.clone() for name, weight in W.items()}
    one.merge_into(lm)
    assert_close(lm(query).logits, hooked, **CLOSE)
    for name in W:
        assert_close(W[name], before[name] + one.scale * one.up[name][0] @ one.down[name][0])
        assert_close(W[name], before[name] + one.delta(name)[0])
    one.restore(lm)
    assert all(torch.equal(W[name], before[name]) for name in W)
    assert torch.equal(lm(query).logits, plain)


def test_off_after_the_block_even_when_it_raises(adapted):
    lm, adapter, query, plain = adapted
    with adapter.applied_to(lm):
        assert not torch.equal(lm(query).logits, plain)
    assert torch.equal(lm(query).logits, plain)
    with pytest.raises(KeyError), adapter.applied_to(lm):
        raise KeyError
    assert torch.equal(lm(query).logits, plain)


@pytest.mark.parametrize("rows", [[0, 1], [1, 0], [0, 0, 1]])
def test_every_batch_row_has_its_own_adapter(adapted, rows):
    lm, adapter, query, _ = adapted
    with adapter[rows].applied_to(lm):
        together = lm(query[rows]).logits
    for k, row in enumerate(rows):
        with adapter[[row]].applied_to(lm):
            assert_close(together[[k]], lm(query[[row]]).logits, **CLOSE)


def test_an_adapter_serves_its_group_of_rows(adapted):
    lm, adapter, query, _ = adapted
    with adapter.applied_to(lm):
        grouped = lm(query[[0, 1, 1, 0]]).logits
    with adapter[[0, 0, 1, 1]].applied_to(lm):
        assert_close(grouped, lm(query[[0, 1, 1, 0]]).logits, **CLOSE)


def test_an_untrained_generator_changes_nothing(any_lm, tokens):
    generator, query = AdapterGenerator.for_lm(any_lm, GeneratorConfig(p=16, q=12, rank=4)), tokens(b, 6)
    plain = any_lm(query).logits
    with generator.write(generator.read(any_lm, tokens(b, n))).applied_to(any_lm):
        assert torch.equal(any_lm(query).logits, plain)


def test_gradient_reaches_every_parameter_of_a_trained_generator(any_lm, generator_for, tokens):
    generator = generator_for(any_lm, encode="sequential").requires_grad_()
    with generator.write(generator.read(any_lm, tokens(b, n))).applied_to(any_lm):
        any_lm(tokens(b, 6)).logits.square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


class Packed(torch.nn.Module):
    """A linear layer whose weight is stored as bytes in a shape of its own, as quantised ones are."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.linear = linear.in_features, linear.out_features, [linear]
        self.weight = torch.nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return self.linear[0](x)


def test_a_quantised_lm_is_read_and_adapted_but_never_merged_into(tiny_lm, generator_for, tokens):
    plain, packed = tiny_lm("llama"), tiny_lm("llama")
    for block in packed.model.layers:
        block.self_attn.o_proj = Packed(block.self_attn.o_proj)
    context, query, said = tokens(1, n), tokens(1, 6), []
    for lm in (plain, packed):
        generator = generator_for(lm)
        adapter = generator.write(generator.read(lm, context))
        with adapter.applied_to(lm):
            said.append(lm(query).logits)
    assert torch.equal(*said)
    with pytest.raises(ValueError, match=r"merging into quantised weights asked.*use applied_to"):
        adapter.merge_into(packed)


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "nuclear"}, "'nuclear' asked.*frobenius.*none.*svd"),
        ({"encode": "backwards"}, "'backwards' asked.*parallel.*sequential"),
        ({"p": 16, "q": 12, "rank": 13}, "rank=13 asked of a 16 x 12 state; choose 1 to 12"),
        ({"rank": 0}, "rank=0 asked"),
        ({"targets": ("nothing",)}, "'nothing'.*LlamaForCausalLM.*self_attn.o_proj"),
        ({"blocks": (9,)}, r"blocks \(9,\)"),
        ({"task_blocks": (0, 2)}, r"task_blocks=\(0, 2\) asked, but tasks are read in a later block and 2 is the last; leave it out"),
        ({"task_blocks": (0,), "task_values": 128}, "task_values=128 asked of 128 values; choose 1 to 127"),
    ],
)
def test_settings_that_cannot_work_say_why(settings, message, llama):
    with pytest.raises(ValueError, match=message):
        AdapterGenerator.for_lm(llama, GeneratorConfig(**settings))


def test_a_context_needs_tokens_and_a_mask_of_its_own_shape(llama, generator_for, tokens, monkeypatch):
    generator, ids = generator_for(llama), tokens(b, n)
    empty_row = torch.tensor([[1] * n, [0] * n])
    with pytest.raises(ValueError, match="every row needs at least one"):
        generator.read(llama, ids, empty_row)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(ValueError, match=r"\(2, 19\).*\(2, 18\) differ"):
        generator.read(llama, ids, torch.ones(b, n - 1, dtype=torch.long))


def test_adapters_that_do_not_fit_say_why(llama, generator_for, tokens):
    generator = generator_for(llama)
    adapter = generator.write(generator.read(llama, tokens(b, n)))
    with pytest.raises(ValueError, match="2 adapters for a batch of 3 rows"), adapter.applied_to(llama):
        llama(tokens(3, 6))
    with pytest.raises(ValueError, match="merging needs one adapter, this holds 2"):
        adapter.merge_into(llama)
    one = adapter[[0]]
    one.merge_into(llama)
    for second in (one, adapter[[1]]):  # a second merge, out of order, could not be undone bit by bit
        with pytest.raises(ValueError, match="merged into this LM already"):
            second.merge_into(llama)
    one.restore(llama)
    one.merge_into(llama)
