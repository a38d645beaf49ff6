"""Slow versions of the formulas, loop by loop, that share no line with the package they check.

    F = E_n[Σ_s vec(G_sn) vec(G_sn)ᵀ],   G_sn = Σ_t g_snt ā_ntᵀ

vec stacks columns: entry (i, j) of a (d_out, d_in) matrix has place j·d_out + i.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Batch:
    """Sizes of a batch; T or S None leaves that axis out."""

    name: str
    N: int
    d_in: int
    d_out: int
    T: int | None = None
    S: int | None = None
    scale_a: float = 1.0
    scale_g: float = 1.0
    seed: int = 0

    def draw(self):
        """a and g, correlated, the length of the rows uneven from example to example."""
        rng = np.random.default_rng(self.seed)
        T, S = self.T or 1, self.S or 1
        length = np.exp(rng.normal(size=(self.N, 1, 1)))
        a = length * rng.normal(size=(self.N, T, self.d_in))
        mixing = rng.normal(size=(S, self.d_in, self.d_out))
        noise = rng.normal(size=(S, self.N, T, self.d_out))
        g = np.einsum("nti,sio->snto", a, mixing) + length * noise
        a, g = self.scale_a * a, self.scale_g * g
        if self.T is None:
            a, g = a[:, 0], g[:, :, 0]
        return a, (g[0] if self.S is None else g)


SHAPES = [
    Batch("plain", N=6, d_in=4, d_out=3),
    Batch("positions", N=5, d_in=3, d_out=4, T=3),
    Batch("vectors", N=6, d_in=4, d_out=3, S=3),
    Batch("vectors and positions", N=4, d_in=3, d_out=2, T=3, S=2),
    Batch("one example", N=1, d_in=3, d_out=4),
    Batch("one example, vectors", N=1, d_in=3, d_out=4, S=2),
    Batch("rank deficient", N=2, d_in=5, d_out=4),
    Batch("one input, one output", N=5, d_in=1, d_out=1),
    Batch("axes of length one", N=5, d_in=3, d_out=2, T=1, S=1),
]
SCALES = [(1e-30, 1e-30), (1e12, 1e12), (1e-30, 1e12), (1e12, 1e-30), (1.0, 1e-30), (1e12, 1.0)]
SCALED = [
    Batch(f"{s.name}, a×{x:g}, g×{y:g}", s.N, s.d_in, s.d_out, s.T, s.S, x, y)
    for s, (x, y) in itertools.product((SHAPES[0], SHAPES[3]), SCALES)
]
BATCHES = SHAPES + SCALED


@st.composite
def batches(draw, positions=True, vectors=True, scales=True, max_N=8, min_N=1):
    """Any batch of a few examples: a strategy for Hypothesis."""
    scale = st.sampled_from([1.0, 1e-30, 1e12] if scales else [1.0])
    return Batch(
        "drawn",
        N=draw(st.integers(min_N, max_N)),
        d_in=draw(st.integers(1, 5)),
        d_out=draw(st.integers(1, 4)),
        T=draw(st.none() | st.integers(1, 3)) if positions else None,
        S=draw(st.none() | st.integers(1, 3)) if vectors else None,
        scale_a=draw(scale),
        scale_g=draw(scale),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_close(actual, expected, rtol=1e-12):
    """Shape, float64, and every entry within rtol of the largest expected one.

    1e-12: sums of at most a few hundred products, 2.2e-16 each, signs may cancel. Relative to
    the largest entry and with no absolute part, so that 1e-120 is not taken for zero.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == np.float64, f"dtype {actual.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    scale = np.abs(expected).max()
    worst = np.abs(actual - expected).max()
    assert worst <= rtol * scale, f"differs by {worst:.3e}, largest entry {scale:.3e}"


def full_axes(a, g):
    """(N, T, d_in) and (S, N, T, d_out), whatever axes were left out."""
    vectors = g if g.ndim == a.ndim + 1 else g[None]
    if a.ndim == 2:
        return a[:, None, :], vectors[:, :, None, :]
    return a, vectors


def gradients_by_loops(a, g):
    """G_sn = Σ_t g_snt a_ntᵀ: (S, N, d_out, d_in)."""
    a, g = full_axes(a, g)
    (S, N, T, d_out), d_in = g.shape, a.shape[2]
    G = np.zeros((S, N, d_out, d_in))
    for s, n, t, i, j in itertools.product(*map(range, (S, N, T, d_out, d_in))):
        G[s, n, i, j] += g[s, n, t, i] * a[n, t, j]
    return G


def fisher_by_loops(a, g):
    """The layer's block, entry by entry."""
    G = gradients_by_loops(a, g)
    S, N, d_out, d_in = G.shape
    F = np.zeros((d_in * d_out, d_in * d_out))
    entries = list(itertools.product(range(d_out), range(d_in)))
    for n, s in itertools.product(range(N), range(S)):
        for (i, j), (k, m) in itertools.product(entries, entries):
            F[j * d_out + i, m * d_out + k] += G[s, n, i, j] * G[s, n, k, m] / N
    return F


def kfac_factors_by_loops(a, g):
    """A = E[Σ_t ā āᵀ], G = E[(1/T) Σ_t Σ_s g gᵀ]."""
    a, g = full_axes(a, g)
    S, N, T, d_out = g.shape
    A, G = np.zeros((a.shape[2],) * 2), np.zeros((d_out, d_out))
    for n, t in itertools.product(range(N), range(T)):
        for i, j in itertools.product(range(a.shape[2]), repeat=2):
            A[i, j] += a[n, t, i] * a[n, t, j] / N
        for s, i, j in itertools.product(range(S), range(d_out), range(d_out)):
            G[i, j] += g[s, n, t, i] * g[s, n, t, j] / (N * T)
    return A, G


def trace_restricted_numerators_by_loops(a, g):
    """δ, δΦ and δΨ: means of per-example (and per-position) products, traces inside the mean."""
    a, g = full_axes(a, g)
    S, N, T, d_out = g.shape
    d_in = a.shape[2]
    delta, left, right = 0.0, np.zeros((d_in, d_in)), np.zeros((d_out, d_out))
    for n, t in itertools.product(range(N), range(T)):
        trace_in = sum(a[n, t, i] ** 2 for i in range(d_in))
        trace_out = sum(g[s, n, t, i] ** 2 for s in range(S) for i in range(d_out))
        delta += trace_in * trace_out / N
        for i, j in itertools.product(range(d_in), repeat=2):
            left[i, j] += trace_out * a[n, t, i] * a[n, t, j] / N
        for s, i, j in itertools.product(range(S), range(d_out), range(d_out)):
            right[i, j] += trace_in * g[s, n, t, i] * g[s, n, t, j] / N
    return delta, left, right


def corrected_eigenvalues_by_loops(a, g, Q_in, Q_out):
    """E_n[Σ_s (q_outᵢᵀ G_sn q_inⱼ)²]: (d_out, d_in)."""
    G = gradients_by_loops(a, g)
    S, N, d_out, d_in = G.shape
    D = np.zeros((d_out, d_in))
    for s, n, i, j in itertools.product(*map(range, (S, N, d_out, d_in))):
        D[i, j] += (Q_out[:, i] @ G[s, n] @ Q_in[:, j]) ** 2 / N
    return D


def vec_by_loops(M):
    """Columns one after another."""
    return np.array([M[i, j] for j in range(M.shape[1]) for i in range(M.shape[0])])


def unvec_by_loops(v, d_out, d_in):
    """The matrix whose columns, one after another, are v."""
    M = np.zeros((d_out, d_in))
    for j, i in itertools.product(range(d_in), range(d_out)):
        M[i, j] = v[j * d_out + i]
    return M


def rearranged_by_loops(F, d_in, d_out):
    """R with F = A ⊗ B ⇔ R = vec(A) vec(B)ᵀ: every d_out × d_out block of F becomes a row."""
    R = np.zeros((d_in * d_in, d_out * d_out))
    for p, q in itertools.product(range(d_in), repeat=2):
        for i, k in itertools.product(range(d_out), repeat=2):
            R[q * d_in + p, k * d_out + i] = F[p * d_out + i, q * d_out + k]
    return R


def random_orthogonal(rng, d):
    """An orthogonal matrix with no direction preferred."""
    Q, R = np.linalg.qr(rng.normal(size=(d, d)))
    return Q * np.sign(np.diag(R))


def random_semidefinite(rng, d, rank=None):
    """X Xᵀ / rank, X Gaussian."""
    X = rng.normal(size=(d, rank or d + 2))
    return X @ X.T / X.shape[1]


def solve_dense(F, M):
    """M (d_out, d_in) ↦ unvec(F⁻¹ vec M), by a dense solve."""
    return unvec_by_loops(np.linalg.solve(F, vec_by_loops(M)), *M.shape)


class DenseLayer:
    """One layer's damped matrix between steps by the rules of the papers, dense, nothing clever."""

    def __init__(self, method, interval=(1, 1, 1), decay=0.95, basis="eigh"):
        self.method, self.interval, self.decay, self.basis = method, interval, decay, basis
        self.numerators = self.factors = self.bases = self.measured = None

    def averaged(self, old, new):
        if old is None:
            return new
        return tuple(self.decay * x + (1 - self.decay) * y for x, y in zip(old, new, strict=True))

    def update(self, k, a, g):
        """Step k with this batch."""
        factors, bases, eigenvalues = self.interval
        of_independence = self.method in ("kfac", "ekfac")
        if k % factors == 0:
            rule = (
                kfac_factors_by_loops if of_independence else trace_restricted_numerators_by_loops
            )
            self.numerators = self.averaged(self.numerators, rule(a, g))
        if k % bases == 0:
            if of_independence:
                self.factors = (1.0, *self.numerators)
            else:
                delta, left, right = self.numerators
                self.factors = delta, left / delta, right / delta
            if self.measured is None or self.basis == "eigh":
                self.bases = [np.linalg.eigh(S)[1] for S in self.factors[1:]]
            else:
                self.bases = [
                    np.linalg.qr(S @ Q[:, np.argsort(-np.diag(Q.T @ S @ Q))])[0]
                    for S, Q in zip(self.factors[1:], self.bases, strict=True)
                ]
            if self.measured is not None:
                Q = np.kron(*self.bases)
                self.measured = Q * np.diag(Q.T @ self.measured @ Q) @ Q.T
        if k % eigenvalues == 0:
            D = corrected_eigenvalues_by_loops(a, g, *self.bases)
            Q = np.kron(*self.bases)
            old = None if self.measured is None else (self.measured,)
            self.measured = self.averaged(old, (Q * vec_by_loops(D) @ Q.T,))[0]

    def undamped(self):
        """The method's approximation of the layer's block."""
        if self.method in ("ekfac", "tekfac"):
            return self.measured
        delta, left, right = self.factors
        return delta * np.kron(left, right)

    def damped(self, damping):
        """What the method's paper inverts."""
        delta, left, right = self.factors
        I_in, I_out, root = np.eye(len(left)), np.eye(len(right)), np.sqrt(damping)
        if self.method in ("ekfac", "tekfac"):
            return self.measured + damping * np.eye(len(self.measured))
        if self.method == "kfac":
            pi = np.sqrt(np.trace(left) / len(left) / (np.trace(right) / len(right)))
            return np.kron(left + pi * root * I_in, right + root / pi * I_out)
        return np.kron(np.sqrt(delta) * left + root * I_in, np.sqrt(delta) * right + root * I_out)
