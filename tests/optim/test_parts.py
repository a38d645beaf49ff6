"""If this fails, a batch split to fit into memory trains on other statistics than its own."""

import pytest
import torch
from torch import nn

from tekfac_edu.optim import TEKFAC
from tekfac_edu.optim import batch as layer_batch

from .networks import CASES, CLASSES, Case
from .oracles import assert_close, cross_entropy
from .scenarios.accumulating import one_part, step_in_parts
from .training import EVERY_STEP, every_method

FISHERS = ["empirical", "exact"]
SHOWN = ["Linear", "Linear, positions", "Conv2d, padding 1", "Linear, used twice"]
WHOLE = [range(8)]
SPLITS = {
    "two parts": [range(4), range(4, 8)],
    "four parts": [range(2), range(2, 4), range(4, 6), range(6, 8)],
    "parts in another order": [range(6, 8), range(2), range(4, 6), range(2, 4)],
    "parts shuffled": [(7, 0, 4, 2), (5, 6, 1, 3)],
    "one example at a time": [(n,) for n in range(8)],
}
# a warning about a network that is all right is a fault too
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
every_fisher = pytest.mark.parametrize("fisher", FISHERS)
every_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in SHOWN], ids=lambda case: case.name
)


class Run:
    """A network and its optimizer; after each step the weights and a probe of every layer."""

    def __init__(self, case, method=TEKFAC, fisher="empirical", **options):
        self.case, self.model = case, case.make()
        settings = EVERY_STEP | {"damping": 0.03, "process_group": None, "fisher": fisher}
        self.optimizer = method(self.model, 0.0015, **settings | options)

    def backward(self, x, y):
        one_part(self.model, self.optimizer, x, y)

    def step(self, batch, parts=WHOLE):
        step_in_parts(self.model, self.optimizer, batch, parts)

    def probes(self):
        """Each layer's preconditioner on a matrix that is not symmetric in anything."""
        probes = []
        for name in self.case.layers:
            module = self.model.get_submodule(name)
            width = module.weight[0].numel() + (module.bias is not None)
            M = torch.ones(len(module.weight), width, dtype=torch.float64)
            M[0] = -2
            M[:, 0] *= 3
            probes.append(self.optimizer.precondition(module, M))
        return probes


def assert_same_statistics(one, other):
    for left, right in zip(one.probes(), other.probes(), strict=True):
        assert_close(left, right.numpy())


def assert_same(one, other):
    assert_same_statistics(one, other)
    for left, right in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert_close(left, right.detach().numpy())


@pytest.mark.parametrize("split", SPLITS)
@every_case
@every_fisher
@every_method
def test_parts_equal_the_whole_batch(case, method, fisher, split):
    whole, parted = Run(case, method, fisher), Run(case, method, fisher)
    for seed in (1, 2):
        whole.step(case.batch(8, seed))
        parted.step(case.batch(8, seed), SPLITS[split])
    assert_same(parted, whole)


@every_fisher
@every_method
def test_every_example_counts_the_same_in_parts_of_unequal_size(method, fisher):
    """Gradients are then those of the means' mean; statistics still those of all examples."""
    whole, parted = Run(CASES[0], method, fisher), Run(CASES[0], method, fisher)
    whole.step(CASES[0].batch(8))
    parted.step(CASES[0].batch(8), [range(3), range(3, 8)])
    assert_same_statistics(parted, whole)


@every_case
@every_fisher
@every_method
def test_what_zero_grad_discards_leaves_no_trace(case, method, fisher):
    plain, interrupted = Run(case, method, fisher), Run(case, method, fisher)
    for seed in (1, 2):
        plain.step(case.batch(8, seed))
        interrupted.backward(*case.batch(8, seed + 10))
        interrupted.step(case.batch(8, seed))
    assert_same(interrupted, plain)


@every_method
def test_zero_grad_between_the_fisher_call_and_backward_is_refused(method):
    """It discards what the call has left, so the step must not go on as if it were there."""
    run, (x, y) = Run(CASES[0], method, "exact"), CASES[0].batch(8)
    outputs = run.model(x)
    run.optimizer.accumulate_fisher(outputs)
    run.optimizer.zero_grad()
    nn.functional.cross_entropy(outputs, y).backward()
    with pytest.raises(RuntimeError, match="after zero_grad"):
        run.optimizer.step()
    for one, other in zip(run.model.parameters(), CASES[0].make().parameters(), strict=True):
        assert torch.equal(one, other)


@every_case
@every_fisher
@every_method
def test_memory_for_one_example_at_a_time_is_enough(case, method, fisher, monkeypatch):
    roomy, cramped = Run(case, method, fisher), Run(case, method, fisher)
    roomy.step(case.batch(8))
    monkeypatch.setattr(layer_batch, "CHUNK", 1)
    cramped.step(case.batch(8))
    assert_same(cramped, roomy)


@every_method
def test_passes_that_are_not_training_leave_no_trace(method):
    """A batch thrown away before backward, a validation pass, gradients under eval()."""
    case = CASES[0]
    plain, disturbed = Run(case, method), Run(case, method)
    x, y = case.batch(8, seed=20)
    for seed in (1, 2):
        plain.step(case.batch(8, seed))
        disturbed.optimizer.zero_grad()
        cross_entropy(disturbed.model, x, y)
        with torch.no_grad():
            disturbed.model(x)
        disturbed.model.eval()
        noisy = x.clone().requires_grad_()  # an adversary looks for the worst change of x
        torch.autograd.grad(cross_entropy(disturbed.model, noisy, y), noisy)
        disturbed.model.train()
        disturbed.backward(*case.batch(8, seed))
        cross_entropy(disturbed.model, x, y)
        disturbed.model.eval()
        disturbed.model(x)
        disturbed.model.train()
        with torch.no_grad():
            disturbed.model(x)
        disturbed.optimizer.step()
    assert_same(disturbed, plain)


def backward_of(losses, at_once):
    """Of their sum; or of one after the other, on what the forward pass has left."""
    if at_once:
        sum(losses).backward()
    else:
        losses[0].backward(retain_graph=True)
        losses[1].backward()


@every_case
@every_method
def test_two_losses_on_one_forward_pass_are_their_sum(case, method):
    summed, apart = Run(case, method), Run(case, method)
    x, y = case.batch(8)
    for run in (summed, apart):
        outputs = run.model(x)
        labels = y, (y + 1) % CLASSES
        backward_of([nn.functional.cross_entropy(outputs, y) for y in labels], run is summed)
        run.optimizer.step()
    assert_same(apart, summed)


class TwoHeads(nn.Module):
    """One layer under two heads; `forward` gives the outputs of both."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.head, self.other = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return self.head(h), self.other(h)


@every_method
def test_each_loss_of_a_network_with_two_heads_may_have_its_own_backward(method):
    """The second pass reaches a head that the first did not, then the layer that both did."""
    case = Case("two heads", TwoHeads, (4,), ("layer", "head", "other"))
    summed, apart = Run(case, method), Run(case, method)
    x, y = case.batch(8)
    for run in (summed, apart):
        losses = [nn.functional.cross_entropy(outputs, y) for outputs in run.model(x)]
        backward_of(losses, run is summed)
        run.optimizer.step()
    assert_same(apart, summed)


def test_two_losses_on_one_forward_pass_in_each_of_two_parts():
    case = CASES[0]
    summed, apart = Run(case), Run(case)
    x, y = case.batch(8)
    for part in (slice(0, 4), slice(4, 8)):
        for run in (summed, apart):
            outputs = run.model(x[part])
            labels = y[part], (y[part] + 1) % CLASSES
            losses = [0.5 * nn.functional.cross_entropy(outputs, y) for y in labels]
            backward_of(losses, run is summed)
    for run in (summed, apart):
        run.optimizer.step()
    assert_same(apart, summed)
