"""Minimal residuals, many right-hand sides side by side (Paige & Saunders, 1975)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nngeo.linalg.refinement import Product, Solution, refined


def minimal_residuals(
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_iter: int | None = None,
    precondition: Product | None = None,
) -> Solution:
    """Solutions x (m, P) of `product(x) = b` for a symmetric product of rows (m, P), which may be indefinite.

    One product an iteration and row, seven vectors of memory for each row. It stops as `conjugate_gradients` does, on
    the residual, not on that of a preconditioned problem. A singular system is solved if b is in the range.
    In the letters of Elman, Silvester & Wathen (2014, preconditioned MINRES).

    Args:
        max_iter: 10 P, at most 1000, if None.
        precondition: an approximation of the inverse of `product`, symmetric positive definite.
    """
    run = partial(_run, product, precondition or torch.clone)
    return refined(run, product, b, x0=x0, rtol=rtol, atol=atol, max_iter=max_iter)


def _run(product: Product, precondition: Product, b: Tensor, target: Tensor, limit: int) -> tuple[Tensor, int, bool]:
    x, r, v = torch.zeros_like(b), b.clone(), b.clone()
    active = torch.arange(len(b), device=b.device)
    z = precondition(v)
    gamma = _length(v, z)
    v_old, gamma_old, eta = torch.zeros_like(b), torch.ones_like(gamma), gamma.clone()
    w, w_old, q, q_old = (torch.zeros_like(b) for _ in range(4))  # q is the product with w
    c, c_old, s, s_old = (f(gamma) for f in (torch.ones_like, torch.ones_like, torch.zeros_like, torch.zeros_like))
    iterations, indefinite = 0, bool((gamma[active] == 0).any())
    active = active[gamma[active] > 0]
    while len(active) and iterations < limit:
        i = active
        unit = z[i] / gamma[i, None]
        az = product(unit)
        delta = (az * unit).sum(-1)
        v_new = az - (delta / gamma[i])[:, None] * v[i] - (gamma[i] / gamma_old[i])[:, None] * v_old[i]
        z_new = precondition(v_new)
        gamma_new = _length(v_new, z_new)
        a0 = c[i] * delta - c_old[i] * s[i] * gamma[i]
        a1 = (a0.square() + gamma_new.square()).sqrt()
        a2 = s[i] * delta + c_old[i] * c[i] * gamma[i]
        a3 = s_old[i] * gamma[i]
        alive = a1 > torch.finfo(b.dtype).eps * (a2.abs() + a3.abs())
        a1 = a1.masked_fill(~alive, 1)
        c_old[i], c[i], s_old[i], s[i] = c[i], a0 / a1, s[i], gamma_new / a1
        w_new = (unit - a3[:, None] * w_old[i] - a2[:, None] * w[i]) / a1[:, None]
        q_new = (az - a3[:, None] * q_old[i] - a2[:, None] * q[i]) / a1[:, None]
        step = (c[i] * eta[i] * alive)[:, None]
        x[i] += step * w_new
        r[i] -= step * q_new
        eta[i] = -s[i] * eta[i]
        w_old[i], w[i], q_old[i], q[i] = w[i], w_new, q[i], q_new
        v_old[i], v[i], z[i], gamma_old[i], gamma[i] = v[i], v_new, z_new, gamma[i], gamma_new
        iterations += 1
        active = i[(r[i].norm(dim=-1) > target[i]) & alive & (gamma_new > 0)]
    return x, iterations, indefinite


def _length(v: Tensor, z: Tensor) -> Tensor:
    """(m,), the length of v in the metric of the preconditioner; 0 if that is not positive."""
    return (v * z).sum(-1).clamp(min=0).sqrt()
