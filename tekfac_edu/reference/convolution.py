"""Convolutions as what they are here: one linear map used at T positions of every example.

    s_nt = W ā_nt        ā_nt the patch of example n at position t, unrolled, with its 1
    G_n = Σ_t g_nt ā_ntᵀ                the gradient of example n's own loss with respect to W

After `patches` no formula of this package needs to know that there was an image: factors, Fisher
block and corrected eigenvalues take (N, T, d) as they are. Beside chapter 11.
"""

from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tekfac_edu.arguments import one_of, whole_number
from tekfac_edu.reference.inputs import finite_array
from tekfac_edu.reference.networks import (
    ACTIVATIONS,
    LayerStatistics,
    append_one,
    initial_weights,
    mean_loss,
    output_gradients,
)

# as everybody calls it: as np.pad calls it
PADDING_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}
READOUTS = ("flatten", "mean")


def patches(x, kernel_size, stride=1, padding=0, dilation=1, padding_mode="zeros"):
    """What the kernel sees at every position, one row each.

    Parameters
    ----------
    x : (N, C, height, width) array of images.
    kernel_size, stride, dilation : whole numbers >= 1, or pairs of them (vertical, horizontal).
    padding : whole number >= 0, or a pair; or "valid" (none); or "same" (as many positions as
        pixels, stride 1 only; an odd element goes to the bottom and to the right).
    padding_mode : "zeros", "reflect", "replicate" or "circular".

    Returns
    -------
    (N, T, C · kernel height · kernel width) array. Positions are in reading order; a row has
    channel by channel the kernel's rows, as the kernel itself when it is flattened. No 1 for the
    bias.

    Raises
    ------
    ValueError
        If an argument is not of this kind, or the padded image is smaller than the kernel, or
        reflected or circular padding asks for more than the image has.
    """
    x = finite_array("x", x, ndim=4)
    kernel = _pair("kernel_size", kernel_size, 1)
    stride = _pair("stride", stride, 1)
    dilation = _pair("dilation", dilation, 1)
    before_and_after = _padding(padding, kernel, stride, dilation)
    mode = one_of("padding_mode", padding_mode, PADDING_MODES)
    _refuse_more_than_there_is(before_and_after, mode, x.shape[2:])
    x = np.pad(x, ((0, 0), (0, 0), *before_and_after), mode=PADDING_MODES[mode])
    span = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    if any(s > size for s, size in zip(span, x.shape[2:], strict=True)):
        raise ValueError(
            f"kernel_size {kernel} with dilation {dilation} spans {span} pixels; "
            f"the padded image has {x.shape[2:]}"
        )
    windows = sliding_window_view(x, span, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    N, C, down, across, *_ = windows.shape
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(N, down * across, C * kernel[0] * kernel[1])


class ConvNet:
    """A convolution, a nonlinearity, a dense layer: the smallest network with shared weights.

    Parameters
    ----------
    image_shape : (C, height, width), whole numbers >= 1.
    channels, outputs : of the convolution and of the dense layer, whole numbers >= 1.
    kernel_size, stride, padding, dilation, padding_mode : as for `patches`.
    activation : as for `MLP`.
    readout : "flatten", every position keeps a place of its own in the input of the dense layer
        (channel by channel, positions in reading order); or "mean", the mean over positions.
    rng : numpy Generator, or an integer seed. Weights are drawn from N(0, 1/d_in), biases are 0.

    Attributes
    ----------
    weights : list of two (d_out, d_in + 1) arrays, bias last column. Change them freely.
        The first is (channels, C · kernel height · kernel width + 1), used at T positions.
    """

    def __init__(
        self,
        image_shape,
        channels,
        outputs,
        kernel_size=3,
        *,
        stride=1,
        padding=0,
        dilation=1,
        padding_mode="zeros",
        activation="tanh",
        readout="flatten",
        rng=0,
    ):
        image_shape = tuple(whole_number("image_shape", size, 1) for size in image_shape)
        if len(image_shape) != 3:
            raise ValueError(f"image_shape must be (C, height, width); got {image_shape}")
        self.image_shape = image_shape
        self.channels = whole_number("channels", channels, 1)
        outputs = whole_number("outputs", outputs, 1)
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.readout = one_of("readout", readout, READOUTS)
        self._patches = partial(
            patches,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
        )
        _, T, d_in = self._patches(np.zeros((1, *image_shape))).shape
        features = self.channels * (T if readout == "flatten" else 1)
        self.weights = initial_weights([(d_in, self.channels), (features, outputs)], rng)

    def forward(self, x):
        """Outputs z: (N, C, height, width) -> (N, outputs)."""
        return self._layer_inputs(x)[2]

    def loss(self, x, y, loss="cross_entropy"):
        """The mean over examples, a float; y and loss as for `MLP.loss`."""
        return mean_loss(self.forward(x), y, loss)

    def gradients(self, x, y, loss="cross_entropy"):
        """Gradients of the mean loss: a list of (d_out, d_in + 1) arrays, as `weights`."""
        return [
            np.tensordot(s.g, s.a, axes=(range(s.a.ndim - 1),) * 2) / len(s.a)
            for s in self.layer_statistics(x, y, fisher="empirical", loss=loss)
        ]

    def layer_statistics(
        self, x, y=None, fisher="exact", loss="cross_entropy", rng=None, num_samples=1
    ):
        """Inputs a and output gradients g of both layers; arguments as for `MLP.layer_statistics`.

        Returns
        -------
        list of two LayerStatistics. The convolution's have positions: a (N, T, d_in) and g
        (N, T, channels), or (S, N, T, channels) with S vectors per example. The dense layer's
        have none.
        """
        inputs, h, z = self._layer_inputs(x)
        output_g = output_gradients(z, y, fisher, loss, rng, num_samples)
        hidden_g = self._back_to_positions(output_g @ self.weights[1][:, :-1], len(h[0]))
        _, slope = ACTIVATIONS[self.activation]
        return [
            LayerStatistics(inputs[0], hidden_g * slope(h)),
            LayerStatistics(inputs[1], output_g),
        ]

    def _layer_inputs(self, x):
        """Both layers' ā, the convolution's activations h (N, T, channels), the outputs z."""
        x = finite_array("x", x, ndim=4)
        if x.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must be (N, {wanted}) for this network; its shape is {x.shape}")
        phi, _ = ACTIVATIONS[self.activation]
        a = append_one(self._patches(x))
        h = phi(a @ self.weights[0].T)
        features = h.mean(axis=1) if self.readout == "mean" else h.mT.reshape(len(h), -1)
        b = append_one(features)
        return [a, b], h, b @ self.weights[1].T

    def _back_to_positions(self, g, T):
        """From the dense layer's input, (..., features), to every position: (..., T, channels)."""
        if self.readout == "mean":
            return np.repeat(g[..., None, :] / T, T, axis=-2)
        return g.reshape(*g.shape[:-1], self.channels, T).mT


def _pair(name, value, at_least):
    """(vertical, horizontal), from one whole number or from two."""
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a whole number or a pair of them; got {value!r}")
    return tuple(whole_number(name, size, at_least) for size in pair)


def _padding(padding, kernel, stride, dilation):
    """((top, bottom), (left, right))."""
    if not isinstance(padding, str):
        return tuple((size, size) for size in _pair("padding", padding, 0))
    if one_of("padding", padding, ("same", "valid")) == "valid":
        return (0, 0), (0, 0)
    if stride != (1, 1):
        raise ValueError(f'padding="same" needs stride 1; got padding="same" and stride {stride}')
    totals = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return tuple((total // 2, total - total // 2) for total in totals)


def _refuse_more_than_there_is(before_and_after, mode, sizes):
    """ValueError where an image is too small to be reflected or wrapped round so far."""
    spare = {"reflect": 1, "circular": 0}.get(mode)
    if spare is None:
        return
    for pair, size in zip(before_and_after, sizes, strict=True):
        if max(pair) > size - spare:
            raise ValueError(
                f'padding must be at most {size - spare} for padding_mode="{mode}" on an image '
                f"with a side of {size}; got {max(pair)}"
            )
