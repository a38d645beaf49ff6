"""If this fails, the experiments train other networks than those that papers and records name."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tekfac_edu.models import ResidualBlock, autoencoder, mlp, resnet20, vgg16
from tekfac_edu.optim import TEKFAC

# configuration D of the paper, and the stages of ResNet20, written out
VGG_WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG_SIDES = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
RESNET_WIDTHS = [16, *6 * [16], *6 * [32], *6 * [64]]

TINY = {
    "mlp": (lambda: mlp((64, 5, 4, 3)), (1, 8, 8)),
    "autoencoder": (lambda: autoencoder((64, 6, 5, 4, 2)), (1, 8, 8)),
    "resnet20": (lambda: resnet20(3, channels=2, width=2), (2, 8, 8)),
    "vgg16": (lambda: vgg16(3, channels=2, width=1), (2, 32, 32)),
}
every_network = pytest.mark.parametrize("name", TINY)


def build(name):
    torch.manual_seed(0)
    make, shape = TINY[name]
    return make(), shape


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def count(model):
    return sum(p.numel() for p in model.parameters())


def convolutional(widths, channels, classes):
    """Parameters of convolutions 3×3 without bias, a batch norm after each, one linear layer."""
    total, c_in = 0, channels
    for c_out in widths:
        total += 9 * c_in * c_out + 2 * c_out
        c_in = c_out
    return total + c_in * classes + classes


def seen_by(model, x, kind):
    """Shapes of what the modules of a kind put out, in the order of their calls."""
    shapes = []
    handles = [
        module.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
        for module in modules(model, kind)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return shapes


# sizes


def test_resnet20_has_as_many_parameters_as_its_widths_say():
    assert count(resnet20()) == convolutional(RESNET_WIDTHS, 3, 10) == 269_722
    assert count(resnet20(100, 1)) == convolutional(RESNET_WIDTHS, 1, 100)


def test_vgg16_has_as_many_parameters_as_its_widths_say():
    """The conv biases of the paper, which batch norm would take away again, are left out."""
    assert count(vgg16()) == convolutional(VGG_WIDTHS, 3, 10) == 14_724_042


def test_the_autoencoder_has_as_many_parameters_as_its_widths_say():
    there = 785 * 1000 + 1001 * 500 + 501 * 250 + 251 * 30
    back = 31 * 250 + 251 * 500 + 501 * 1000 + 1001 * 784
    assert count(autoencoder()) == there + back == 2_837_314


def test_the_mlp_has_as_many_parameters_as_its_widths_say():
    assert count(mlp()) == 785 * 256 + 257 * 128 + 129 * 10


def test_width_narrows_every_layer():
    for model, widths in (
        (resnet20(10, 3, width=4), [width // 4 for width in RESNET_WIDTHS]),
        (vgg16(10, 3, width=4), [width // 16 for width in VGG_WIDTHS]),
    ):
        assert [conv.out_channels for conv in modules(model, nn.Conv2d)] == widths
        assert count(model) == convolutional(widths, 3, 10)


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet20_halves_its_images_twice(channels, side):
    model = resnet20(7, channels)
    x = torch.randn(2, channels, side, side)
    assert model(x).shape == (2, 7)
    seen = seen_by(model, x, nn.Conv2d)
    sides = [*7 * [side], *6 * [side // 2], *6 * [side // 4]]
    assert seen == [(2, w, s, s) for w, s in zip(RESNET_WIDTHS, sides, strict=True)]
    assert len(modules(model, nn.Linear)) == 1 and len(modules(model, ResidualBlock)) == 9


@pytest.mark.parametrize("channels", [1, 3])
def test_vgg16_halves_its_images_five_times(channels):
    model = vgg16(7, channels, width=4)
    x = torch.randn(2, channels, 32, 32)
    assert model(x).shape == (2, 7)
    narrow = [width // 16 for width in VGG_WIDTHS]
    assert seen_by(model, x, nn.Conv2d) == [
        (2, w, s, s) for w, s in zip(narrow, VGG_SIDES, strict=True)
    ]
    assert [shape[-1] for shape in seen_by(model, x, nn.MaxPool2d)] == [16, 8, 4, 2, 1]
    assert len(modules(model, nn.Linear)) == 1


@pytest.mark.parametrize("side", [28, 8, 64])
def test_vgg16_says_that_images_of_another_size_are_not_for_it(side):
    with pytest.raises(ValueError, match=f"vgg16 needs images of 32×32; got {side}×{side}"):
        vgg16(width=1)(torch.randn(2, 3, side, side))


@pytest.mark.parametrize("shape", [(5, 784), (5, 1, 28, 28)])
def test_dense_networks_take_images_and_rows(shape):
    x = torch.randn(shape)
    for model, outputs in ((mlp(), 10), (autoencoder((784, 20, 3)), 784)):
        assert model(x).shape == (5, outputs)
        assert torch.equal(model(x), model(x.reshape(5, 784)))


# what they compute


@pytest.mark.parametrize(("c_in", "c_out", "stride"), [(3, 3, 1), (3, 6, 2), (2, 5, 2), (2, 4, 1)])
def test_the_shortcut_is_the_input_strided_and_padded_with_zero_channels(c_in, c_out, stride):
    block = ResidualBlock(c_in, c_out, stride)
    for conv in modules(block, nn.Conv2d):
        nn.init.zeros_(conv.weight)
    x = torch.randn(2, c_in, 7, 8)
    out = block(x)
    before = (c_out - c_in) // 2
    expected = torch.zeros(2, c_out, -(-7 // stride), -(-8 // stride))
    for c in range(c_in):
        for i in range(expected.shape[2]):
            for j in range(expected.shape[3]):
                expected[:, before + c, i, j] = x[:, c, stride * i, stride * j].clamp(min=0)
    assert torch.equal(out, expected)


def normed(x):
    """Mean 0 and variance 1 over a training batch; eps as torch's default."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def test_a_block_is_relu_of_shortcut_and_two_normed_convolutions():
    torch.manual_seed(0)
    block = ResidualBlock(2, 4, 2).double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    inside = normed(functional.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    inside = normed(functional.conv2d(inside, block.conv2.weight, padding=1))
    inside[:, 1:3] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), inside.clamp(min=0))


def test_around_its_blocks_resnet20_has_a_normed_convolution_and_a_mean():
    """Blocks with zero convolutions keep every second pixel, twice, and add zero channels."""
    torch.manual_seed(0)
    model = resnet20(3, channels=2, width=2).double()
    first, *others = modules(model, nn.Conv2d)
    for conv in others:
        nn.init.zeros_(conv.weight)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    stem = normed(functional.conv2d(x, first.weight, padding=1)).clamp(min=0)
    entering = []
    block = modules(model, ResidualBlock)[0]
    block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    means = torch.zeros(4, 8, dtype=torch.float64)
    means[:, 3:5] = sum(stem[:, :, i, j] for i in (0, 4) for j in (0, 4)) / 4
    (last,) = modules(model, nn.Linear)
    torch.testing.assert_close(model(x), means @ last.weight.T + last.bias)
    torch.testing.assert_close(entering, [stem])


def test_a_norm_and_a_relu_follow_every_convolution_of_vgg16():
    kinds = [type(module) for module in vgg16(width=1) if modules(module, nn.modules.Module)]
    places = [place for place, kind in enumerate(kinds) if kind is nn.Conv2d]
    assert len(places) == 13
    assert all(kinds[p : p + 3] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] for p in places)


def by_hand(model, x, activation, linear):
    """A dense network in NumPy; no activation after the layers whose numbers are in linear."""
    for number, layer in enumerate(modules(model, nn.Linear)):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        x = x if number in linear else activation(x)
    return x


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("tanh", np.tanh),
        ("relu", lambda s: np.where(s > 0, s, 0)),
        ("sigmoid", lambda s: 1 / (1 + np.exp(-s))),
    ],
)
def test_the_mlp_is_its_formula(activation, formula):
    model = mlp((20, 7, 6, 3), activation).double()
    x = np.random.default_rng(0).normal(size=(4, 20))
    ours = model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours, by_hand(model, x, formula, {2}), rtol=1e-12, atol=1e-12)


def test_the_mlp_has_tanh_unless_told():
    assert len(modules(mlp(), nn.Tanh)) == 2


def test_the_autoencoder_is_its_formula_with_a_linear_code_and_logits():
    """Of 8 layers the fourth, the code, and the last have no sigmoid."""
    torch.manual_seed(0)
    model = autoencoder((40, 20, 10, 7, 3)).double()
    sizes = [(layer.in_features, layer.out_features) for layer in modules(model, nn.Linear)]
    assert sizes == [(40, 20), (20, 10), (10, 7), (7, 3), (3, 7), (7, 10), (10, 20), (20, 40)]
    x = np.random.default_rng(0).normal(size=(4, 40))
    expected = by_hand(model, x, lambda s: 1 / (1 + np.exp(-s)), {3, 7})
    np.testing.assert_allclose(
        model(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-12, atol=1e-12
    )


# how they begin


def assert_variance(weight, expected, relative_variance):
    """Within five standard deviations of a sample variance of so many weights; the mean too."""
    n = weight.numel()
    error = 5 * (relative_variance / n) ** 0.5
    assert weight.square().mean().item() / expected == pytest.approx(1, abs=error)
    assert abs(weight.mean().item()) < 5 * (expected / n) ** 0.5


@pytest.mark.parametrize("make", [resnet20, lambda: vgg16(width=32)])
def test_convolutions_begin_by_the_rule_of_he(make):
    """Variance 2 over the fan out, 9 · channels; normal, whose squares have relative variance 2."""
    torch.manual_seed(0)
    for conv in modules(make(), nn.Conv2d):
        assert_variance(conv.weight.detach(), 2 / (9 * conv.out_channels), 2)


def test_the_autoencoder_begins_with_fifteen_weights_a_unit():
    """Standard normal ones, in places of their own for every unit; a narrow layer has all."""
    torch.manual_seed(0)
    for layer in modules(autoencoder(), nn.Linear):
        used = layer.weight != 0
        assert (used.sum(1) == 15).all()
        assert_variance(layer.weight[used].detach(), 1, 2)
        # each input is as likely as any: counts are binomial, here within six deviations
        share = 15 / layer.in_features
        deviation = (len(used) * share * (1 - share)) ** 0.5
        assert (used.sum(0) - len(used) * share).abs().max() < 6 * deviation
        assert not layer.bias.any()
    assert all((layer.weight != 0).all() for layer in modules(autoencoder((8, 6, 4)), nn.Linear))


@every_network
def test_the_seed_fixes_the_beginning(name):
    one, other = (parameters_of(build(name)[0]) for _ in range(2))
    assert torch.equal(one, other)


def parameters_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# how they train


def loss_of(name, model, x):
    if name == "autoencoder":
        target = x.sigmoid().flatten(1)
        return functional.binary_cross_entropy_with_logits(model(x), target)
    return functional.cross_entropy(model(x), torch.arange(len(x)) % 3)


@every_network
def test_every_parameter_gets_a_gradient(name):
    """Twice as wide as elsewhere: a single relu may well be off for a whole batch."""
    torch.manual_seed(0)
    wide = {
        "resnet20": lambda: resnet20(3, channels=2, width=4),
        "vgg16": lambda: vgg16(3, channels=2, width=4),
    }
    model, shape = wide.get(name, TINY[name][0])(), TINY[name][1]
    loss_of(name, model, torch.randn(8, *shape)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


@every_network
def test_tekfac_factors_every_layer_and_its_steps_lower_the_loss(name):
    model, shape = build(name)
    optimizer = TEKFAC(model, 0.01, damping=0.1)
    assert len(optimizer.layers) == len(modules(model, nn.Conv2d | nn.Linear))
    x, losses = torch.randn(8, *shape), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(name, model, x)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert parameters_of(model).isfinite().all()
    assert losses[2] < losses[0]
    for row in optimizer.report().rows:
        if row.treatment == "factored":
            assert np.isfinite([row.smallest, row.largest]).all()


# what can be wrong


@pytest.mark.parametrize("make", [resnet20, vgg16])
@pytest.mark.parametrize("argument", ["classes", "channels", "width"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_sizes_are_whole_numbers_from_1_on(make, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a whole number >= 1"):
        make(**{argument: value})


@pytest.mark.parametrize("make", [mlp, autoencoder])
@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((784,), "widths must name at least inputs and outputs"),
        ((), "widths must name at least inputs and outputs"),
        ((784, 0, 10), "widths must be a whole number >= 1; got 0"),
        ((784, 1.5), "widths must be a whole number >= 1; got 1.5"),
    ],
)
def test_widths_are_at_least_two_whole_numbers_from_1_on(make, widths, message):
    with pytest.raises(ValueError, match=message):
        make(widths)


def test_an_unknown_activation_gets_the_list():
    with pytest.raises(ValueError, match="activation must be one of 'tanh', 'relu', 'sigmoid'"):
        mlp(activation="gelu")
