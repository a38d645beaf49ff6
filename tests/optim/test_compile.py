"""If this fails, torch.compile(model) trains otherwise than the model, or stops without a reason.

Dynamo breaks its graph at every factored layer, in whose hook the capture happens; what lies
between is compiled. "inductor" is left out: it compiles for half a minute and rounds otherwise.
"""

import pytest
import torch
from torch.nn import functional

from tekfac_edu.optim import TEKFAC

from .networks import batches, cnn, mlp
from .training import EVERY_STEP, UNEVEN, assert_same_bits, everything, parameters, train

every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])
BATCH = next(batches((4,), 1))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(model, called, stream, **options):
    optimizer = TEKFAC(called, 0.005, damping=0.1, **UNEVEN, **options)
    train(called, optimizer, stream)
    return everything(model, optimizer)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@every_backend
def test_a_compiled_model_trains_bit_for_bit_like_the_model(backend, fisher):
    stream = list(batches((1, 6, 6), 7))
    plain, model = cnn(), cnn()
    compiled = torch.compile(model, backend=backend)
    expected = trained(plain, plain, stream, fisher=fisher)
    assert_same_bits(trained(model, compiled, stream, fisher=fisher), expected)


def test_it_does_not_matter_which_of_the_two_the_optimizer_is_given():
    results = []
    for give_compiled in (False, True):
        model = mlp()
        compiled = torch.compile(model, backend="eager")
        optimizer = TEKFAC(compiled if give_compiled else model, 1e-3, **EVERY_STEP)
        train(compiled, optimizer, batches((4,), 2))
        assert [row.name for row in optimizer.report().rows] == ["0", "2"]
        results.append(everything(model, optimizer))
    assert_same_bits(*results)


def test_an_evaluation_before_the_first_step_is_no_obstacle():
    stream = list(batches((4,), 3))
    plain, model = mlp(), mlp()
    compiled = torch.compile(model, backend="aot_eager")
    compiled.eval()
    with torch.no_grad():
        compiled(BATCH[0])
    compiled.train()
    assert_same_bits(trained(model, compiled, stream), trained(plain, plain, stream))


def test_a_second_optimizer_sees_the_model_that_was_compiled_for_the_first():
    plain, model = mlp(), mlp()
    compiled = torch.compile(model, backend="eager")
    for called in (plain, compiled):
        for _ in range(2):
            train(called, TEKFAC(called, 1e-3, **EVERY_STEP), batches((4,), 2))
    assert torch.equal(parameters(model), parameters(plain))


@every_backend
def test_a_model_compiled_and_trained_before_the_optimizer_was_built_is_refused(backend):
    """Dynamo does not look for hooks again; the error has to name it and what to do."""
    model = mlp()
    compiled = torch.compile(model, backend=backend)
    functional.cross_entropy(compiled(BATCH[0]), BATCH[1]).backward()
    optimizer = TEKFAC(compiled, 1e-3)
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"0 \(Linear\).*torch\.compile"):
        train(compiled, optimizer, [BATCH])
    assert torch.equal(parameters(model), before)


def test_after_a_reset_of_dynamo_it_is_accepted():
    model, plain = mlp(), mlp()
    compiled = torch.compile(model, backend="eager")
    functional.cross_entropy(compiled(BATCH[0]), BATCH[1]).backward()
    torch._dynamo.reset()
    assert_same_bits(trained(model, compiled, [BATCH]), trained(plain, plain, [BATCH]))


def test_fullgraph_cannot_be_had_and_dynamo_says_so():
    model = mlp()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        trained(model, compiled, [BATCH])
