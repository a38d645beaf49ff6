"""The networks of the experiments: an MLP, a deep auto-encoder, ResNet20 and VGG16.

    model = resnet20(classes=10)         x (N, C, H, W) -> logits (N, classes)
    model = autoencoder()                x (N, C, H, W) or (N, 784) -> logits of the pixels (N, 784)

Sources: K. He et al., arXiv 1512.03385, section 4.2 (ResNet20, parameter-free shortcuts);
K. Simonyan, A. Zisserman, arXiv 1409.1556, configuration D, with batch norm and one linear layer,
as is usual for 32×32; G. Hinton, R. Salakhutdinov, Science 313 (2006) (the auto-encoder).
"""

from itertools import pairwise

from torch import nn
from torch.nn import functional

from tekfac_edu.arguments import one_of, whole_number

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def mlp(widths=(784, 256, 128, 10), activation="tanh"):
    """Linear layers of these widths, input first; images are flattened."""
    layers = _dense(widths, ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)])
    return nn.Sequential(nn.Flatten(), *layers)


def autoencoder(widths=(784, 1000, 500, 250, 30)):
    """The 8-layer auto-encoder 784-1000-500-250-30 and back: sigmoids, but a linear code.

    Each unit starts with 15 weights drawn from N(0, 1) and the rest 0 (J. Martens, Deep learning
    via Hessian-free optimization, ICML 2010, section 5): with the small dense weights of usual
    rules, deep sigmoid layers say the same for every image, and training rests on a plateau.
    """
    encoder, decoder = _dense(widths, nn.Sigmoid), _dense(widths[::-1], nn.Sigmoid)
    model = nn.Sequential(nn.Flatten(), *encoder, *decoder)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.sparse_(module.weight.data.T, max(0, 1 - 15 / module.in_features), std=1.0)
            nn.init.zeros_(module.bias)
    return model


def _dense(widths, activation):
    if len([whole_number("widths", width, 1) for width in widths]) < 2:
        raise ValueError(f"widths must name at least inputs and outputs; got {widths}")
    layers = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return layers[:-1]


class ResidualBlock(nn.Module):
    """x ↦ relu(x' + conv(relu(conv(x)))), batch norm after each; x' = x, strided and padded."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.norm2 = _conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.stride, self.more_channels = stride, c_out - c_in

    def forward(self, x):
        inside = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.more_channels // 2
        after = self.more_channels - before
        return (inside + functional.pad(shortcut, (0, 0, 0, 0, before, after))).relu()


def resnet20(classes=10, channels=3, width=16):
    """ResNet20 for small images: three stages of three blocks, of width, 2 and 4 times width.

    With width 16 and 3 channels it has 269,722 parameters for 10 classes.
    """
    _check_sizes(classes, channels, width)
    layers = [_conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
    c_in = width
    for stage, c_out in enumerate((width, 2 * width, 4 * width)):
        for block in range(3):
            layers.append(ResidualBlock(c_in, c_out, 2 if stage > 0 and block == 0 else 1))
            c_in = c_out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes)]
    return _he_initialized(nn.Sequential(*layers))


VGG16 = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")


def vgg16(classes=10, channels=3, width=64):
    """VGG16 with batch norm for images of 32×32: 13 convolutions and one linear layer.

    With width 64 and 3 channels it has 14,724,042 parameters for 10 classes.
    """
    _check_sizes(classes, channels, width)
    layers: list[nn.Module] = [Only32x32()]
    c_in = channels
    for times in VGG16:
        if times == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        c_out = times * width
        layers += [_conv3x3(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU()]
        c_in = c_out
    return _he_initialized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(c_in, classes)))


class Only32x32(nn.Module):
    """x ↦ x; what five poolings do not reduce to one pixel is refused before they try."""

    def forward(self, x):
        if x.shape[-2:] != (32, 32):
            raise ValueError(f"vgg16 needs images of 32×32; got {x.shape[-2]}×{x.shape[-1]}")
        return x


def _check_sizes(classes, channels, width):
    whole_number("classes", classes, 1)
    whole_number("channels", channels, 1)
    whole_number("width", width, 1)


def _conv3x3(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def _he_initialized(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
