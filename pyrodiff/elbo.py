r"""The bound of a pair of programs, site by site.

For a guide in the model's order, with z_1, z_2, ... the latent sites and x the observed ones,

.. math::
    -\log p(x) \le \sum_i \mathbb{E}_q \, KL(q(z_i | z_{<i}) \| p(z_i | z_{<i})) - \mathbb{E}_q \log p(x | z),

one term a site. Of the trajectory pair of a diffusion these are :math:`L_T`, the :math:`L_{t-1}` and :math:`L_0`.
"""

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

from . import checks
from .terms import innermost, is_listened_to, pair_costs, precisely, relative_entropy

__all__ = ["DiffusionELBO"]


class DiffusionELBO(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, which also says its terms, and refuses a pair for which it would be wrong.

    It takes the analytic KL at each latent site where one is registered, and falls back to a Monte Carlo log ratio
    where none is. Beyond Pyro's it takes guide sites that are not reparameterised, the bits of a binomial diffusion
    say, if they have no parameters to learn. While gradients are taken, a site with ``infer={"tell": f}`` (the guide's,
    where it is latent) has f called with its cost, before scale and mask. Arguments are Pyro's: ``num_particles``,
    ``vectorize_particles``, and ``max_plate_nesting`` with it.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=3))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> terms = pyrodiff.DiffusionELBO().terms(diffusion.model, diffusion.guide, torch.ones(5, 2))
        >>> {name: tuple(term.shape) for name, term in terms.items()}
        {'x_3': (5,), 'x_2': (5,), 'x_1': (5,), 'x_0': (5,)}
    """

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The cost of each site: KL for a latent site, -log p for an observed one, with its scale and mask.

        Arguments:
            model, guide: The programs.
            *args, **kwargs: What both are called with.

        Returns:
            For each site a tensor in nats, with shape (B,) for a site in a plate of size B and () for one in none, the
            mean over particles. Their sums add up to the loss. Sites under ``mask(False)`` cost nothing and are left
            out; an auxiliary site of the guide (``infer={"is_auxiliary": True}``) costs log q.

        Raises:
            ValueError: If the guide has its sites in another order than the model, lacks one of the model's, or has
                one that the model lacks; if a scale or a mask stands in one program only; if the parameters of a guide
                site that is not reparameterised require a gradient.
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
        return sum((term.sum() for term in self.terms(model, guide, *args, **kwargs).values()), torch.zeros(()))

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a detached tensor, after its gradient has been added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def _direct_costs(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        """The costs without a message, of a pair that was checked before and has nobody listening."""
        if not checks.trusted() or self.num_particles > 1 or is_listened_to():
            return None
        return pair_costs(model, guide, args, kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        if not checks.trusted():
            _check_pair(_sites(model_trace), _sites(guide_trace))
        return model_trace, guide_trace

    def _costs(self, model_trace: Trace, guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
        """Name and cost of each scored site, the model's and then the guide's auxiliary ones."""
        model_sites, guide_sites = _sites(model_trace), _sites(guide_trace)
        for name, site in model_sites.items():
            if site["mask"] is False:
                continue
            with precisely():
                if site["is_observed"]:
                    cost = -site["fn"].log_prob(site["value"])
                else:
                    cost = relative_entropy(guide_sites[name]["fn"], site["fn"], site["value"])
            if "tell" in site["infer"] and torch.is_grad_enabled():
                site["infer"]["tell"](cost.detach())
            yield name, self._of_datum(cost, site)
        for name, site in guide_sites.items():
            if name not in model_sites and site["mask"] is not False:
                yield name, self._of_datum(site["fn"].log_prob(site["value"]), site)

    def _of_datum(self, cost: Tensor, site: dict) -> Tensor:
        """The cost with the site's scale and mask, the mean over vectorised particles."""
        cost = scale_and_mask(cost, scale=site["scale"], mask=site["mask"])
        if not (self.vectorize_particles and self.num_particles > 1):
            return cost
        cost = cost.mean(-self.max_plate_nesting)
        return cost if sum(frame.vectorized for frame in site["cond_indep_stack"]) > 1 else cost.reshape(())


def _sites(trace: Trace) -> dict[str, dict]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["infer"].get("_deterministic")
    }


def _check_pair(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> None:
    """Refuse a pair whose KLs, site by site, are not the terms of a bound."""
    latent = [name for name, site in model_sites.items() if not site["is_observed"]]
    auxiliary = [name for name, site in guide_sites.items() if site["infer"].get("is_auxiliary") and name not in latent]
    drawn = [name for name in guide_sites if name not in auxiliary]
    for name in latent:
        if name not in drawn:
            raise ValueError(
                f"guide must draw every latent site of the model, but {name!r} is missing: add it to the guide, or "
                f"observe it in the model"
            )
    for name in drawn:
        if name not in latent:
            raise ValueError(
                f"guide must draw latent sites of the model only, but {name!r} is not one: draw it in the model too "
                f"(with the same law, if it is auxiliary), or its entropy would count as part of the bound"
            )
    for ours, theirs in zip(latent, drawn, strict=True):
        if ours != theirs:
            raise ValueError(
                f"guide must draw its sites in the order of the model, but it draws {theirs!r} where the model draws "
                f"{ours!r}: in another order the KLs at the sites are not the terms of the bound. Let the guide draw "
                f"{ours!r} first, by the forward posterior q(x_s | x_t, x_0) say, or use pyro.infer.Trace_ELBO, which "
                f"is right for any order"
            )
    for name in latent:
        _check_site(name, model_sites[name], guide_sites[name])
    for name in auxiliary:
        _check_reparameterised(name, guide_sites[name])
        if not any(isinstance(innermost(guide_sites[other]["fn"]), Delta) for other in latent):
            raise ValueError(
                f"guide must draw an auxiliary site only to put a Delta at a latent site of the model, as Pyro's "
                f"automatic guides do, but no site of it is a Delta and {name!r} is auxiliary: its entropy would count "
                f"as part of the bound. Draw it in the model too, with the same law"
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
    if _is_masked(p) != _is_masked(q):
        raise ValueError(
            f"a mask must stand in both programs, but at site {name!r} only the {'model' if _is_masked(p) else 'guide'}"
            f"'s distribution has one: put poutine.mask around the site in both"
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
        raise ValueError(
            f"guide must not learn the law of a site that is not reparameterised, but the parameters of {name!r} "
            f"({type(innermost(q)).__name__}) require a gradient, which would be wrong: detach them, or use "
            f"pyro.infer.TraceGraph_ELBO"
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
        return ours.shape == theirs.shape  # values on an accelerator are not read: that would stall every step
    return torch.equal(ours, theirs)


def _is_masked(law: Distribution) -> bool:
    while isinstance(law, Independent):
        law = law.base_dist
    return isinstance(law, MaskedDistribution)
