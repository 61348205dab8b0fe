"""Which training digits does a prediction depend on? Influence functions.

Judged by the rank correlation of predicted and actual losses after training
on halves of the digits: the linear datamodeling score (Park et al., 2023).

    python examples/influence.py
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh
from torch.nn.functional import pad

from nngeo import FIM, PMatDense, PMatDiag, PMatEKFAC
from nngeo.uses import influence, lds

N, HALVES, SEEDS, STEPS, DECAY = 200, 60, 3, 150, 1e-3
WAYS = {"diagonal": (PMatDiag, 0), "EKFAC": (PMatEKFAC, 0)}
WAYS |= {"EKFAC, refined": (PMatEKFAC, 10), "dense": (PMatDense, 0)}
x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, new = [(x[i].float() / 16, y[i]) for i in (range(N), range(-40, 0))]


def trained(masks: Tensor) -> list[Sequential]:
    """Networks of each seed for each of the masks (s, N), all at once."""
    nets = []
    for i in range(SEEDS * len(masks)):
        torch.manual_seed(i % SEEDS)
        nets.append(Sequential(Linear(64, 32), Tanh(), Linear(32, 10)))
    w, _ = torch.func.stack_module_state(nets)
    a, b, c, d = w.values()
    each = (masks / masks.sum(1, keepdim=True)).repeat_interleave(SEEDS, 0)
    optimizer = torch.optim.Adam(w.values(), 0.02, weight_decay=DECAY)
    for _ in range(STEPS):
        f = (train[0] @ a.mT + b[:, None]).tanh() @ c.mT + d[:, None]
        fit = (each * f.log_softmax(-1)[:, range(N), train[1]]).sum()
        optimizer.zero_grad()
        (-fit).backward()
        optimizer.step()
    for i, net in enumerate(nets):
        net.load_state_dict({name: p[i] for name, p in w.items()})
    return nets


def margins(f: Tensor, y: Tensor) -> Tensor:
    """Minus the log odds of the classes, (b,)."""
    return f.scatter(1, y[:, None], -1e9).logsumexp(1) - f[range(len(y)), y]


def main(out: str = "influence.png") -> dict[str, float]:
    """The linear datamodeling score, by the way to find scores."""
    torch.manual_seed(0)
    halves = torch.rand(HALVES, N).argsort() < N // 2
    losses = [margins(net(new[0]), new[1]) for net in trained(halves)]
    actual = torch.stack(losses).detach().view(HALVES, SEEDS, -1).mean(1)
    how = {"damping": DECAY, "measure": lambda f, y: margins(f, y).sum()}
    loss, found = CrossEntropyLoss(reduction="sum"), {}
    for name, (kind, refine) in WAYS.items():
        scores, how["refine"] = 0, refine
        for net in trained(torch.ones(1, N)):
            F = FIM(net, train, kind)
            scores += influence(net, F, new, train, loss, **how)
        found[name] = lds(scores, halves, actual).item()
        print(f"{name:<16}score {found[name]:.2f}")
    rows = [new[0][:6, None], train[0][scores[:6].topk(7).indices]]
    picture = pad(torch.cat(rows, 1).view(6, 8, 8, 8), (1, 1, 1, 1))
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    ax.set(xticks=[5, 45], xticklabels=["query", "most helpful"], yticks=[])
    ax.imshow(picture.transpose(1, 2).reshape(60, 80).numpy(), cmap="gray_r")
    figure.savefig(out)
    print(f"\nSix queries, each with the seven that help it most: {out}")
    return found


if __name__ == "__main__":
    main()
