"""A run that is stopped after any step, saved, and continued from the file by another process."""

import io

import torch

from ..training import assert_same_bits, everything, train


def through_a_file(state, weights_only=True):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def other_weights(model):
    """The same architecture from another start, so that nothing is right by chance."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5)
    return model


def assert_resumes_from_any_step(make, build, build_again, stream):
    """A run saved before every step ends, continued from there, with the same bits.

    make : gives a model.   build, build_again : model -> its optimizer, of the run and of those
    that continue it.
    """
    model = make()
    optimizer = build(model)
    saved = []
    for batch in stream:
        saved.append(through_a_file(everything(model, optimizer)))
        train(model, optimizer, [batch])
    expected = everything(model, optimizer)
    for step, state in enumerate(saved):
        resumed = other_weights(make())
        again = build_again(resumed)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        assert_same_bits(everything(resumed, again), state)
        train(resumed, again, stream[step:])
        assert_same_bits(everything(resumed, again), expected)
