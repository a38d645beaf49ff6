"""A trust region: no direction may be predicted to change the model's outputs by more than κ.

    ν = min(1, √(κ / Σ_l (α λ_l)² ⟨d_l, ∇_l⟩))          step_l = α λ_l d_l,  d_l = (F̂_l + λ_l)⁻¹ ∇_l

F̂_l + λ_l stands for the damped matrix. The sum is stepᵀ (F̂ + λ) step, at least stepᵀ F̂ step: with
the Fisher, twice the KL divergence, to second order, between the model's distributions before and
after. All factored layers' directions are multiplied by one ν, so they keep their course. Momentum
comes afterwards: what moves the weights may be up to 1 / (1 − τ) times as long. (Ba, Grosse &
Martens 2017; implementations of KFAC know it as "KL clipping", often with κ = 0.001.)
"""

import torch


def trusted(optimizer, directions, gradients, dampings):
    """The directions times ν, which the optimizer keeps for its report.

    directions, gradients : {Layer: (d_out, d_in) tensor}.   dampings : {Layer: λ}.
    """
    kappa = optimizer.settings.trust
    if kappa is None or not directions:
        return directions
    lr = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layers = list(directions)
    nu = shrinkage(
        [directions[layer] for layer in layers],
        [gradients[layer] for layer in layers],
        [lr[layer.weight] for layer in layers],
        [dampings[layer] for layer in layers],
        kappa,
    )
    optimizer.shrunk.append(nu)
    return {layer: nu * direction for layer, direction in directions.items()}


def shrinkage(directions, gradients, learning_rates, dampings, kappa):
    """ν, a () tensor of at most 1; computed without waiting for the device.

    Parameters
    ----------
    directions : list of λ_l d_l, (d_out, d_in) tensors.   gradients : list of ∇_l, of their shapes.
    learning_rates, dampings : lists of α and λ_l; floats or () tensors.
    kappa : κ > 0, unitless.
    """
    inner = [product.sum() for product in torch._foreach_mul(directions, gradients)]
    predicted = sum(
        alpha**2 * damping * product
        for alpha, damping, product in zip(learning_rates, dampings, inner, strict=True)
    )
    return (kappa / predicted).sqrt().clamp(max=1).nan_to_num(nan=1.0)
