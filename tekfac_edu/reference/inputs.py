"""What counts as valid input: arrays become float64, everything else gets an error that says why.

All maths after this page sees one format, whatever the caller had:

    a: (N, T, d_in)        the layer's inputs,           T = 1 without positions
    g: (S, N, T, d_out)    the layer's output gradients, S = 1 with one vector per example
"""

import numpy as np

from tekfac_edu.arguments import real_number


def finite_array(name, x, ndim=None, shape=None, square=False):
    """x as a non-empty, finite float64 array (integers and shorter floats convert exactly).

    Raises
    ------
    ValueError
        If x is not numeric, is empty, holds NaN or infinity, or is not of the ndim or the shape
        asked for, or not a square matrix where one is.
    """
    x, ndim = np.asarray(x), 2 if square else ndim
    if x.dtype.kind not in "iuf" or x.dtype.itemsize > 8:
        raise ValueError(f"{name} must hold real numbers that fit float64; its dtype is {x.dtype}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes; its shape is {x.shape}")
    if x.size == 0:
        raise ValueError(f"{name} must not be empty; its shape is {x.shape}")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise ValueError(f"{name} must be finite; {bad} of {x.size} entries are NaN or infinite")
    if square and x.shape[0] != x.shape[1]:
        raise ValueError(f"{name} must be square; its shape is {x.shape}")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; its shape is {x.shape}")
    return x


def random_generator(name, rng):
    """rng, if it is a numpy Generator; ValueError otherwise."""
    if not isinstance(rng, np.random.Generator):
        raise ValueError(
            f"{name} must be a numpy Generator (np.random.default_rng(0)); got {rng!r}"
        )
    return rng


def eigen_form(Q_in, Q_out, eigenvalues):
    """ValueError unless the three fit: (d_in, d_in), (d_out, d_out), (d_out, d_in) and >= 0."""
    Q_in = finite_array("Q_in", Q_in, square=True)
    Q_out = finite_array("Q_out", Q_out, square=True)
    D = finite_array("eigenvalues", eigenvalues, shape=(len(Q_out), len(Q_in)))
    if D.min() < 0:
        raise ValueError(f"eigenvalues must be >= 0; the smallest is {D.min():.1e}")


def enough_damping(damping, *spectra):
    """damping as a float >= 0; ValueError also if it is 0 while one of the spectra is singular.

    spectra : arrays of eigenvalues >= 0. Singular to rounding: numpy.linalg.matrix_rank's
        threshold, largest · size · epsilon.
    """
    damping = real_number("damping", damping, at_least=0)
    for s in spectra if damping == 0 else ():
        if s.min() <= s.max() * max(s.shape) * np.finfo(float).eps:
            raise ValueError(
                f"damping is 0 and the curvature is singular (smallest eigenvalue {s.min():.1e}, "
                f"largest {s.max():.1e}); give damping > 0"
            )
    return damping


def layer_inputs(a, g):
    """The pair (a, g) of one layer in the one format: (N, T, d_in) and (S, N, T, d_out).

    Parameters
    ----------
    a : (N, d_in) array, or (N, T, d_in) with T positions per example.
    g : same leading axes as a, then d_out; or one axis more in front, for S vectors per example.

    Raises
    ------
    ValueError
        If either is not numeric, empty, or not finite, or their axes do not match.
    """
    a, g = finite_array("a", a), finite_array("g", g)
    if a.ndim not in (2, 3):
        raise ValueError(
            f"a must be (N, d_in), or (N, T, d_in) with positions; its shape is {a.shape}"
        )
    if g.ndim not in (a.ndim, a.ndim + 1):
        raise ValueError(
            f"g must have as many axes as a ({a.ndim}), or one more in front for several vectors "
            f"per example; its shape is {g.shape}"
        )
    if g.ndim == a.ndim:
        g = g[None]
    if g.shape[1:-1] != a.shape[:-1]:
        raise ValueError(
            f"a and g must agree in every axis before the last (examples, positions); "
            f"a has {a.shape[:-1]}, g has {g.shape[1:-1]}"
        )
    if a.ndim == 2:
        a, g = a[:, None], g[:, :, None]
    return a, g
