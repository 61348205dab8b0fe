"""How sure a regression network is of its outputs: the Laplace approximation (MacKay, 1992; Daxberger et al., 2021).

From the upper half of a digit it predicts the mean intensity of both lower quarters. The evidence chooses noise and
prior, by gradients through `logdet()` of the precision `H = n / noise F + prior`; `J H^-1 J'` is the covariance.

    python examples/laplace.py [--out laplace.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from nngeo import FIM, NTK, FVector, Jacobian, PMat, PMatDense, PMatDiag, PMatKFAC, PVector

pixels, classes = load_digits(return_X_y=True)
images, known = torch.tensor(pixels / 16), torch.tensor(classes) < 5
inputs, targets = images[:, :32], images[:, 32:].reshape(-1, 4, 2, 4).mean((1, 3))
x, y = inputs[known][:300], ((targets - targets.mean(0)) / targets.std(0))[known][:300]
seen, unseen = inputs[known][300:], inputs[~known][:300]  # other digits 0 to 4, as in training, and digits 5 to 9


def minimise(loss: Callable[[], Tensor], parameters: list[Tensor], lr: float, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def log_evidence(model: nn.Module, F: PMat, noise: Tensor, prior: Tensor) -> Tensor:
    """log p(y | x), with the weights integrated out around the model's; differentiable in noise and prior."""
    w = PVector.from_model(model).to_torch().detach()
    fit = (model(x) - y).square().sum().detach() / noise + y.numel() * (2 * torch.pi * noise).log()
    return -(fit + prior * w.dot(w) - len(w) * prior.log() + (len(x) / noise * F + prior).logdet()) / 2


def errors_of_a_linear_model(noise: Tensor, prior: Tensor) -> list[float]:
    """Of evidence and variance, relative to the closed forms of Bayesian linear regression."""
    model = nn.Linear(32, 2).double()
    F = FIM(model, (x,), PMatDense, variant="regression")
    H = len(x) / noise * F + prior
    H.solve(Jacobian(model, x).T @ FVector(y.T / noise), regul=0).to_model(model)  # the mean of the posterior
    phi, phi_new = (nn.functional.pad(a, (0, 1), value=1.0) for a in (x, unseen))
    marginal = MultivariateNormal(torch.zeros(len(x)), phi @ phi.T / prior + noise * torch.eye(len(x)).to(x))
    covariance = torch.linalg.inv(phi.T @ phi / noise + prior * torch.eye(33).to(x))
    closed = marginal.log_prob(y.T).sum(), (phi_new @ covariance * phi_new).sum(1)
    found = log_evidence(model, F, noise, prior), H.inv().mapTMmap(Jacobian(model, unseen), "diag")
    return [float((a / b - 1).abs().max()) for a, b in zip(found, closed, strict=True)]


def main(out: str = "laplace.png") -> dict[str, float]:
    """Log evidence by representation, and the largest relative errors against closed forms."""
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 2)).double(), {}
    w = PVector.from_model(model)
    minimise(lambda: (model(x) - y).square().sum() / len(x) + 0.01 * w.dot(w), [*model.parameters()], 0.01, 1500)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.set(xscale="log", xlabel="prior precision", ylabel="log evidence", ylim=(-1500, -600))
    right.set(xlabel="digits (5 to 9 are unseen)", ylabel="standard deviation of the outputs")
    box = {"widths": 0.3, "sym": "", "tick_labels": ("0-4", "5-9")}
    print(f"{'':<10}{'log evidence':>14}{'noise':>8}{'prior':>8}{'std, 0 to 4':>14}{'std, 5 to 9':>14}")
    for i, kind in enumerate((PMatDiag, PMatKFAC, PMatDense)):
        name, F = kind.__name__, FIM(model, (x,), kind, variant="regression")
        logs = torch.zeros(2).to(x).requires_grad_()
        minimise(lambda F=F, logs=logs: -log_evidence(model, F, *logs.exp()), [logs], 0.1, 200)
        noise, prior = logs.detach().exp()
        covariance = (len(x) / noise * F + prior).inv()
        stds = [covariance.mapTMmap(Jacobian(model, new), "diag").sqrt().flatten() for new in (seen, unseen)]
        found[name] = log_evidence(model, F, noise, prior).item()
        print(f"{name:<10}{found[name]:>14.1f}{noise:>8.2f}{prior:>8.2f}" + "".join(f"{s.mean():>14.2f}" for s in stds))
        priors = torch.logspace(-1, 2, 40)
        left.plot(priors, [log_evidence(model, F, noise, p) for p in priors], label=name)
        left.plot(prior, found[name], "k.")
        right.boxplot(stds, positions=(i, i + 0.4), boxprops={"color": f"C{i}"}, medianprops={"color": f"C{i}"}, **box)
    left.legend(frameon=False)
    figure.savefig(out, dpi=110)
    # The same covariance by Woodbury's identity: of both outputs of a Gaussian process with the kernel NTK / prior.
    K, cross = NTK(model, x).to_matrix(), NTK(model, unseen, x).to_matrix()
    explained = cross @ torch.linalg.solve(K + noise * prior * torch.eye(len(K)).to(K), cross.T)
    posterior = (NTK(model, unseen).to_matrix() - explained) / prior
    J = Jacobian(model, unseen)
    errors = {"kernel": float(((J @ covariance @ J.T).to_matrix() - posterior).abs().max() / posterior.abs().max())}
    errors["linear evidence"], errors["linear variance"] = errors_of_a_linear_model(noise, prior)
    print("\nlargest relative errors: " + ", ".join(f"{name} {error:.0e}" for name, error in errors.items()))
    print(f"The evidence and the standard deviations: {out}")
    return found | errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="laplace.png", help="where to save the picture")
    main(out=parser.parse_args().out)
