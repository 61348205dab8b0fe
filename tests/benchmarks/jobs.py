"""The jobs that are measured: the rows of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A row: what it is called, what its time is divided by, and whether its result fills much new memory."""

    name: str
    title: str
    per: int = 1
    large: bool = False


VECTORS = 16  # at once, in the linearised job

JOBS = {
    job.name: job
    for job in (
        Job("diag", "exact Fisher diagonal"),
        Job("diag_mc", "Monte-Carlo diagonal, 1 draw"),
        Job("kfac", "KFAC, exact"),
        Job("kfac_mc", "KFAC, Monte-Carlo, 1 draw"),
        Job("ekfac", "EKFAC scalings, exact (update_diag)"),
        Job("ekfac_mc", "EKFAC scalings, Monte-Carlo, 1 draw"),
        Job("mv", "matrix-free mv, exact Fisher"),
        Job("linearized", f"the same after linearize(), per vector, {VECTORS} at once", VECTORS),
        Job("ntk", "NTK Gram matrix, all examples and outputs"),
        Job("jacobian", "Jacobian (k, n, P)", large=True),
    )
}

# Kronecker factors of the last two are of their Linear and Conv2d layers, which all libraries know. Exact cotangents of
# the language model would be 128 * 999 for each text; the Jacobian of the ResNet would take 14 GiB.
JOBS_OF = {
    "mlp": [name for name in JOBS],
    "cnn": [name for name in JOBS],
    "resnet18": ["diag", "diag_mc", "kfac", "kfac_mc", "ekfac_mc", "mv", "linearized"],
    "transformer": ["diag_mc", "kfac_mc", "ekfac_mc", "mv", "linearized"],
}
