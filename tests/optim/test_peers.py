"""If this fails, our KFAC or EKFAC is not the one that others mean by the name.

The peer is curvlinops, which builds linear operators (no optimizer) and tests them against the
exact generalized Gauss-Newton matrix. Its conventions, from its documentation and code, and why one
number s is all that is left of the difference, F̂ = s · ours:

- Factors ("expand"): its A is the mean over examples *and* positions, its G the mean over examples
  of the *sum* over positions. Ours has the number of positions in the other factor; A ⊗ G is the
  same, and so is KFAC's split of the damping, since π absorbs it.
- Cross-entropy, mean: the same Fisher, s = 1.
- `MSELoss`, mean: the loss is ‖z − y‖²/C, a Gaussian of variance ½, where ours is ½‖z − y‖². Its
  type-2 Fisher is s = 2/C times ours. For the empirical one the loss is multiplied by √C first, so
  that sampled labels average to that; residuals are doubled: s = 4/C.
- `reduction="sum"`: N times as much.
- Weight and bias are one matrix, bias last, with `separate_weight_and_bias=False`.
"""

import pytest
import torch
from torch import nn

from tekfac_edu.optim import EKFAC, KFAC, Added, Paper

from .networks import CLASSES, double_precision
from .oracles import assert_close, trained
from .training import EVERY_STEP

curvlinops = pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch")

N, DAMPING = 9, 0.04
NETWORKS = {
    "dense": ((4,), lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)]),
    "sequence": ((3, 4), lambda: [nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, CLASSES)]),
    "convolutions": (
        (2, 6, 5),
        lambda: [
            nn.Conv2d(2, 3, 3, padding=1, stride=(2, 1)),
            nn.Tanh(),
            nn.Conv2d(3, 2, (2, 3), dilation=(1, 2), bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, CLASSES),
        ],
    ),
}
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), {"empirical": 1, "exact": 1}),
    "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), {"empirical": N, "exact": N}),
    "squared error": (nn.MSELoss(), {"empirical": 4 / CLASSES, "exact": 2 / CLASSES}),
}
THEIR_FISHER = {
    "empirical": curvlinops.FisherType.EMPIRICAL,
    "exact": curvlinops.FisherType.TYPE2,
}
every_network = pytest.mark.parametrize("network", NETWORKS)
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_fisher = pytest.mark.parametrize("fisher", THEIR_FISHER)
DAMPED = [(KFAC, Paper), (KFAC, Added), (EKFAC, Paper)]


def by_name(pairs):
    return pytest.mark.parametrize(("method", "rule"), pairs, ids=lambda x: x.__name__)


def model_and_batch(network, loss):
    shape, layers = NETWORKS[network]
    draw = torch.Generator().manual_seed(8)
    x = torch.randn(N, *shape, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (N,), generator=draw)
    outputs = torch.randn(N, CLASSES, generator=draw, dtype=torch.float64)
    model = double_precision(lambda: nn.Sequential(*layers()))
    return model, x, outputs if loss == "squared error" else labels


def mean_over_examples(outputs, y):
    """The loss in our convention."""
    if y.dtype == torch.int64:
        return nn.functional.cross_entropy(outputs, y)
    return 0.5 * ((outputs - y) ** 2).sum(1).mean()


def our_preconditioner(network, loss, method, rule, fisher):
    """(direction, vector): our preconditioner on random numbers, in the order of parameters()."""
    model, x, y = model_and_batch(network, loss)
    settings = EVERY_STEP | {"damping": rule(DAMPING), "fisher": fisher, "process_group": None}
    optimizer = method(model, 4e-4, **settings)
    outputs = model(x)
    if fisher == "exact":
        likelihood = "categorical" if y.dtype == torch.int64 else "gaussian"
        optimizer.accumulate_fisher(outputs, likelihood=likelihood)
    mean_over_examples(outputs, y).backward()
    optimizer.step()
    draw = torch.Generator().manual_seed(9)
    direction, vector = [], []
    for module in model:
        if not list(module.parameters()):
            continue
        parts = [torch.randn(p.shape, generator=draw).double() for p in trained(module)]
        M = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
        moved = optimizer.precondition(module, M)
        kernel = module.weight[0].numel()
        direction.append(moved[:, :kernel].reshape(module.weight.shape))
        if len(parts) == 2:
            direction.append(moved[:, kernel])
        vector += parts
    return direction, vector


def their_operator(network, loss, method, fisher):
    model, x, y = model_and_batch(network, loss)
    return getattr(curvlinops, f"{method.__name__}LinearOperator")(
        model,
        LOSSES[loss][0],
        list(model.parameters()),
        [(x, y)],
        fisher_type=THEIR_FISHER[fisher],
        kfac_approx=curvlinops.KFACType.EXPAND,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


@by_name(DAMPED)
@every_fisher
@every_loss
@every_network
def test_the_damped_inverse_is_theirs(network, loss, method, rule, fisher):
    scale = LOSSES[loss][1][fisher]
    direction, vector = our_preconditioner(network, loss, method, rule, fisher)
    split = (method, rule) == (KFAC, Paper)
    inverse = curvlinops.KFACInverseLinearOperator(
        their_operator(network, loss, method, fisher),
        damping=scale * DAMPING,
        use_heuristic_damping=split,
        use_exact_damping=not split,
    )
    for ours, theirs in zip(direction, inverse @ vector, strict=True):
        assert_close(ours, scale * theirs.detach().numpy())


@by_name(DAMPED[1:])
@every_fisher
@every_loss
@every_network
def test_their_matrix_undoes_our_preconditioner(network, loss, method, rule, fisher):
    """The same without their inverse, which for both is an eigendecomposition like ours."""
    scale = LOSSES[loss][1][fisher]
    direction, vector = our_preconditioner(network, loss, method, rule, fisher)
    product = their_operator(network, loss, method, fisher) @ direction
    for theirs, ours, start in zip(product, direction, vector, strict=True):
        assert_close(theirs / scale + DAMPING * ours, start.numpy())
