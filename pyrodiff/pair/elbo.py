r"""The bound of a pair of programs, site by site.

For a guide in the model's order, with z_1, z_2, ... the latent sites and x the observed ones,

.. math::
    -\log p(x) \le \sum_i \mathbb{E}_q \, KL(q(z_i | z_{<i}) \| p(z_i | z_{<i})) - \mathbb{E}_q \log p(x | z),

one term per site. For the trajectory pair of a diffusion these are :math:`L_T`, the :math:`L_{t-1}` and :math:`L_0`.

If the guide has another order, the KL at a site is still its term as long as the guide too draws, before it, every
latent site that the model draws before it: given these, only the guide's distribution of :math:`z_i` is averaged over.
Elsewhere the term is
:math:`\log q(z_i) - \log p(z_i)` at the draw, which is unbiased in any order.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, Independent

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import precisely
from .entropy import innermost, relative_entropy
from .terms import is_listened_to, pair_costs

__all__ = ["DiffusionELBO"]


class DiffusionELBO(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, which also returns its terms, and is right for programs with sites in any order.

    At each latent site it takes the analytic KL if one is registered and valid: that is, if the guide too has drawn
    every latent site that the model draws before. Elsewhere it takes the log ratio at the draw, and warns, once, if the
    order is the reason. Unlike Pyro's it accepts guide sites that are not reparameterised, the bits of a binomial
    diffusion say, if they have no parameters to learn. While Pyro validates it refuses scales, masks and plates that
    are in one program only, and missing sites.

    While gradients are taken, a site with ``infer={"tell": f}`` (set in the guide, if latent) has ``f(cost)`` called,
    with its cost before scale and mask.

    Arguments:
        *args, **kwargs: Pyro's: ``num_particles``, ``vectorize_particles``, and ``max_plate_nesting`` with it.

    Raises:
        ValueError: If ``num_particles`` is not an int of at least 1.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=3))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> terms = pyrodiff.DiffusionELBO().terms(diffusion.model, diffusion.guide, torch.ones(5, 2))
        >>> {name: tuple(term.shape) for name, term in terms.items()}
        {'x_3': (5,), 'x_2': (5,), 'x_1': (5,), 'x_0': (5,)}
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_particles = arguments.positive_int("num_particles", self.num_particles)
        self._has_warned = False

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The cost of each site, KL if latent and -log p if observed, with its scale and mask.

        Arguments:
            model, guide: The programs.
            *args, **kwargs: What both are called with.

        Returns:
            For each site a tensor in nats, the mean over particles, with shape (B,) for a site in a plate of size B and
            () outside of plates. Summed, they are the loss. Sites under ``mask(False)`` cost nothing and are left out;
            an auxiliary site of the guide (``infer={"is_auxiliary": True}``) costs log q.

        Raises:
            ValueError: While Pyro validates: if the guide lacks a latent site of the model, or has one that the model
                lacks; if a scale or a mask is in one program only; if the parameters of a guide site that is not
                reparameterised require a gradient.
        """
        total: dict[str, Tensor] = {}
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            for name, cost in self._costs(model_trace, guide_trace):
                total[name] = total[name] + cost if name in total else cost
        return {name: cost if self.vectorize_particles else cost / self.num_particles for name, cost in total.items()}

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, the negative bound in nats summed over the data, as a tensor that can be differentiated."""
        costs = self._direct_costs(model, guide, args, kwargs)
        if costs is not None:
            return costs.sum()
        terms = [term.sum() for term in self.terms(model, guide, *args, **kwargs).values()]
        return sum(terms[1:], terms[0]) if terms else torch.zeros((), device="cpu")

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a detached tensor; its gradient is added to that of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def _direct_costs(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        """The costs computed without Pyro's messages; None if something is validated or a handler listens."""
        if checks.validating() or self.num_particles > 1 or is_listened_to():
            return None
        return pair_costs(model, guide, args, kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise ArgumentError(name, f"must be a program, but it is {arguments.described(program)}")
        guide_trace = _trace_of(guide, args, kwargs)
        model_trace = _trace_of(poutine.replay(model, trace=guide_trace), args, kwargs)
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        for site in _sites(guide_trace).values():  # some distributions may stand in a model only
            if (refuse := getattr(innermost(site["fn"]), "refuse_in_guide", None)) is not None:
                refuse()
        if checks.validating():
            _check_pair(_sites(model_trace), _sites(guide_trace))
        return model_trace, guide_trace

    def _costs(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        """Name and cost of each scored site, the model's and then the guide's auxiliary ones."""
        model_sites, guide_sites = _sites(model_trace), _sites(guide_trace)
        out_of_order = dict.fromkeys(_out_of_order(model_sites, guide_sites))
        self._warn_of_order([name for name in out_of_order if model_sites[name]["mask"] is not False])
        for name, site in model_sites.items():
            if site["mask"] is False:
                continue
            with precisely():
                if site["is_observed"]:
                    cost = -site["fn"].log_prob(site["value"])
                else:
                    q = guide_sites[name]["fn"]
                    cost = relative_entropy(q, site["fn"], site["value"], analytic=name not in out_of_order)
            if "tell" in site["infer"] and torch.is_grad_enabled():
                site["infer"]["tell"](cost.detach())
            yield name, self._scaled_and_masked(cost, site)
        for name, site in guide_sites.items():
            if name not in model_sites and site["mask"] is not False:
                yield name, self._scaled_and_masked(site["fn"].log_prob(site["value"]), site)

    def _warn_of_order(self, names: list[str]) -> None:
        if not names or self._has_warned:
            return
        self._has_warned = True
        listed = ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
        warnings.warn(
            f"the guide draws sites in another order than the model, so the KL may not be taken at {listed}: the cost "
            f"of each is the log ratio at the draw, which is unbiased, but varies more",
            UserWarning,
            stacklevel=2,
        )

    def _scaled_and_masked(self, cost: Tensor, site: dict) -> Tensor:
        """The cost with the site's scale and mask, the mean over vectorised particles."""
        cost = scale_and_mask(cost, scale=site["scale"], mask=site["mask"])
        if not (self.vectorize_particles and self.num_particles > 1):
            return cost
        cost = cost.mean(-self.max_plate_nesting)
        plates = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
        depth = max((dim for dim in plates if dim < self.max_plate_nesting), default=0)
        return cost.reshape(cost.shape[cost.dim() - depth :])


def _sites(trace: Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["infer"].get("_deterministic")
    }


def _trace_of(program: Callable, args: tuple, kwargs: dict) -> Trace:
    """The trace of a program; an error of this package is raised without the shapes that Pyro adds to its message."""
    try:
        return poutine.trace(program).get_trace(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        cause = error.__cause__
        if cause is None or "Trace Shapes" not in str(error):
            raise
        at = cause.__traceback__  # the innermost frame says whose error it is
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        ours = at is not None and at.tb_frame.f_globals.get("__name__", "").startswith("pyrodiff.")
        # an error from outside of the package keeps the shapes, unless their list is empty
        if not ours and not str(error).endswith("Trace Shapes:\n Param Sites:\nSample Sites:"):
            raise
        raise cause from None


def _out_of_order(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> list[str]:
    """The latent sites that the model draws after some other latent site, and the guide before it."""
    place = {name: i for i, name in enumerate(guide_sites)}
    found, last = [], -1
    for name, site in model_sites.items():
        if not site["is_observed"] and name in place:
            if last > place[name]:
                found.append(name)
            last = max(last, place[name])
    return found


def _check_pair(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> None:
    """Refuse a pair whose KLs, site by site, are not the terms of a bound."""
    latent = [name for name, site in model_sites.items() if not site["is_observed"]]
    auxiliary = [name for name, site in guide_sites.items() if site["infer"].get("is_auxiliary") and name not in latent]
    observed = {name for name, site in guide_sites.items() if site["is_observed"] and name in model_sites}
    drawn = [name for name in guide_sites if name not in auxiliary and name not in observed]
    for name in latent:
        if name not in drawn:
            raise ArgumentError(
                "guide",
                f"must draw every latent site of the model, but {name!r} is missing: add it to the guide, or "
                f"observe it in the model",
            )
    for name in drawn:
        if name not in latent:
            raise ArgumentError(
                "guide",
                f"must draw latent sites of the model only, but {name!r} is not one: draw it in the model too "
                f"(with the same law, if it is auxiliary), or its entropy would count as part of the bound",
            )
    for name in latent:
        _check_site(name, model_sites[name], guide_sites[name])
    for name in auxiliary:
        _check_reparameterised(name, guide_sites[name])
        if not any(isinstance(innermost(guide_sites[other]["fn"]), Delta) for other in latent):
            raise ArgumentError(
                "guide",
                f"must draw an auxiliary site only to put a Delta at a latent site of the model, as Pyro's "
                f"automatic guides do, but no site of it is a Delta and {name!r} is auxiliary: its entropy would count "
                f"as part of the bound. Draw it in the model too, with the same law",
            )


def _check_site(name: str, model_site: dict, guide_site: dict) -> None:
    for handler in ("scale", "mask"):
        in_model, in_guide = model_site[handler], guide_site[handler]
        if not _same(in_model, in_guide):
            raise ValueError(
                f"a {handler} must stand in both programs, but at site {name!r} it is {in_model} in the model and "
                f"{in_guide} in the guide: put the same poutine.{handler} or plate around it in both"
            )
    p, q = model_site["fn"], guide_site["fn"]
    if not _same(*(_own_mask(law) for law in (p, q))):
        raise ValueError(
            f"a mask must stand in both programs, but at site {name!r} the distribution has another in the model than "
            f"in the guide: put the same poutine.mask around the site in both"
        )
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"model and guide must agree on the event_shape of site {name!r}, but it is {tuple(p.event_shape)} in the "
            f"model and {tuple(q.event_shape)} in the guide"
        )
    if p.batch_shape != q.batch_shape:
        raise ValueError(
            f"site {name!r} must stand in the same plates in both programs, but its batch_shape is "
            f"{tuple(p.batch_shape)} in the model and {tuple(q.batch_shape)} in the guide"
        )
    _check_reparameterised(name, guide_site)


def _check_reparameterised(name: str, guide_site: dict) -> None:
    q = guide_site["fn"]
    if not q.has_rsample and q.log_prob(guide_site["value"]).requires_grad:
        raise ArgumentError(
            "guide",
            f"must not learn the law of a site that is not reparameterised, but the parameters of {name!r} "
            f"({type(innermost(q)).__name__}) require a gradient, which would be wrong: detach them, or use "
            f"pyro.infer.TraceGraph_ELBO; a learned schedule of bits is used as it is after "
            f"schedule.requires_grad_(False), and best_subchain finds the best of its times",
        )


def _same(ours: float | Tensor | None, theirs: float | Tensor | None) -> bool:
    ours, theirs = (None if handler is True else handler for handler in (ours, theirs))  # mask(True) masks nothing
    if ours is theirs:
        return True
    if not (isinstance(ours, Tensor) or isinstance(theirs, Tensor)):
        return ours == theirs
    if ours is None or theirs is None:
        return False
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if ours.shape != theirs.shape or ours.device.type != "cpu" or theirs.device.type != "cpu":
        return ours.shape == theirs.shape  # values on an accelerator are not read: that would synchronise at every step
    return torch.equal(ours, theirs)


def _own_mask(law: Distribution) -> Tensor | bool | None:
    """The mask of a distribution itself, broadcast to its batch_shape; None if all True, False if all False."""
    while isinstance(law, Independent):
        law = law.base_dist
    if not isinstance(law, MaskedDistribution):
        return None
    mask = torch.as_tensor(law._mask)
    if mask.device.type != "cpu":
        return mask.expand(law.batch_shape)
    if bool(mask.all()):
        return None
    return mask.expand(law.batch_shape) if bool(mask.any()) else False
