"""The polar norm against the exact one: its error, its gradient, and when it stops looking."""

import pytest
import torch
from hypothesis import example, given
from test_generator import states
from torch.testing import assert_close

from minigen import AdapterGenerator, GeneratorConfig, polar
from minigen.generator import svd_norm
from minigen.polar import leading_triples, polar_norm

SPECTRA = {
    "1/k": lambda k, rank: 1 / k,
    "0.95^k": lambda k, rank: 0.95**k,
    "flat but for a gap at r": lambda k, rank: torch.where(k <= rank, 1.05, 1.0),
    "steep": lambda k, rank: 0.7**k,
    "two scales": lambda k, rank: torch.where(k <= 4, 20.0, 1 / k),
}


def state_of(spectrum: torch.Tensor, p: int, q: int, batch: int = 2) -> torch.Tensor:
    source = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(batch, side, min(p, q), generator=source, dtype=spectrum.dtype)).Q for side in (p, q))
    return (left * spectrum) @ right.mT


def normed(norm, S: torch.Tensor, rank: int) -> torch.Tensor:
    left, right = norm(S, rank)
    return left @ right.mT


def relative_error(S: torch.Tensor, rank: int) -> float:
    found, exact = normed(polar_norm, S, rank), normed(svd_norm, S.double(), rank)
    return ((found - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).max().item()


@pytest.fixture
def precise(monkeypatch):
    """As near to the exact map as fp64 goes, and no damping."""
    monkeypatch.setattr(polar, "TOLERANCE", 1e-12)
    monkeypatch.setattr(polar, "SOLVED", 1e-14)
    monkeypatch.setattr(polar, "DAMPING", 1e-9)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("p", "q", "rank"), [(128, 128, 32), (150, 90, 24), (60, 200, 16)])
def test_the_exact_map_within_its_tolerance(spectrum, p, q, rank):
    k = torch.arange(1.0, min(p, q) + 1)
    assert relative_error(state_of(SPECTRA[spectrum](k, rank), p, q), rank) < 1.5 * polar.TOLERANCE


def test_batches_of_different_spectra_go_together():
    k = torch.arange(1.0, 97)
    S = torch.stack([state_of(spectrum(k, 16), 96, 96) for spectrum in SPECTRA.values()])
    assert S.shape == (len(SPECTRA), 2, 96, 96)
    assert relative_error(S, 16) < 1.5 * polar.TOLERANCE


def test_a_short_context_leaves_the_same_few_directions(random):
    S = random(100, 6) @ random(6, 80)
    left, right = polar_norm(S, 24)
    assert relative_error(S, 24) < polar.TOLERANCE
    assert not left[:, 6:].any() and not right[:, 6:].any()


def test_short_contexts_and_none_beside_long_ones(random):
    S = torch.stack([random(128, 6) @ random(6, 128), state_of(1 / torch.arange(1.0, 129), 128, 128)[0], torch.zeros(128, 128), random(128, 128)])
    left, right = polar_norm(S, 24)
    for n in (0, 1, 3):
        assert relative_error(S[n], 24) < 1.5 * polar.TOLERANCE
        assert_close(left[n] @ right[n].mT, normed(svd_norm, S[n], 24), atol=2e-3, rtol=0)
    assert not left[2].any() and not left[0, :, 6:].any()


@pytest.mark.parametrize(("p", "q", "rank"), [(40, 30, 5), (30, 40, 5), (12, 12, 12), (9, 7, 3)])
def test_gradient_against_finite_differences(p, q, rank, random, precise):
    S = random(p, q, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda S: normed(polar_norm, S, rank), S)


def test_gradient_where_the_search_ends_in_a_small_space(monkeypatch, precise):
    monkeypatch.delattr(torch.linalg, "svd")
    S = state_of(0.5 ** torch.arange(1.0, 51, dtype=torch.float64), 60, 50, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda S: normed(polar_norm, S, 5), S)


def test_the_damped_gradient_is_that_of_the_exact_norm(random):
    S = state_of(0.9 ** torch.arange(1.0, 65), 64, 64).requires_grad_()
    weight = random(2, 64, 64)
    exact, found = (torch.autograd.grad((normed(norm, S, 8) * weight).sum(), S)[0] for norm in (svd_norm, polar_norm))
    assert (found - exact).norm() < 0.01 * exact.norm()


@given(states())
@example((torch.zeros(4, 3), 2))
@example((torch.ones(4, 3), 2))
@example((torch.eye(4), 2))
@example((torch.diag(torch.tensor([3.0, 2.0, 2.0 - 1e-6, 1.0])), 2))
def test_gain_one_and_a_finite_gradient_for_every_state(state):
    S, rank = state
    S = S.clone().requires_grad_()
    N = normed(polar_norm, S, rank)
    gains = torch.linalg.svdvals(N.detach())
    assert ((gains < 1e-3) | ((gains - 1).abs() < 1e-3)).all() and (gains > 0.5).sum() <= rank
    N.sum().backward()
    assert S.grad.isfinite().all()


def count_checks(monkeypatch) -> list:
    checks, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: checks.append(matrix) or eigh(matrix))
    return checks


def test_directions_far_below_the_damping_get_no_louder_gradient_than_from_the_exact_norm():
    spectrum = torch.cat([torch.logspace(0, -4.5, 38), torch.full((26,), 3e-9)])  # as in a trained state of 40 tokens
    S = state_of(spectrum, 64, 64, batch=64).requires_grad_()
    weight = 1e-4 * torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(4))
    gradients = {norm: torch.autograd.grad((normed(norm, S, 32) * weight).sum(), S)[0] for norm in (polar_norm, svd_norm)}
    assert gradients[polar_norm].isfinite().all()
    assert (gradients[polar_norm].norm(dim=(1, 2)) < 3 * gradients[svd_norm].norm(dim=(1, 2))).all()


def test_directions_of_the_state_before_save_the_search(monkeypatch, random):
    S = state_of(0.97 ** torch.arange(1.0, 129), 128, 128)
    _, _, before = leading_triples(S, 32)
    later = S + 3e-5 * random(2, 128, 128)
    checks = count_checks(monkeypatch)
    cold, warm = leading_triples(later, 32), leading_triples(later, 32, start=before)
    of_cold, of_warm = (len(matrix[0]) for matrix in checks)
    assert of_warm < of_cold
    for U, _, V in (cold, warm):
        assert_close(U @ V[..., :32].mT, normed(svd_norm, later, 32), atol=2e-3, rtol=0)


def test_where_no_search_would_end_the_exact_decomposition_decides(monkeypatch, random):
    S = random(100, 100)
    monkeypatch.setattr(polar, "LARGEST", 0.1)
    U, sigma, V = leading_triples(S, 10)
    assert_close(sigma, torch.linalg.svdvals(S), rtol=1e-4, atol=1e-4)
    assert_close(U @ V[..., :10].mT, normed(svd_norm, S, 10), atol=1e-4, rtol=1e-4)


def test_a_generator_writes_the_same_adapter_with_it(llama, tokens):
    torch.manual_seed(0)
    exact = AdapterGenerator.for_lm(llama, GeneratorConfig(p=64, q=48, rank=6))
    near = AdapterGenerator.for_lm(llama, GeneratorConfig(p=64, q=48, rank=6, norm="polar"))
    for layer in exact.by_layer:
        torch.nn.init.normal_(layer.A1)
    near.load_state_dict(exact.state_dict())
    state = exact.read(llama, tokens(2, 50))
    want, got = exact.write(state), near.write(state)
    for layer in exact.layers:
        assert (got.delta(layer.name) - want.delta(layer.name)).norm() < 2e-3 * want.delta(layer.name).norm()
