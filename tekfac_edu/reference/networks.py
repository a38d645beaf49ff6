"""A small multilayer perceptron that hands out what every method here is made of.

    s_l = W_l ā_l          ā_l = (φ(s_{l-1}), 1),  the bias is the last column of W_l

Per example and layer: the input ā_n and the gradient g_n of that example's own loss with respect
to s_n. Everything else in this package is a function of those two. Beside chapter 2.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.special import expit, log_softmax, softmax

from tekfac_edu.arguments import one_of, whole_number
from tekfac_edu.reference.inputs import finite_array, random_generator

# name: (φ(s), φ'(s) given φ(s)); relu's derivative at 0 is 0
ACTIVATIONS = {
    "tanh": (np.tanh, lambda h: 1 - h**2),
    "relu": (lambda s: np.maximum(s, 0), lambda h: (h > 0).astype(float)),
    "sigmoid": (expit, lambda h: h * (1 - h)),
    "identity": (lambda s: s, np.ones_like),
}
LOSSES = ("cross_entropy", "squared_error")
FISHERS = ("exact", "mc", "empirical")


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's share of a forward and a backward pass.

    Attributes
    ----------
    a : (N, d_in) array, inputs with a 1 appended for the bias.
    g : (N, d_out) array, or (S, N, d_out) with S vectors per example; each example's own gradient.
    """

    a: np.ndarray
    g: np.ndarray


class MLP:
    """A fully connected network; the last layer is linear (logits, or the mean of a Gaussian).

    Parameters
    ----------
    widths : sequence of ints, inputs first, outputs last, e.g. (16, 8, 10).
    activation : "tanh", "relu", "sigmoid" or "identity", of every hidden layer.
    rng : numpy Generator, or an integer seed. Weights are drawn from N(0, 1/d_in), biases are 0.

    Attributes
    ----------
    weights : list of (d_out, d_in + 1) arrays, bias last column. Change them freely.
    """

    def __init__(self, widths, activation="tanh", rng=0):
        widths = [whole_number("widths", width, 1) for width in widths]
        if len(widths) < 2:
            raise ValueError(f"widths must name at least inputs and outputs; got {widths}")
        self.widths = widths
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.weights = initial_weights(pairwise(widths), rng)

    def forward(self, x):
        """Outputs z: (N, widths[0]) -> (N, C)."""
        return self._layer_inputs(x)[1]

    def loss(self, x, y, loss="cross_entropy"):
        """The mean over examples of −log p(y|x), or of ½‖z − y‖² (a float).

        y : (N,) integer labels for "cross_entropy", (N, C) floats for "squared_error".
        """
        return mean_loss(self.forward(x), y, loss)

    def gradients(self, x, y, loss="cross_entropy"):
        """Gradients of the mean loss: a list of (d_out, d_in + 1) arrays, as `weights`."""
        return [
            statistics.g.T @ statistics.a / len(statistics.a)
            for statistics in self.layer_statistics(x, y, fisher="empirical", loss=loss)
        ]

    def layer_statistics(
        self, x, y=None, fisher="exact", loss="cross_entropy", rng=None, num_samples=1
    ):
        """Inputs a and output gradients g of every layer, for one of three Fishers (chapter 2).

        Parameters
        ----------
        x : (N, widths[0]) array.
        y : targets as for `loss`; needed and used by fisher="empirical" only.
        fisher : which vectors each example sends back:
            "exact": g (C, N, d_out), for every class c, √p(c|x) ∂(−log p(c|x))/∂s; for squared
            error ∂z_c/∂s. The Fisher's expectation over labels, taken exactly.
            "mc": g (num_samples, N, d_out), labels drawn from the model's own distribution, each
            vector divided by √num_samples.
            "empirical": g (N, d_out), the data's labels.
        loss : "cross_entropy", or "squared_error" (½‖z − y‖²: a Gaussian of unit variance).
        rng : numpy Generator, needed by fisher="mc" only.

        Returns
        -------
        list of LayerStatistics, first layer first.
        """
        inputs, z = self._layer_inputs(x)
        output_g = output_gradients(z, y, fisher, loss, rng, num_samples)
        return [
            LayerStatistics(a, g)
            for a, g in zip(inputs, self._backward(inputs, output_g), strict=True)
        ]

    def _layer_inputs(self, x):
        """Every layer's ā, a list of (N, d_in + 1) arrays, and the outputs z, (N, C)."""
        x = finite_array("x", x, ndim=2)
        if x.shape[1] != self.widths[0]:
            raise ValueError(
                f"x must be (N, {self.widths[0]}) for this network; its shape is {x.shape}"
            )
        phi, _ = ACTIVATIONS[self.activation]
        inputs, h = [], x
        for layer, W in enumerate(self.weights):
            inputs.append(append_one(h))
            s = inputs[-1] @ W.T
            h = phi(s) if layer < len(self.weights) - 1 else s
        return inputs, h

    def _backward(self, inputs, g):
        """From ∂ℓ_n/∂z_n, (..., N, C), to every layer's g, first layer first."""
        _, slope = ACTIVATIONS[self.activation]
        gradients = [g]
        for W, a in zip(self.weights[:0:-1], inputs[:0:-1], strict=True):
            gradients.append((gradients[-1] @ W[:, :-1]) * slope(a[:, :-1]))
        return gradients[::-1]


def append_one(h):
    """(..., d) -> (..., d + 1): the 1 that the bias multiplies, in the last place."""
    return np.concatenate([h, np.ones((*h.shape[:-1], 1))], axis=-1)


def initial_weights(sizes, rng):
    """A (d_out, d_in + 1) array for each (d_in, d_out): entries from N(0, 1/d_in), biases 0.

    rng : numpy Generator, or an integer seed.
    """
    if not isinstance(rng, np.random.Generator):
        rng = np.random.default_rng(whole_number("rng (a numpy Generator or a seed)", rng, 0))
    return [
        np.hstack([rng.normal(0, d_in**-0.5, (d_out, d_in)), np.zeros((d_out, 1))])
        for d_in, d_out in sizes
    ]


def mean_loss(z, y, loss):
    """The mean over examples of a network's outputs z, (N, C), as in `MLP.loss`."""
    y = _targets(y, z, one_of("loss", loss, LOSSES))
    if loss == "cross_entropy":
        return float(-log_softmax(z, axis=1)[np.arange(len(z)), y].mean())
    return float(0.5 * np.sum((z - y) ** 2) / len(z))


def output_gradients(z, y, fisher, loss, rng, num_samples):
    """What the outputs z, (N, C), send back: (S, N, C), or (N, C) for the empirical Fisher.

    Arguments as in `MLP.layer_statistics`, which hands this on to every layer.
    """
    one_of("fisher", fisher, FISHERS)
    one_of("loss", loss, LOSSES)
    if fisher == "exact":
        return _every_class(z, loss)
    if fisher == "mc":
        return _sampled(z, loss, rng, whole_number("num_samples", num_samples, 1))
    if y is None:
        raise ValueError('fisher="empirical" uses the data\'s labels: give y')
    y = _targets(y, z, loss)
    return softmax(z, axis=1) - np.eye(z.shape[1])[y] if loss == "cross_entropy" else z - y


def _every_class(z, loss):
    """(C, N, C): the vectors whose second moment is the exact Fisher of the outputs."""
    N, C = z.shape
    one_hot = np.broadcast_to(np.eye(C)[:, None], (C, N, C))
    if loss == "squared_error":
        return one_hot.copy()
    p = softmax(z, axis=1)
    return np.sqrt(p.T)[..., None] * (p - one_hot)


def _sampled(z, loss, rng, num_samples):
    """(S, N, C): gradients for labels drawn from the model, over √S."""
    rng = random_generator('rng, which fisher="mc" draws labels with,', rng)
    if loss == "squared_error":
        return rng.standard_normal((num_samples, *z.shape)) / np.sqrt(num_samples)
    p = softmax(z, axis=1)
    labels = (p.cumsum(axis=1) / p.sum(axis=1, keepdims=True))[None] < rng.random(
        (num_samples, len(z), 1)
    )
    return (p - np.eye(z.shape[1])[labels.sum(axis=2)]) / np.sqrt(num_samples)


def _targets(y, z, loss):
    """y, checked against the outputs z: (N,) labels below C, or (N, C) floats."""
    if loss == "squared_error":
        return finite_array("y", y, shape=z.shape)
    y = np.asarray(y)
    if y.shape != (len(z),) or y.dtype.kind not in "iu":
        raise ValueError(
            f"y must be {len(z)} integer labels, one per row of x; "
            f"got dtype {y.dtype}, shape {y.shape}"
        )
    if y.min() < 0 or y.max() >= z.shape[1]:
        raise ValueError(
            f"y must hold labels from 0 to {z.shape[1] - 1}; it holds {y.min()} to {y.max()}"
        )
    return y
