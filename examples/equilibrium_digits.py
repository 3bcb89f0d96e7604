"""A deep equilibrium classifier: a layer that is the fixed point of a map, trained by phantom and by exact gradients."""

from __future__ import annotations

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

import optuna_hypergrad as ohg

WIDTH, BATCH = 80, 100


class Equilibrium(nn.Module):
    """``z* = tanh(W z* + U x)``, with ``W`` scaled so that the map contracts; then a linear classifier."""

    def __init__(self, backward: ohg.Phantom | ohg.Picard) -> None:
        super().__init__()
        self.recurrent = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.inject = nn.Linear(64, WIDTH)
        self.classify = nn.Linear(WIDTH, 10)
        self.backward_solver = backward

    def forward(self, x: Tensor) -> Tensor:
        w = 0.95 * self.recurrent / torch.linalg.matrix_norm(self.recurrent, 2)
        injected = self.inject(x)
        z = ohg.fixed_point(
            lambda z: torch.tanh(z @ w + injected),
            torch.zeros_like(injected),
            forward=ohg.Anderson(rtol=1e-4, per_sample=True),
            backward=self.backward_solver,
        )
        logits: Tensor = self.classify(z)
        return logits


def train(backward: ohg.Phantom | ohg.Picard, num_epochs: int) -> tuple[float, float]:
    """The error on the test set, and the CPU seconds of all backward passes."""
    features, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    features = (features / 16).float()
    torch.manual_seed(0)
    order = torch.randperm(len(features))
    training, test = order[:1000], order[1000:]
    network = Equilibrium(backward)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    seconds = 0.0
    for _ in trange(num_epochs, desc=type(backward).__name__):
        for rows in training[torch.randperm(1000)].split(BATCH):
            loss = cross_entropy(network(features[rows]), labels[rows])
            optimizer.zero_grad()
            begun = time.process_time()
            loss.backward()
            seconds += time.process_time() - begun
            optimizer.step()
    with torch.no_grad():
        wrong = network(features[test]).argmax(1) != labels[test]
    return float(wrong.double().mean()), seconds


def main(num_epochs: int = 20) -> float:
    torch.set_num_threads(1)  # tensors this small are slower on two
    phantom, phantom_seconds = train(ohg.Phantom(num_steps=5, relaxation=0.5), num_epochs)
    exact, exact_seconds = train(ohg.Picard(max_steps=1000, rtol=1e-6), num_epochs)
    print(
        f"test error with exact implicit gradients {exact:.1%}, with phantom gradients {phantom:.1%}"
    )
    print(
        f"backward passes: {exact_seconds / phantom_seconds:.1f} times faster with phantom gradients"
    )
    return max(exact, phantom)


if __name__ == "__main__":
    main()
