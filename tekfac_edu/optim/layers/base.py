"""What every factored layer is, whatever its kind: the one format that all maths here sees.

    a: (N, T, d_in)        the layer's inputs, a 1 appended if it has a bias
    g: (S, N, T, d_out)    its output gradients, S vectors per example
    M: (d_out, d_in)       its gradient, the bias as the last column

In this format every layer is s = W ā at T positions, and example n's gradient is
G_n = Σ_t g_nt ā_ntᵀ. A layer that is B independent maps side by side (a convolution in groups) has
an axis more in front of all three; what is said of a layer's matrices is then said of each block.
"""

import math

import torch

KINDS: list[
    type["Layer"]
] = []  # the classes that derive from Layer, in the order in which they were defined


class Layer:
    """A factored module. A kind says what is marked "of the kind" below.

    Attributes
    ----------
    name : as in `model.named_modules()`.
    module : of one of the kind's types.
    has_bias : whether the bias is factored with the weight, as the last column of M.
    weight, bias : its factored parameters; bias is None without has_bias.
    d_in, d_out : sizes, the bias counted in d_in; of one block.
    shape : of M, (d_out, d_in) or (B, d_out, d_in).
    dtype : of its statistics: float64 if the weight is, else float32.
    blocks : B, how many independent maps it is made of; None: one, without an axis for them.
    is_convolution : of the kind; TEKFAC (3.5) damps convolutions by their own traces.
    """

    is_convolution = False

    def __init_subclass__(cls):
        KINDS.append(cls)

    def __init__(self, name, module, has_bias):
        self.name, self.module, self.has_bias = name, module, has_bias
        self.weight, self.bias = module.weight, module.bias if has_bias else None
        self.blocks = self.blocks_of(module)
        blocks = () if self.blocks is None else (self.blocks,)
        self.d_out = len(self.weight) // (self.blocks or 1)
        self.d_in = self.weight[0].numel() + has_bias
        self.shape = (*blocks, self.d_out, self.d_in)
        self.dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def __str__(self):
        return f"{self.name} ({type(self.module).__name__})"

    # of the kind

    @staticmethod
    def accepts(module):
        """Whether a module is of this kind."""
        raise NotImplementedError

    @staticmethod
    def refusal(module):
        """Why a module that a reader would expect this kind to factor is not; None otherwise."""
        return None

    @staticmethod
    def blocks_of(module):
        """How many independent maps the module is made of; None: one."""
        return None

    def batched(self, tensor):
        """An input or output with a first axis for the examples, one if it had none."""
        raise NotImplementedError

    def positions(self, g):
        """(height, width) of the positions, from a gradient at the output; T is their product.

        All but two-dimensional convolutions have height 1.
        """
        raise NotImplementedError

    def inputs(self, x, grid=None):
        """a: (N, T, d_in), from a tensor that the module was called with, in `dtype`.

        grid : `Grid` of the positions wanted, all numbers times the root of its share: sums over
            positions of products of two keep their expectation. None: all.
        """
        raise NotImplementedError

    def gradients(self, g, grid=None):
        """(N, T, d_out), from the gradient at the module's output, in `dtype`."""
        raise NotImplementedError

    # of all kinds

    def each_block(self, formula):
        """A formula of one block's tensors, made one of all blocks' at once."""
        return formula if self.blocks is None else torch.vmap(formula)

    def example_gradients(self, x, g):
        """G_n of every example, from one call of the module: (S, N, d_out, d_in).

        x : the module's input.   g : list of S tensors, the gradients at its output.
        """
        a = self.inputs(x)
        g = torch.stack([self.gradients(vector) for vector in g], -4)
        return self.each_block(lambda a, g: g.mT @ a)(a, g)

    def gradient(self):
        """M: (d_out, d_in), from `.grad` of weight and bias; None if neither has one.

        Raises
        ------
        RuntimeError
            If only one of the two has one.
        """
        gradient = self.weight.grad
        if self.has_bias and (gradient is None) != (self.bias.grad is None):
            raise RuntimeError(
                f"{self} has a gradient for only one of its weight and bias, which are factored "
                f"together; after freezing or unfreezing parameters, build a new optimizer"
            )
        if gradient is None:
            return None
        M = gradient.flatten(1).to(self.dtype)
        if self.has_bias:
            M = torch.cat([M, self.bias.grad[:, None].to(self.dtype)], 1)
        return M.reshape(self.shape)

    def parts(self, direction):
        """What of a (d_out, d_in) direction belongs to each parameter: {parameter: its shape}."""
        direction = direction.reshape(-1, self.d_in)
        if not self.has_bias:
            return {self.weight: direction.reshape(self.weight.shape)}
        return {
            self.weight: direction[:, :-1].reshape(self.weight.shape),
            self.bias: direction[:, -1],
        }


def factored_layer(name, module, has_bias):
    """The `Layer` of a module; None if no kind accepts it."""
    kind = kind_of(module)
    return kind and kind(name, module, has_bias)


def kind_of(module):
    """The class that derives from `Layer` for a module; None if no kind accepts it."""
    return next((kind for kind in KINDS if kind.accepts(module)), None)


def refusal(module):
    """Why a module that a reader would expect to be factored cannot be; None if it can, or if
    nobody would (norms, embeddings)."""
    return next(filter(None, (kind.refusal(module) for kind in KINDS)), None)


def scaled_to_grid(x, grid):
    """x times the root of the grid's share; x itself without a grid."""
    return x if grid is None else math.sqrt(grid.share) * x
