"""norm="polar": the map of norm="svd" from the leading directions alone, by matrix products on a block of them.

A full decomposition of a 1024 x 1024 state finds 1,024 directions, of which 128 are kept. Here a block of somewhat more than r
directions is turned towards the leading ones, and what still separates it from them is measured, not assumed.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .generator import DAMPING, NORMS, NULL_DIRECTION

TOLERANCE = 1e-3  # of U_r V_r^T, relative to its length
LOUDEST = 1e9  # how much louder than the r-th direction a filter may make the first, so that fp32 keeps hold of the r-th
DEGREE, MOST_PRODUCTS = 16, 80  # of one filter; of a whole search, after which the exact decomposition decides
SOLVER_STEPS, SOLVED = 30, 1e-4  # conjugate gradients: at most so many steps, or until so little is left of the right-hand side


def leading_triples(
    S: Float[Tensor, "*b p q"], rank: int, start: Float[Tensor, "*b q s"] | None = None
) -> tuple[Float[Tensor, "*b p r"], Float[Tensor, "*b r"], Float[Tensor, "*b q r"]]:
    """The r leading singular triples of S, so near that U V^T is right to TOLERANCE.   S v_k = sigma_k u_k

    Subspace iteration on S^T S with a block of l = r + max(16, r / 2) columns (Halko et al. 2011). A check finds the triples within the
    block (Rayleigh and Ritz, in fp64) and what they miss, z_k = S^T S v_k - sigma_k^2 v_k: direction k is off by at most
    |z_k| / (sigma_k^2 - sigma_l^2) (Davis and Kahan 1970). Between two checks the block goes through the Chebyshev polynomial of S^T S
    that is at most one on [0, sigma_l^2] and grows fastest beyond (Saad 2011), of the degree that this error asks for.

    start: directions near the leading ones, as those of the state before in a stream; else random ones, the same in every call.
    Where the spectrum has so little of a gap that MOST_PRODUCTS do not suffice, torch.linalg.svd decides, as in norm="svd".
    """
    q, tiny = S.shape[-1], torch.finfo(S.dtype).tiny
    width = min(q, rank + max(16, rank // 2))
    block = torch.randn(q, width, generator=torch.Generator().manual_seed(0)).to(S).expand(*S.shape[:-2], q, width)
    block = S.mT @ (S @ block) if start is None else torch.cat([start[..., :width], block[..., start.shape[-1] :]], dim=-1)
    products = 2
    while products < MOST_PRODUCTS:
        V = torch.linalg.qr(block).Q
        images = S @ V
        squares, turn = torch.linalg.eigh(images.mT.double() @ images.double())
        squares, turn = squares.flip(-1).clamp_min(0.0).to(S), turn.flip(-1).to(S)
        V, images = V @ turn, images @ turn
        further = S.mT @ images
        products += 2
        first, last, cut = squares[..., :1], squares[..., rank - 1 : rank], squares[..., -1:]
        real = squares > NULL_DIRECTION**2 * first
        missed = (further - V * squares[..., None, :]).norm(dim=-2)
        off = torch.where(real, missed / (squares - cut).clamp_min(tiny), 0.0)[..., :rank]
        error = off.square().mean(-1, keepdim=True).sqrt()
        found = error < TOLERANCE
        if width == q or found.all():
            sigma = squares[..., :rank].sqrt()
            return images[..., :rank] / sigma.clamp_min(tiny)[..., None, :], sigma, V[..., :rank]
        cut = torch.where(found, first, torch.maximum(cut, NULL_DIRECTION**2 * first)).clamp_min(tiny)
        growth = torch.acosh((2 * last / cut - 1).clamp_min(1.0))  # of the filter at sigma_r, its logarithm a degree
        loudness = torch.acosh((2 * first / cut - 1).clamp_min(1.0)) - growth  # of the first direction over it, likewise
        wanted = torch.where(found, 0.0, torch.log(4 * error / TOLERANCE) / growth).max()
        degree = max(1, math.floor(min(wanted + 1, math.log(LOUDEST) / loudness.max(), DEGREE)))
        block = torch.where(found[..., None], V, chebyshev(S, V, further, cut[..., None], degree))
        products += 2 * (degree - 1)
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    return U[..., :rank], sigma[..., :rank], Vh.mT[..., :rank]


def chebyshev(
    S: Float[Tensor, "*b p q"], V: Float[Tensor, "*b q l"], further: Float[Tensor, "*b q l"], cut: Float[Tensor, "*b 1 1"], degree: int
) -> Float[Tensor, "*b q l"]:
    """T_degree(2 S^T S / cut - 1) V, its columns scaled to length one; `further` is S^T S V.   T_n+1 = 2 x T_n - T_n-1"""
    before, now = V, 2 * further / cut - V
    for _ in range(degree - 1):
        before, now = now, 2 * (2 * (S.mT @ (S @ now)) / cut - now) - before
    return now / now.norm(dim=-2, keepdim=True)


class PolarFactor(torch.autograd.Function):
    """The same map and differential as LeadingDirections (see there), from the kept triples alone:  S -> U_r, V_r.

    The terms between a kept direction k and all dropped ones are the solution of a linear system, and so need no dropped direction:

        [ sigma_k I   -S_d ] [x_k]   [g_k]      g_k = (I - U U^T) dL/dU_k,   h_k = (I - V V^T) dL/dV_k
        [ -S_d^T  sigma_k I ] [y_k] = [h_k]      S_d = S - U diag(sigma) V^T

    solved for y_k by conjugate gradients on sigma_k^2 I - S_d^T S_d, which DAMPING^2 sigma_1^2 keeps positive where the gap at the cut
    closes; x_k is then (g_k + S_d y_k) / sigma_k, with 1 / sigma_k damped alike. So the gradient is that of norm="svd" where sigma_k and
    its gap are far above DAMPING sigma_1, and finite, but another one, where they are not.
    dL/dS = U A V^T + X V^T + U Y^T,   A_ij = (P_ij - P_ji) / (sigma_i + sigma_j),   P = U^T dL/dU
    """

    @staticmethod
    def forward(ctx, S: Float[Tensor, "*b p q"], rank: int):
        U, sigma, V = leading_triples(S, rank)
        kept = (sigma > NULL_DIRECTION * sigma[..., :1])[..., None, :]
        U, V = U * kept, V * kept
        ctx.save_for_backward(S, U, sigma, V, kept)
        return U, V

    @staticmethod
    def backward(ctx, grad_left: Float[Tensor, "*b p r"], grad_right: Float[Tensor, "*b q r"]):
        S, U, sigma, V, kept = ctx.saved_tensors
        unit = sigma[..., None, :1].clamp_min(torch.finfo(S.dtype).tiny)
        s = torch.where(kept, sigma[..., None, :] / unit, 1.0)  # all in units of sigma_1, null directions out of the way
        S, grad_left, grad_right = S / unit, grad_left * kept, grad_right * kept
        P = U.mT @ grad_left
        sums = s + s.mT
        among_kept = (P - P.mT) * sums / (sums.square() + DAMPING**2)
        g, h = grad_left - U @ P, grad_right - V @ (V.mT @ grad_right)

        def dropped(y: Tensor) -> Tensor:
            return y - V @ (V.mT @ y)

        Y = conjugate_gradients(lambda y: (s.square() + DAMPING**2) * y - dropped(S.mT @ (S @ y)), dropped(s * h + S.mT @ g))
        X = (g + S @ Y) * s / (s.square() + DAMPING**2) * kept
        return (U @ among_kept @ V.mT + X @ V.mT + U @ Y.mT) / unit, None


def conjugate_gradients(A: Callable[[Tensor], Tensor], right: Float[Tensor, "*b q r"]) -> Float[Tensor, "*b q r"]:
    """x of A x = right for every column by itself, A positive definite (Hestenes and Stiefel 1952); a column that is solved stays as it is."""
    x, residual = torch.zeros_like(right), right
    direction, tiny = residual, torch.finfo(right.dtype).tiny
    square = start = residual.square().sum(-2, keepdim=True)
    for _ in range(SOLVER_STEPS):
        unsolved = square > SOLVED**2 * start
        if not unsolved.any():
            break
        image = A(direction)
        curvature = (direction * image).sum(-2, keepdim=True)
        step = torch.where(unsolved & (curvature > 0), square / curvature.clamp_min(tiny), 0.0)  # below rounding it need not be positive
        x, residual = x + step * direction, residual - step * image
        before, square = square, residual.square().sum(-2, keepdim=True)
        direction = residual + square / before.clamp_min(tiny) * direction
    return x


def polar_norm(S: Float[Tensor, "*b p q"], rank: int) -> tuple[Float[Tensor, "*b p r"], Float[Tensor, "*b q r"]]:
    """SVDnorm for large states: to TOLERANCE what `svd_norm` gives.   norm_r(S) = U_r V_r^T, null directions zero"""
    return PolarFactor.apply(S, rank)


NORMS["polar"] = polar_norm
