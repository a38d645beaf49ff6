"""The loop around the four methods: a `torch.optim.Optimizer` for existing training loops.

    m ← τ m + direction,   θ ← θ − α β θ − α m          direction = (F̂ + damping)⁻¹ ∇

In one step: statistics, then eigenbases, then eigenvalues in the new basis, then the update
(TEKFAC Algorithm 1), as in `reference/descent.py`. A method adds its two choices: which factors
(`estimate_factors`), whose eigenvalues (`corrected`). What a layer's a and g are: `layers.py`;
where they come from: `capture.py`; what becomes of them: `statistics.py`; what a layer remembers:
`curvature.py`.
"""

import torch

from tekfac_edu.arguments import one_of, real_number, whole_number
from tekfac_edu.optim.capture import Capture
from tekfac_edu.optim.curvature import LayerCurvature, preconditioned
from tekfac_edu.optim.damping import trace_damping
from tekfac_edu.optim.distributed import rank_in, ranks_of
from tekfac_edu.optim.fisher import LIKELIHOODS, fisher_vectors, send_back
from tekfac_edu.optim.groups import SETTINGS, check_settings, split_groups
from tekfac_edu.optim.refusals import (
    gradient_of,
    gradients_are_finite,
    refuse_foreign_state,
    refuse_grad_scaler,
    refuse_missing_statistics,
)
from tekfac_edu.optim.report import report
from tekfac_edu.optim.statistics import Refresh, warn_if_examples_differ, warn_unless_explained
from tekfac_edu.optim.treatment import find_layers, unwrapped
from tekfac_edu.optim.turns import turns_of
from tekfac_edu.optim.warning import warn

INTERVAL, WARMUP_STEPS = 10, 20  # what is used where nothing is given


class KroneckerOptimizer(torch.optim.Optimizer):
    """Natural-gradient descent by Kronecker factors; use KFAC, EKFAC, TKFAC or TEKFAC.

    Linear, Conv1d and Conv2d modules are factored; every other parameter takes a step of SGD with
    momentum. `print(optimizer)` lists which is which. The loss must be a mean over examples, and
    the first axis of each layer's input must be the examples.
    """

    estimate_factors = None
    corrected = None

    # GradScaler asks: we handle scaled gradients ourselves, which is to say, refuse them by name.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model,
        lr,
        *,
        momentum=0.9,  # τ
        weight_decay=0.0,  # β
        damping=1e-2,  # λ
        damping_policy="constant",
        damping_rule="paper",
        trace_multiplier=1.0,  # τ of the trace policy
        trace_floor=1e-8,  # ϑ
        fisher="empirical",
        factor_interval=None,  # T_FIM
        eigen_interval=None,  # T_EIG
        scale_interval=None,  # T_RE
        warmup_steps=None,
        factor_decay=0.95,  # ρ
        scale_decay=0.95,
        eigenbasis="eigh",
        input_rank=None,
        factor_rows=None,
        scale_examples=None,
        stagger=False,
        precision="full",
        lr_scale="natural",
        lr_other=None,
        plain_sgd=(),
        param_groups=None,
        process_group="default",
        generator=None,
    ):
        """See the class for what is trained how.

        Parameters
        ----------
        model : nn.Module whose parameters are trained; wrappers (DistributedDataParallel,
            torch.compile) are seen through.
        lr : α >= 0. With lr_scale="natural" unitless: 1 is a full Newton-like step.
        momentum : τ, 0 to below 1.   weight_decay : β >= 0, decoupled.
        damping : λ > 0, in units of the Fisher.
        damping_policy : "constant", or "trace": each convolution its own
            λ_l = τ max(tr D_l, ϑ) / dim, dense layers λ times the largest λ_l (TEKFAC (3.5);
            λ itself if there is no convolution).
        damping_rule : "paper", or "added": D + λ for KFAC and TKFAC too (the others always).
        trace_multiplier, trace_floor : τ and ϑ of the trace policy.
        fisher : "empirical" (the labels of the loss), or "mc", "exact" (the model's own
            distribution, sampled or in expectation; then call `accumulate_fisher` between forward
            and backward).
        factor_interval, eigen_interval, scale_interval : steps between refreshes of the factors,
            the eigenbases and the measured eigenvalues (T_FIM, T_EIG, T_RE); None: 10.
        warmup_steps : during the first so many steps everything is refreshed at every step (ours:
            an untrained network's gradients are small, its curvature grows a hundredfold while it
            begins to learn, and steps by the first one are too long; chapter 12). None: 20 if no
            interval is given, else 0.
        factor_decay, scale_decay : weight of the old value in the running averages, 0 to 1.
        eigenbasis : "eigh", or "qr": one warm-started QR iteration per refresh (EKFAC, TEKFAC).
        input_rank : of a layer with more inputs, the eigenvectors kept on their side, those of the
            largest eigenvalues; what the others have is spread evenly over them, so that tr F is
            kept. None: all. With "qr" no large matrix is ever decomposed.
        factor_rows : per number in a layer's input (d_in), from how many examples times positions
            its factors are estimated, at positions drawn anew each time; None: all there are.
        scale_examples : from how many examples of the batch, drawn anew each time, the eigenvalues
            of EKFAC and TEKFAC are measured; None: all.
        stagger : layers take turns: each is refreshed at its own steps of the interval, so that no
            step is slow. The first step, and those of the warm-up, refresh all layers.
        precision : "full", or "bfloat16": of the four products that precondition a gradient, each
            step, on hardware that multiplies it faster.
        lr_scale : "natural", or "sgd": the direction is multiplied by the damping, so that lr means
            in flat directions what it means for SGD.
        lr_other : learning rate of the parameters that are not factored; None: lr under "sgd",
            lr / damping under "natural". Schedulers that scale keep the ratio; to one that sets
            (OneCycleLR) give a list, one value per group.
        plain_sgd : names of modules that are not to be factored.
        param_groups : list of dicts of own settings: "params", and any of lr, lr_other, momentum,
            weight_decay, damping. Each becomes two groups, its factored parameters and its others;
            so do the parameters that are in none.
        process_group : "default": average statistics over all ranks once torch.distributed is
            initialised; or a group; or None: never.
        generator : torch.Generator of fisher="mc"; None: one of its own, seeded with torch's
            initial seed plus the rank.

        Raises
        ------
        ValueError
            If a setting is out of its bounds, or a module can neither be factored nor was left to
            plain SGD; the message names it.
        """
        if self.estimate_factors is None:
            raise TypeError(
                "KroneckerOptimizer is what KFAC, EKFAC, TKFAC and TEKFAC share: use those"
            )
        self.damping_policy = one_of("damping_policy", damping_policy, ("constant", "trace"))
        self.damping_rule = one_of("damping_rule", damping_rule, ("paper", "added"))
        self.trace_multiplier = real_number("trace_multiplier", trace_multiplier, above=0)
        self.trace_floor = real_number("trace_floor", trace_floor, above=0)
        self.fisher = one_of("fisher", fisher, ("empirical", "mc", "exact"))
        if not isinstance(model, torch.nn.Module):
            raise ValueError(
                f"model must be the nn.Module itself, not its parameters: its layers' inputs are "
                f"needed; got {type(model).__name__}"
            )
        if warmup_steps is None:
            given = (factor_interval, eigen_interval, scale_interval)
            warmup_steps = WARMUP_STEPS if all(interval is None for interval in given) else 0
        self.warmup_steps = whole_number("warmup_steps", warmup_steps, 0)
        self.factor_interval = _interval("factor_interval", factor_interval)
        self.eigen_interval = _interval("eigen_interval", eigen_interval)
        self.scale_interval = _interval("scale_interval", scale_interval)
        self.factor_decay = real_number("factor_decay", factor_decay, at_least=0, at_most=1)
        self.scale_decay = real_number("scale_decay", scale_decay, at_least=0, at_most=1)
        self.eigenbasis = one_of("eigenbasis", eigenbasis, ("eigh", "qr"))
        if eigenbasis == "qr" and not self.corrected:
            raise ValueError(
                f'eigenbasis="qr" is for EKFAC and TEKFAC, which are exact about any basis; '
                f'{type(self).__name__} needs the eigenvalues of its factors: "eigh"'
            )
        self.input_rank = _or_none(whole_number, "input_rank", input_rank, 1)
        self.factor_rows = _or_none(real_number, "factor_rows", factor_rows, above=0)
        self.scale_examples = _or_none(whole_number, "scale_examples", scale_examples, 1)
        if not isinstance(stagger, bool):
            raise ValueError(f"stagger must be True or False; got {stagger!r}")
        self.stagger = stagger
        self.precision = one_of("precision", precision, ("full", "bfloat16"))
        self.lr_scale = one_of("lr_scale", lr_scale, ("natural", "sgd"))
        ranks_of(process_group)
        self.process_group = process_group
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise ValueError(f"generator must be a torch.Generator or None; got {generator!r}")
        self.generator = generator
        self.steps = 0
        self.warned = set()
        self.layers, self.treatments = find_layers(model, plain_sgd)
        self.turns = turns_of(self.layers, self._longest_interval if stagger else 1)
        self.curvatures = {
            layer: LayerCurvature(self.corrected, eigenbasis == "qr", self.input_rank)
            for layer in self.layers
        }
        self.parameter_names = {p: name for name, p in unwrapped(model).named_parameters()}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
        }
        factored = {p for layer in self.layers for p in (layer.weight, layer.bias)}
        groups = split_groups(
            param_groups or [],
            self.parameter_names,
            factored,
            defaults,
            lr_other,
            natural=self.lr_scale == "natural",
        )
        super().__init__(groups, defaults)
        self._watch()

    def add_param_group(self, param_group):
        """As in every torch optimizer, for parameters that are not factored: give their own lr.

        Raises
        ------
        ValueError
            If a setting is out of its bounds, or lr is not given.
        """
        if "lr" not in param_group:
            raise ValueError("a group added later takes plain momentum SGD: give its lr")
        check_settings(self.defaults | param_group)
        super().add_param_group(param_group)

    def _watch(self):
        """Start to capture; also after copying and unpickling."""
        self.capture = Capture([layer.module for layer in self.layers], self.fisher == "empirical")
        self._say_what_is_wanted()

    def _say_what_is_wanted(self):
        intervals = [self.factor_interval] + self.corrected * [self.scale_interval]
        self.capture.wanted = frozenset(
            layer.module for interval in intervals for layer in self._due(interval)
        )

    @property
    def _longest_interval(self):
        intervals = [self.factor_interval, self.eigen_interval]
        return max(intervals + self.corrected * [self.scale_interval])

    def _due(self, interval):
        """The layers whose statistic of this interval the next step refreshes."""
        if self.steps < self.warmup_steps:
            return self.layers
        return [
            layer
            for layer in self.layers
            if (self.steps - self.turns[layer]) % interval == 0 or not self.curvatures[layer].ready
        ]

    def zero_grad(self, set_to_none=True):
        """As in every torch optimizer; what was captured for the statistics goes too."""
        super().zero_grad(set_to_none)
        self.capture.clear()

    def accumulate_fisher(self, outputs, likelihood="categorical"):
        """Send the model's own distribution back, for fisher="mc" or "exact"; leaves .grad alone.

        Call it after zero_grad, between the forward and the backward pass, once for each part of a
        batch. On steps that take no statistics it does nothing.

        Parameters
        ----------
        outputs : (N, C) tensor, what the model returned: logits, or the mean of a Gaussian.
        likelihood : "categorical" (cross-entropy), "bernoulli" (binary cross-entropy, summed over
            outputs), or "gaussian" of unit variance (half the squared error, summed over outputs).

        Raises
        ------
        ValueError, RuntimeError
            If outputs are not (N, C) or come from no factored module in training mode; under
            fisher="empirical".
        """
        one_of("likelihood", likelihood, LIKELIHOODS)
        if self.fisher == "empirical":
            raise RuntimeError(
                'accumulate_fisher is for fisher="mc" or "exact"; this optimizer has '
                'fisher="empirical", which takes its statistics from loss.backward()'
            )
        if outputs.ndim != 2:
            raise ValueError(f"outputs must be (N, C); their shape is {(*outputs.shape,)}")
        if not outputs.requires_grad:
            raise RuntimeError("outputs have no graph: call accumulate_fisher before backward()")
        self.capture.fisher_asked = True
        weights = [
            layer.weight
            for layer in self.layers
            if layer.module in self.capture.wanted and layer.weight.requires_grad
        ]
        if not weights:
            return
        before = len(self.capture.uses)
        if self.fisher == "mc" and self.generator is None:
            seed = torch.initial_seed() + rank_in(ranks_of(self.process_group))
            self.generator = torch.Generator(outputs.device).manual_seed(seed)
        vectors = fisher_vectors(outputs, likelihood, self.fisher == "exact", self.generator)
        with self.capture.fisher_pass():
            for vector in vectors:
                send_back(outputs, weights, vector)
        all_wanted = len(self.capture.wanted) == len(self.layers)
        if len(self.capture.uses) == before and (all_wanted or not self.capture.seen):
            raise RuntimeError(
                "outputs come from no factored module in training mode, or have been used already"
            )

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
        device = self.param_groups[0]["params"][0].device
        with torch.autocast(device.type, enabled=False):
            gradients = {layer: gradient_of(layer) for layer in self.layers}
            gradients = {layer: M for layer, M in gradients.items() if M is not None}
            self._refresh(gradients)
            self._update(gradients)
        self.capture.clear()
        self.steps += 1
        self._say_what_is_wanted()
        return loss

    def _refresh(self, gradients):
        """Statistics, then eigenbases, then eigenvalues in the new basis."""
        batches = self.capture.batches()
        refuse_missing_statistics(self, gradients, batches)
        group = ranks_of(self.process_group)
        fresh = [
            layer
            for layer in gradients
            if layer.module in batches and not self.curvatures[layer].ready
        ]
        warn_if_examples_differ(fresh, batches)
        if self.fisher == "empirical" and group is None:
            for layer in fresh:
                warn_unless_explained(layer, batches[layer.module], gradients[layer])
        refresh = Refresh(self.curvatures, batches, group, self.warned)
        generator = torch.Generator().manual_seed(self.steps)
        refresh.factors(
            self._due(self.factor_interval),
            self.estimate_factors,
            self.factor_decay,
            self.factor_rows,
            generator,
        )
        refresh.bases(self._due(self.eigen_interval), self.steps)
        if self.corrected:
            refresh.eigenvalues(
                self._due(self.scale_interval),
                self.scale_decay,
                self.steps,
                self.scale_examples,
                generator,
            )

    def _update(self, gradients):
        directions = {}
        for layer, direction in self._directions(gradients).items():
            if layer.has_bias:
                direction, directions[layer.bias] = direction[:, :-1], direction[:, -1]
            directions[layer.weight] = direction.reshape(layer.weight.shape)
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            steps = [directions.get(p, p.grad).to(p.dtype) for p in moving]
            if group["momentum"] > 0:
                for p in moving:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in moving]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, steps)
                steps = buffers
            if group["weight_decay"] > 0:
                torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(moving, steps, alpha=-group["lr"])

    def _directions(self, gradients):
        """A dict Layer -> (d_out, d_in)."""
        dampings = self.dampings()
        ready = [layer for layer in gradients if self.curvatures[layer].ready]
        # the others' only statistics were not finite: they do not move
        directions = {
            layer: torch.zeros_like(M) for layer, M in gradients.items() if layer not in ready
        }
        found = preconditioned(
            [self.curvatures[layer] for layer in ready],
            [gradients[layer] for layer in ready],
            [dampings[layer] for layer in ready],
            self.damping_rule,
            self.precision,
        )
        for layer, direction in zip(ready, found, strict=True):
            by_sgd = self.lr_scale == "sgd"
            directions[layer] = dampings[layer] * direction if by_sgd else direction
        return directions

    def dampings(self):
        """λ of every layer, a float or () tensor: its group's, or by the trace policy."""
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        dampings = {layer: group_of[layer.weight]["damping"] for layer in self.layers}
        if self.damping_policy == "constant":
            return dampings
        of_convolutions = {
            layer: trace_damping(
                curvature.eigenvalues.sum(),
                layer.d_in * layer.d_out,
                self.trace_floor,
                self.trace_multiplier,
            )
            for layer, curvature in self.curvatures.items()
            if layer.is_convolution and curvature.ready
        }
        if not of_convolutions:
            return dampings
        largest = torch.stack(list(of_convolutions.values())).max()
        return {
            layer: of_convolutions.get(layer, largest * damping)
            for layer, damping in dampings.items()
        }

    def precondition(self, module, M):
        """The damped preconditioner of one layer applied to any M: for study and tests.

        Parameters
        ----------
        module : a factored module of the model.
        M : (d_out, d_in) tensor; the bias, if there is one, is the last column.

        Returns
        -------
        (d_out, d_in) tensor, in the dtype of the statistics. Never multiplied by the damping.

        Raises
        ------
        ValueError, RuntimeError
            If the module is not factored, or M has another shape; before the first step.
        """
        layer = next((layer for layer in self.layers if layer.module is module), None)
        if layer is None:
            raise ValueError(
                f"{type(module).__name__} is not a factored module of this optimizer; those are "
                f"{', '.join(map(str, self.layers))}"
            )
        if (*M.shape,) != (layer.d_out, layer.d_in):
            raise ValueError(
                f"M must have shape {(layer.d_out, layer.d_in)} for {layer}; it has {(*M.shape,)}"
            )
        curvature = self.curvatures[layer]
        if not curvature.ready:
            raise RuntimeError(f"{layer} has no curvature yet: take a step first")
        with torch.no_grad(), torch.autocast(M.device.type, enabled=False):
            M = M.to(curvature.Q_in.dtype)
            damping = self.dampings()[layer]
            rule = self.damping_rule
            return preconditioned([curvature], [M], [damping], rule, self.precision)[0]

    def report(self):
        """What each layer's preconditioner does at present; print it, or read `.rows`."""
        return report(self)

    def state_dict(self):
        """Everything that resuming needs; loads with torch.load(..., weights_only=True)."""
        return {
            **super().state_dict(),
            "method": type(self).__name__,
            "steps": self.steps,
            "curvatures": {layer.name: c.state_dict() for layer, c in self.curvatures.items()},
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state_dict):
        """Take over what `state_dict` gave; training goes on as if it had never stopped.

        Raises
        ------
        ValueError
            If it is of another method or model; nothing has been loaded then.
        """
        refuse_foreign_state(self, state_dict)
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for layer, curvature in self.curvatures.items():
            curvature.load_state_dict(state_dict["curvatures"][layer.name], layer.weight.device)
        self.steps = state_dict["steps"]
        if state_dict["generator"] is not None:
            self._load_generator(state_dict["generator"].cpu())
        self.capture.clear()
        self._say_what_is_wanted()

    def _load_generator(self, state):
        device = self.param_groups[0]["params"][0].device
        generator = self.generator or torch.Generator(device)
        if len(state) != len(generator.get_state()):
            warn(
                f"the state's random generator is of another kind of device than {device}: samples "
                f"for the Fisher go on from a new seed"
            )
        else:
            generator.set_state(state)
            self.generator = generator

    def __getstate__(self):
        state = {
            k: v for k, v in self.__dict__.items() if k not in ("step", "capture", "generator")
        }
        generator = self.generator
        state["_saved_generator"] = generator and (generator.device, generator.get_state())
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "layers" in state:  # unpickled or copied; load_state_dict comes by here too, without
            saved = self.__dict__.pop("_saved_generator")
            self.generator = saved and torch.Generator(saved[0])
            if saved:
                self.generator.set_state(saved[1])
            self._watch()

    def __repr__(self):
        settings = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in (
                "fisher",
                "factor_interval",
                "eigen_interval",
                "scale_interval",
                "warmup_steps",
                "damping_policy",
                "damping_rule",
                "eigenbasis",
                "input_rank",
                "factor_rows",
                "scale_examples",
                "stagger",
                "precision",
                "lr_scale",
            )
        )
        lines = [f"{type(self).__name__}({settings})"]
        for i, group in enumerate(self.param_groups):
            values = ", ".join(f"{name}={group[name]:g}" for name in SETTINGS)
            lines.append(f"  group {i}: {len(group['params'])} tensors, {values}")
        lines += [f"  {name or 'the model'}: {text}" for name, text in self.treatments.items()]
        return "\n".join(lines)


def _or_none(check, name, value, *bounds, **named):
    return None if value is None else check(name, value, *bounds, **named)


def _interval(name, steps):
    return INTERVAL if steps is None else whole_number(name, steps, 1)
