"""The loop around the four methods: a `torch.optim.Optimizer` for existing training loops.

    m ← τ m + direction,   θ ← θ − α β θ − α m          direction = λ (F̂ + damping)⁻¹ ∇

In one step: statistics, then eigenbases, then eigenvalues in the new basis, then the update
(TEKFAC Algorithm 1), as in `reference/descent.py`. A method says of itself which factors, whose
eigenvalues, and how they are damped (`kfac.py` and its siblings). What a layer is: `layers/`; where
its a and g come from: `capture.py`; what becomes of them: `refresh.py`; what is remembered:
`curvature.py`; when: `schedule.py`.
"""

from collections import deque
from typing import Any

import torch
from torch.profiler import record_function

from tekfac_edu.optim.capture import Capture
from tekfac_edu.optim.curvature import LayerCurvature, preconditioned
from tekfac_edu.optim.distributed import ranks_of
from tekfac_edu.optim.eigenvalues import MeasuredEigenvalues
from tekfac_edu.optim.fisher import accumulate_fisher
from tekfac_edu.optim.groups import checked, complete_groups, damping_of_layers, descend
from tekfac_edu.optim.refresh import refresh
from tekfac_edu.optim.refusals import gradients_are_finite, refuse_grad_scaler, refuse_model
from tekfac_edu.optim.report import precondition, report, summary
from tekfac_edu.optim.schedule import STAGES, Schedule
from tekfac_edu.optim.settings import Settings, refuse_replaced
from tekfac_edu.optim.state import load_state, state_of
from tekfac_edu.optim.treatment import find_layers, unwrapped
from tekfac_edu.optim.trust import trusted


class KroneckerOptimizer(torch.optim.Optimizer):
    """Natural-gradient descent by Kronecker factors; use KFAC, EKFAC, TKFAC or TEKFAC.

    Linear, Conv1d and Conv2d modules are factored; every other parameter takes a step of SGD with
    momentum. `print(optimizer)` lists which is which. The loss must be a mean over examples, and
    the first axis of each layer's input must be the examples.

    Parameters
    ----------
    model : nn.Module whose parameters are trained; wrappers (DistributedDataParallel,
        torch.compile) are seen through.
    lr : α >= 0, what it is for SGD: in directions flatter than λ a step is α times the gradient.
        (In directions steeper than λ it is α λ F⁻¹ times the gradient: α λ = 1 is a Newton step.)
    momentum : τ, 0 to below 1.   weight_decay : β >= 0, decoupled.
    damping : λ > 0, in units of the Fisher, each method's own way; or a rule: Added(λ), ByTrace(λ).
    fisher : "empirical" (the labels of the loss), or "mc", "exact" (the model's own distribution,
        sampled or in expectation; then call `accumulate_fisher` between forward and backward).
    interval : steps between refreshes; or three numbers, of factors, bases and measured eigenvalues
        (T_FIM, T_EIG, T_RE).
    decay : weight of the old value in the running averages, 0 to 1.
    warmup : at each of the first so many steps everything is refreshed (ours: an untrained
        network's gradients are small, its curvature grows a hundredfold while it begins to learn,
        and steps by the first one are too long; chapter 12).
    trust : κ > 0, bounds what a direction is predicted to change in the model's outputs, before
        momentum (`trust.py`); None: no bound.
    positions : "apart": factors are sums over positions, as in the papers; or, of TKFAC and TEKFAC,
        "summed": those of each example's gradient, summed over its positions (ours).
    cost : "exact", "low", or a Cost: what is drawn, truncated, staggered and rounded.
    plain : names of modules that are not to be factored.
    param_groups : list of dicts of own settings: "params", and any of lr, momentum, weight_decay,
        damping. Parameters that are in none form one more.
    process_group : "default": average statistics over all ranks once torch.distributed is
        initialised; or a group; or None: never.

    Raises
    ------
    ValueError
        If a setting is out of its bounds, or a module can neither be factored nor was left to
        plain SGD; the message names it.
    """

    # What a method says of itself: (a, g) -> factors; the kind of D; (eigenvalues, λ) -> D damped.
    factors: Any = None
    eigenvalues: Any = None
    damped: Any = None
    summed_factors: Any = None  # the factors with positions summed, of a method that has them

    accumulate_fisher = accumulate_fisher
    precondition, report = precondition, report
    __repr__ = summary

    # GradScaler asks: we handle scaled gradients ourselves, which is to say, refuse them by name.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model,
        lr,
        *,
        momentum=0.9,
        weight_decay=0.0,
        damping=1e-2,
        fisher="empirical",
        interval=10,
        decay=0.95,
        warmup=20,
        trust=None,
        positions="apart",
        cost="exact",
        plain=(),
        param_groups=None,
        process_group="default",
        **replaced,
    ):
        refuse_replaced(replaced)
        refuse_model(self, model)
        ranks_of(process_group)
        chosen = fisher, interval, decay, warmup, trust, positions, damping, cost
        settings = Settings.checked(type(self), *chosen, seed=torch.initial_seed())
        self.process_group = process_group
        self.steps = 0
        self.warned = set()
        self.layers, self.treatments = find_layers(model, plain)
        self.curvatures = {
            layer: LayerCurvature(layer, type(self), settings.cost) for layer in self.layers
        }
        self.parameter_names = {p: name for name, p in unwrapped(model).named_parameters()}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": settings.damping.damping,
        }
        groups = complete_groups(param_groups or [], self.parameter_names, defaults)
        damping_of_layers(self.layers, groups)
        super().__init__(groups, defaults)
        self.take(settings)

    @classmethod
    def stages(cls):
        """Which of `STAGES` a step of the method may refresh."""
        return STAGES if cls.eigenvalues is MeasuredEigenvalues else STAGES[:2]

    def take(self, settings):
        """Exchange the `Settings`, between two steps."""
        self.settings = settings
        self.shrunk = deque(maxlen=max(settings.interval))  # ν of the last steps
        self.schedule = Schedule(self.layers, settings, self.stages())
        for curvature in self.curvatures.values():
            curvature.cost = settings.cost
        self.watch()

    def watch(self):
        """Start to capture; also after copying and unpickling."""
        self.capture = Capture(self.layers, self.settings.fisher == "empirical")
        self.capture.wanted = self.schedule.sampled(self.steps, self.curvatures)

    def add_param_group(self, param_group):
        """As in every torch optimizer; parameters that are not the model's take plain SGD.

        Raises
        ------
        ValueError
            If a setting is out of its bounds.
        """
        super().add_param_group(checked(self.defaults | param_group))
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p not in self.parameter_names:
                name = f"group {len(self.param_groups) - 1}, added parameter {i} {(*p.shape,)}"
                self.parameter_names[p] = name
                self.treatments[name] = "plain SGD (not of the model)"

    def zero_grad(self, set_to_none=True):
        """As in every torch optimizer; what was captured for the statistics goes too."""
        super().zero_grad(set_to_none)
        self.capture.clear()

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if there is one.

        Raises
        ------
        RuntimeError
            If statistics are due and none were captured; under an fp16 GradScaler. No parameter
            has moved then. A gradient that is not finite gives a RuntimeWarning, and nothing at all
            changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_grad_scaler(self)
        parameters = [p for group in self.param_groups for p in group["params"]]
        if all(p.grad is None for p in parameters) or not gradients_are_finite(self):
            self.capture.clear()
            return loss
        with torch.autocast(parameters[0].device.type, enabled=False):
            gradients = {layer: layer.gradient() for layer in self.layers}
            gradients = {layer: M for layer, M in gradients.items() if M is not None}
            damping_of_layers(self.layers, self.param_groups)  # refuses, before anything changes
            refresh(self, gradients)
            descend(self, self._directions(gradients))
        self.capture.clear()
        self.steps += 1
        self.capture.wanted = self.schedule.sampled(self.steps, self.curvatures)
        return loss

    def _directions(self, gradients):
        """Of every layer that has a gradient, times λ, within the trust region."""
        dampings = self.dampings()
        with record_function("tekfac_edu: precondition"):
            found = preconditioned(self.curvatures, gradients, dampings, self.settings)
            scaled = {layer: dampings[layer] * direction for layer, direction in found.items()}
            return trusted(self, scaled, gradients, dampings)

    def dampings(self):
        """λ of every layer, a float or () tensor: its group's, or by the rule."""
        of_groups = damping_of_layers(self.layers, self.param_groups)
        return self.settings.damping.layer_dampings(of_groups, self.curvatures)

    def state_dict(self):
        """Everything that resuming needs; loads with torch.load(..., weights_only=True)."""
        return {**super().state_dict(), **state_of(self)}

    def load_state_dict(self, state_dict):
        """Take over what `state_dict` gave, settings included; as if training had never stopped.

        Raises
        ------
        ValueError
            If it is of another method or model; nothing has been loaded then.
        """
        load_state(self, state_dict, super().load_state_dict)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("step", "capture")}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "layers" in state:  # unpickled or copied; load_state_dict comes by here too, without
            self.watch()
