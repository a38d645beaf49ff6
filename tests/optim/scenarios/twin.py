"""The NumPy reference in training, with the settings of an optimizer."""

from tekfac_edu import reference


def twin_of(mlp, method, lr, *, interval, decay=0.95, **settings):
    """`reference.NaturalGradient` of a reference MLP; lr means what it means for the optimizer.

    method : class of the optimizer.   interval : three numbers.
    """
    factors, bases, eigenvalues = interval
    return reference.NaturalGradient(
        mlp,
        method.__name__.lower(),
        lr,
        factor_interval=factors,
        eigen_interval=bases,
        scale_interval=eigenvalues,
        factor_decay=decay,
        scale_decay=decay,
        lr_scale="sgd",
        **settings,
    )
