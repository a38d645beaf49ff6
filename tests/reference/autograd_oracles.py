"""PyTorch's view of the package's network: the same weights, differentiated by autograd."""

import numpy as np
import pytest
import torch

from tekfac_edu.reference import MLP

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda s: s,
}
LOSSES = ["cross_entropy", "squared_error"]
WIDTHS = (3, 5, 4, 2)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def network(activation, seed=0, widths=WIDTHS):
    """An MLP whose biases are not zero, so that a forgotten one is seen."""
    mlp = MLP(widths, activation=activation, rng=seed)
    rng = np.random.default_rng(seed + 100)
    for W in mlp.weights:
        W += 0.3 * rng.normal(size=W.shape)
    return mlp


def data(loss, N=6, seed=1, d=3, C=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, d))
    y = rng.integers(C, size=N) if loss == "cross_entropy" else rng.normal(size=(N, C))
    return x, y


def torch_weights(mlp):
    return [torch.tensor(W, dtype=torch.float64, requires_grad=True) for W in mlp.weights]


def torch_forward(weights, x, activation):
    """Outputs, and for every layer its inputs with the 1 appended and its outputs s."""
    h, inputs, outputs = torch.as_tensor(x), [], []
    for k, W in enumerate(weights):
        a = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)
        s = a @ W.T
        inputs.append(a)
        outputs.append(s)
        h = s if k == len(weights) - 1 else ACTIVATIONS[activation](s)
    return h, inputs, outputs


def torch_losses(z, y, loss):
    """ℓ_n, one per example."""
    if loss == "cross_entropy":
        return torch.nn.functional.cross_entropy(z, torch.as_tensor(y), reduction="none")
    return 0.5 * ((z - torch.as_tensor(y)) ** 2).sum(1)


def pulled_back(mlp, x, activation, vectors):
    """For each layer ∂(vectors_n · z_n)/∂s_n by autograd: vectors (S, N, C) -> [(S, N, d_out)]."""
    z, _, outputs = torch_forward(torch_weights(mlp), x, activation)
    by_vector = [
        torch.autograd.grad(z, outputs, torch.as_tensor(v), retain_graph=True) for v in vectors
    ]
    return [np.stack([g[k].numpy() for g in by_vector]) for k in range(len(outputs))]


def probabilities(mlp, x, activation):
    z = torch_forward(torch_weights(mlp), x, activation)[0]
    return torch.softmax(z, 1).detach().numpy()
