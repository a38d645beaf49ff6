"""Two pictures of plane geometry: a metric as an ellipse, a best approximation as a right angle."""

import numpy as np

from tekfac_edu.figures.style import FAINT, INK, SOFT, finite_matrix, method_style


def ellipse(ax, F, center=(0.0, 0.0), radius=1.0, **style):
    """Outline the set {θ : ½ (θ − center)ᵀ F (θ − center) = radius}.

    Parameters
    ----------
    ax : Axes.
    F : (2, 2) symmetric positive definite array.
    center : (2,) array.
    radius : float > 0; with F the Fisher matrix, nats: the KL divergence to second order.
    **style : keyword arguments for `Axes.plot`, e.g. ``color="k", linestyle="--"``.
    """
    F = finite_matrix("F", F)
    if F.shape != (2, 2) or not np.allclose(F, F.T):
        raise ValueError(f"F must be a symmetric (2, 2) matrix, got shape {F.shape}: {F.tolist()}")
    eigenvalues, Q = np.linalg.eigh(F)
    if eigenvalues[0] <= 0:
        raise ValueError(f"F must be positive definite, got eigenvalues {eigenvalues.tolist()}")
    if not radius > 0:
        raise ValueError(f"radius must be > 0, got {radius!r}")
    if np.shape(center) != (2,):
        raise ValueError(f"center must have shape (2,), got {np.shape(center)}")
    angle = np.linspace(0, 2 * np.pi, 361)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    points = np.reshape(center, (2, 1)) + Q @ (np.sqrt(2 * radius / eigenvalues)[:, None] * circle)
    ax.plot(*points, **({"color": INK, "linewidth": 1.6} | style))


# Offsets in points and alignments of the texts around the triangle, chosen so that none touch.
SIDE_TEXT = {
    (0, 1): (-5, 5, "right", "bottom"),
    (0, 2): (0, -6, "center", "top"),
    (1, 2): (7, 0, "left", "center"),
}
CORNER_TEXT = (
    (-8, 0, "right", "center"),
    (7, 6, "left", "bottom"),
    (7, -6, "left", "top"),
)


def right_triangle(ax, hypotenuse, leg_a, leg_b, labels=("F", "KFAC", "EKFAC")):
    """The triangle whose corners are matrices and whose sides are Frobenius distances, to scale.

    The right angle is at the third corner: ‖F − KFAC‖² = ‖F − EKFAC‖² + ‖EKFAC − KFAC‖².

    Parameters
    ----------
    ax : Axes. Share both axes between two triangles to compare them.
    hypotenuse : float > 0, the distance between the first two corners.
    leg_a : float >= 0, between the first and the third.
    leg_b : float >= 0, between the third and the second.
    labels : three names of methods ("F" is drawn as the exact one).

    Raises
    ------
    ValueError
        If hypotenuse² differs from leg_a² + leg_b² by more than 1e-6 of it.
    """
    if not (hypotenuse > 0 and leg_a >= 0 and leg_b >= 0):
        raise ValueError(
            f"hypotenuse, leg_a, leg_b must be > 0, >= 0, >= 0; got {hypotenuse}, {leg_a}, {leg_b}"
        )
    if abs(hypotenuse**2 - leg_a**2 - leg_b**2) > 1e-6 * hypotenuse**2:
        raise ValueError(
            f"hypotenuse, leg_a, leg_b must satisfy hypotenuse² = leg_a² + leg_b²; "
            f"got {hypotenuse**2:.6g} and {leg_a**2 + leg_b**2:.6g}"
        )
    corners = np.array([(0, 0), (leg_a, leg_b), (leg_a, 0)])
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.fill(*corners.T, color=FAINT, alpha=0.6, linewidth=0)
    mark = 0.05 * hypotenuse
    ax.plot([leg_a - mark, leg_a - mark, leg_a], [0, mark, mark], color=SOFT, linewidth=1)
    sides = ((1, 2, leg_b, None), (0, 1, hypotenuse, 1), (0, 2, leg_a, 2))
    for start, end, length, owner in sides:
        style = {"color": SOFT, "linewidth": 2} if owner is None else _corner_line(labels[owner])
        ax.plot(*corners[[start, end]].T, **style, clip_on=False)
        dx, dy, align, valign = SIDE_TEXT[start, end]
        ax.annotate(
            f"{length:.3g}",
            corners[[start, end]].mean(axis=0),
            (dx, dy),
            color=style["color"],
            textcoords="offset points",
            ha=align,
            va=valign,
            size=9,
        )
    for label, corner, (dx, dy, align, valign) in zip(labels, corners, CORNER_TEXT, strict=True):
        color = _corner_line(label)["color"]
        ax.plot(*corner, "o", color=color, markersize=5, clip_on=False)
        ax.annotate(
            "$F$" if label == "F" else label,
            corner,
            (dx, dy),
            color=color,
            weight="bold",
            textcoords="offset points",
            ha=align,
            va=valign,
            size=10.5,
        )


def _corner_line(label):
    style = method_style("exact" if label == "F" else label)
    return style.line() | {"marker": ""}
