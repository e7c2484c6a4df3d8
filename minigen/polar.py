"""norm="polar": the map of norm="svd" from the leading directions alone, found in a small Krylov space.

A full decomposition of a 1024 x 1024 state finds 1,024 directions, of which 128 are kept. Here the kept ones are looked for among two or
three times as many, to which products with the state lead, and how far they still are from the true ones is measured, not assumed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .generator import DAMPING, NORMS, NULL_DIRECTION

TOLERANCE = 1e-3  # of U_r V_r^T, relative to its length
LARGEST = 0.75  # a Krylov space, as a share of all directions; beyond it the exact decomposition is cheaper
SOLVER_STEPS, SOLVED = 30, 1e-4  # conjugate gradients: at most so many steps, or until so little is left of the right-hand side


def leading_triples(
    S: Float[Tensor, "*b p q"], rank: int, start: Float[Tensor, "*b q s"] | None = None
) -> tuple[Float[Tensor, "*b p r"], Float[Tensor, "*b k"], Float[Tensor, "*b q k"]]:
    """The r leading singular triples of S, so near that U V^T is right to TOLERANCE.   S v_k = sigma_k u_k

    Block Lanczos on S^T S with every block made orthogonal to all before it (Golub, Luk and Overton 1981; Musco and Musco 2015): the space
    K = span(X, S^T S X, (S^T S)^2 X, ...) of a few random columns X grows a block at a time. From 5/2 r directions on, and whenever it has
    r / 2 more, a check finds the triples within it (Rayleigh and Ritz, in fp64) and what they miss, z_k = S^T S v_k - sigma_k^2 v_k: both
    v_k and u_k are off by about |z_k| / (sigma_k^2 - cut), cut the largest of S^T S outside K (Davis and Kahan 1970), for which the middle
    one of its values beyond r in K is taken.

    start: directions near the leading ones, as those of the state before in a stream, to begin with.
    Of sigma and V also those beyond r come back that K holds; they are not to any tolerance.
    Where K would have to be larger than LARGEST allows, torch.linalg.svd decides, as in norm="svd".
    """
    q, most, tiny = S.shape[-1], LARGEST * min(S.shape[-2:]), torch.finfo(S.dtype).tiny
    width = max(8, rank // 4)
    block = torch.randn(q, width, generator=torch.Generator().manual_seed(0)).to(S).expand(*S.shape[:-2], q, width)
    block = S.mT @ (S @ block) if start is None else torch.cat([start[..., :rank], block], dim=-1)
    enough = 5 * rank // 2 if start is None else rank + 1
    basis, images = block[..., :0], S[..., :0]
    while max(enough, basis.shape[-1] + block.shape[-1]) <= most:
        block = torch.linalg.qr(block).Q
        block = torch.linalg.qr(outside(basis, block)).Q  # again, for where little was new the first time left too much of the space
        basis, images = torch.cat([basis, block], dim=-1), torch.cat([images, S @ block], dim=-1)
        size, new = basis.shape[-1], block.shape[-1]
        block = outside(basis, S.mT @ images[..., -new:])
        if size < enough:
            continue
        squares, turn = torch.linalg.eigh(images.double().mT @ images.double())
        squares, turn = squares.flip(-1).clamp_min(0.0).to(S), turn.flip(-1).to(S)
        real, cut = squares[..., :rank] > NULL_DIRECTION**2 * squares[..., :1], squares[..., (rank + size) // 2 :][..., :1]
        missed = (block @ turn[..., -new:, :rank]).norm(dim=-2)
        off = torch.where(real, missed / (squares[..., :rank] - cut).clamp_min(tiny), 0.0)
        if (2 * off.square().mean(-1) < TOLERANCE**2).all():
            sigma = squares.sqrt()
            return images @ turn[..., :rank] / sigma[..., None, :rank].clamp_min(tiny), sigma, basis @ turn
        enough = size + rank // 2
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    return U[..., :rank], sigma, Vh.mT


def outside(basis: Float[Tensor, "*b q k"], X: Float[Tensor, "*b q m"]) -> Float[Tensor, "*b q m"]:
    """What of X is orthogonal to the basis.   (I - B B^T) X"""
    return X - basis @ (basis.mT @ X)


class PolarFactor(torch.autograd.Function):
    """The same map and differential as LeadingDirections (see there), from the kept triples:  S -> U_r, V_r.

    The terms between a kept direction k and all dropped ones are the solution of a linear system, and so need no list of the dropped ones:

        [ sigma_k I   -S_d ] [x_k]   [g_k]      g_k = (I - U U^T) dL/dU_k,   h_k = (I - V V^T) dL/dV_k
        [ -S_d^T  sigma_k I ] [y_k] = [h_k]      S_d = S - U diag(sigma) V^T

    solved for y_k by conjugate gradients on sigma_k^2 I - S_d^T S_d, which DAMPING^2 sigma_1^2 keeps positive where the gap at the cut
    closes. It is all but diagonal in the directions beyond r that the search met, so solving it there beforehand (deflation: Nicolaides
    1987) leaves few steps. x_k is then (g_k + S_d y_k) / sigma_k, with 1 / sigma_k damped alike. So the gradient is that of norm="svd"
    where sigma_k and its gap are far above DAMPING sigma_1, and finite, but another one, where they are not.
    dL/dS = U A V^T + X V^T + U Y^T,   A_ij = (P_ij - P_ji) / (sigma_i + sigma_j),   P = U^T dL/dU
    """

    @staticmethod
    def forward(ctx, S: Float[Tensor, "*b p q"], rank: int):
        U, sigma, V = leading_triples(S, rank)
        kept = (sigma[..., :rank] > NULL_DIRECTION * sigma[..., :1])[..., None, :]
        ctx.save_for_backward(S, U * kept, sigma, V, kept)
        return U * kept, V[..., :rank] * kept

    @staticmethod
    def backward(ctx, grad_left: Float[Tensor, "*b p r"], grad_right: Float[Tensor, "*b q r"]):
        S, U, sigma, V, kept = ctx.saved_tensors
        rank, unit = U.shape[-1], sigma[..., None, :1].clamp_min(torch.finfo(S.dtype).tiny)
        sigma, V, beyond = sigma[..., None, :] / unit, V[..., :rank] * kept, V[..., rank:]  # all in units of sigma_1
        s = torch.where(kept, sigma[..., :rank], 1.0)  # null directions out of the way
        S, grad_left, grad_right = S / unit, grad_left * kept, grad_right * kept
        P = U.mT @ grad_left
        sums = s + s.mT
        among_kept = (P - P.mT) * sums / (sums.square() + DAMPING**2)
        g, h = grad_left - U @ P, grad_right - V @ (V.mT @ grad_right)

        def dropped(y: Tensor) -> Tensor:
            return y - V @ (V.mT @ y)

        damped = s.square() + DAMPING**2
        further = 1 / (damped - sigma[..., rank:].square().mT) - 1 / damped
        Y = conjugate_gradients(
            A=lambda y: damped * y - dropped(S.mT @ (S @ y)),
            right=dropped(s * h + S.mT @ g),
            solved=lambda y: y / damped + beyond @ (further * (beyond.mT @ y)),
        )
        X = (g + S @ Y) * s / damped * kept
        return (U @ among_kept @ V.mT + X @ V.mT + U @ Y.mT) / unit, None


def conjugate_gradients(
    A: Callable[[Tensor], Tensor], right: Float[Tensor, "*b q r"], solved: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*b q r"]:
    """x of A x = right for every column by itself, A positive definite (Hestenes and Stiefel 1952); a column that is solved stays as it is.

    solved: about A^-1 of a residual, positive definite too, so that the fewer steps are left the nearer it is.
    """
    x, residual = torch.zeros_like(right), right
    tiny, most = torch.finfo(right.dtype).tiny, SOLVED**2 * right.square().sum(-2, keepdim=True)
    direction = near = solved(residual)
    square = (residual * near).sum(-2, keepdim=True)
    for _ in range(SOLVER_STEPS):
        unsolved = residual.square().sum(-2, keepdim=True) > most
        if not unsolved.any():
            break
        image = A(direction)
        curvature = (direction * image).sum(-2, keepdim=True)
        step = torch.where(unsolved & (curvature > 0), square / curvature.clamp_min(tiny), 0.0)  # below rounding it need not be positive
        x, residual = x + step * direction, residual - step * image
        near = solved(residual)
        before, square = square, (residual * near).sum(-2, keepdim=True)
        direction = near + square / before.clamp_min(tiny) * direction
    return x


def polar_norm(S: Float[Tensor, "*b p q"], rank: int) -> tuple[Float[Tensor, "*b p r"], Float[Tensor, "*b q r"]]:
    """SVDnorm for large states: to TOLERANCE what `svd_norm` gives.   norm_r(S) = U_r V_r^T, null directions zero"""
    return PolarFactor.apply(S, rank)


NORMS["polar"] = polar_norm
