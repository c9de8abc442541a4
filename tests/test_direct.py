"""What a change of one line of the package could do unseen: each test was written for one that no other test saw."""

import math
from collections import deque
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import pyrodiff
from pyrodiff.running.compilation import Composition


class Noting(nn.Module):
    """A network of one parameter that notes the states and times that it is called with."""

    def __init__(self):
        super().__init__()
        self.factor, self.states, self.times = nn.Parameter(torch.tensor(0.3)), [], []

    def forward(self, x_t, t):
        self.states.append(x_t.detach())
        self.times.append(t)
        return self.factor * x_t


class Scaling(nn.Module):
    """A network of one parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x_t, t):
        return self.factor * x_t


def diffusion(beta=0.3, decoder=None, network=None, shape=(2,), prior=None):
    """A diffusion of four steps."""
    forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(4, beta / 2, beta))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(network or Noting(), forward))
    return pyrodiff.Diffusion(forward, reverse, shape, decoder, prior)


def loss(pair, seed=3, validate=False):
    """The loss of a pair, with its gradient, from a seed."""
    pyro.set_rng_seed(seed)
    with pyro.validation_enabled(validate):
        return pyrodiff.DiffusionELBO().loss_and_grads(pair[0], pair[1], torch.linspace(-1, 1, 10).reshape(5, 2))


def test_a_network_of_a_shorter_chain_has_a_time_for_each_datum_where_the_step_is_a_number():
    """Step 2 of the chain of times 1, 3 and 4 is the time 3 of the whole chain, of each of 5 data."""
    chain = diffusion().subchain([1, 3, 4])
    chain.reverse(torch.zeros(5, 2), 2)
    network = next(module for module in chain.modules() if isinstance(module, Noting))
    assert network.times[-1].tolist() == [3] * 5


def test_of_several_processes_particles_have_their_own_part_of_the_interval():
    """3 particles of 4 data in 2 processes are 24 draws, each 1/24 from the next, and no two the same."""
    draws = []
    for number in (0, 1):
        drawing = pyrodiff.LowDiscrepancyDrawing()
        drawing.spread(number, 2, key=5)
        law = drawing.uniforms(torch.zeros(4, dtype=torch.float64))
        draws.append(law.expand((3, 4)).sample().flatten())
    torch.testing.assert_close(torch.cat(draws).sort().values.diff(), torch.full((23,), 1 / 24, dtype=torch.float64))


@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize("of", ["trajectory", "one step"])
def test_a_hook_of_a_program_is_run_where_nothing_is_validated(of, program):
    """A hook may do anything, so a program that has one is called, as often as its loss is taken."""
    pair = diffusion() if of == "trajectory" else diffusion().one_step()
    calls = []
    getattr(pair, program).register_forward_hook(lambda *args: calls.append(1))
    loss((pair.model, pair.guide))
    loss((pair.model, pair.guide))
    assert len(calls) == 2


class Scaled(pyrodiff.Decoder):
    """A decoder with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, kernel, x_1):
        return pyro.distributions.Normal(x_1, self.log_scale.exp()).to_event(1)


class Last(pyrodiff.UniformDrawing):
    """A drawing of nothing but the last time."""

    def forward(self, u, num_steps):
        return torch.full(u.shape, num_steps), torch.ones_like(u)


@pytest.mark.parametrize("validate", [True, False])
def test_a_decoder_that_learns_has_a_gradient_of_0_where_no_datum_is_at_its_step(validate):
    """As with messages, so without: an optimizer with momentum goes on, and processes agree on who has a gradient."""
    whole = diffusion(decoder=Scaled())
    pair = whole.one_step(drawing=Last())
    loss((pair.model, pair.guide), validate=validate)
    assert whole.model.decoder.log_scale.grad.tolist() == 0


@pytest.mark.parametrize("of", ["trajectory", "one step"])
def test_the_guide_of_another_diffusion_is_the_one_that_is_evaluated(of):
    """What is scored is the pair that is given: another forward process has another posterior, messages or not."""
    pairs = [diffusion(beta=beta) if of == "trajectory" else diffusion(beta=beta).one_step() for beta in (0.3, 0.5)]
    seen, unseen = (loss((pairs[0].model, pairs[1].guide), validate=validate) for validate in (True, False))
    torch.testing.assert_close(seen, unseen)


def test_particles_are_all_drawn_where_nothing_is_validated():
    """Four particles of the one-step pair are four calls of the network, validated or not."""
    for validate in (True, False):
        whole = diffusion()
        pair = whole.one_step()
        with pyro.validation_enabled(validate):
            pyrodiff.DiffusionELBO(num_particles=4).loss(pair.model, pair.guide, torch.ones(5, 2))
        assert len(whole.reverse.denoiser.network.times) == 4


def test_nothing_is_said_of_the_order_of_sites_that_cost_nothing():
    """Under mask(False) no KL is taken, so it does not matter that the guide draws b first."""
    normal = pyro.distributions.Normal(0.0, 1.0)

    def program(names):
        def run():
            with pyro.poutine.mask(mask=False):
                for name in names:
                    pyro.sample(name, normal)
            pyro.sample("c", normal)

        return run

    assert pyrodiff.DiffusionELBO().loss(program("ab"), program("ba")) == 0


def test_without_messages_no_two_states_of_a_trajectory_have_the_same_noise():
    """Each x_t of each datum is a draw by itself, so 4 times, 5 data and 2 dimensions are 40 numbers."""
    whole, x_0 = diffusion(), torch.linspace(-1, 1, 10).reshape(5, 2)
    loss((whole.model, whole.guide))
    network = whole.reverse.denoiser.network
    states, times = torch.cat(network.states), torch.cat(network.times)
    noise = whole.forward_process.noise(states, x_0.repeat(4, 1), times)
    assert float(noise.flatten().sort().values.diff().min()) > 1e-5


def test_particles_of_large_data_have_noise_of_their_own():
    """A datum of more than half the numbers of a block has one particle a block, and the three have three weights."""
    size = 2**17 + 1
    found = pyrodiff.importance_bound(diffusion(shape=(size,)), torch.zeros(1, size), num_particles=3, generator=0)
    assert len(found.log_weights.unique()) == 3


@pytest.mark.parametrize("mean", [-3.0, 3.0])
def test_data_far_from_mean_0_on_either_side_are_pointed_out(mean):
    """Data of deviation 1 around -3 are as far from what the prior is made for as data around 3."""
    whole = diffusion()
    svi = pyrodiff.SVI(whole.model, whole.guide, partial(torch.optim.Adam, lr=1e-3), pyrodiff.DiffusionELBO())
    with pytest.warns(UserWarning, match=f"mean {mean:.0f}"):
        svi.step(mean + torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_a_zero_of_the_other_sign_is_another_number():
    """A graph in which 1 / 0.0 was computed is not the graph of 1 / -0.0, though the two zeros are equal."""
    network = Noting()
    network.shift = 0.0
    parts = Composition([network], [])
    assert parts.holds()
    network.shift = -0.0
    assert not parts.holds()


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_of_all_modules_makes_a_graph_another(register):
    """torch runs it at every call of every module, and it may change what comes out."""
    parts = Composition([Noting()], [])
    assert parts.holds()
    handle = register(lambda *args: None)
    try:
        assert not parts.holds()
    finally:
        handle.remove()
    assert parts.holds()


def test_an_array_of_the_same_bytes_in_another_shape_is_another():
    """Four numbers in a row are not two rows of two, as a matrix product would tell."""
    network = Noting()
    network.table = np.arange(4.0)
    parts = Composition([network], [])
    assert parts.holds()
    network.table.resize((2, 2), refcheck=False)
    assert not parts.holds()


@pytest.mark.parametrize(("value", "add"), [({1, 2}, set.add), (deque([1, 2]), deque.append)], ids=["set", "deque"])
def test_what_is_put_into_a_set_or_a_deque_makes_a_graph_another(value, add):
    """Any collection that a program goes through is what it does, not lists alone."""
    network = Noting()
    network.kinds = value
    parts = Composition([network], [])
    assert parts.holds()
    add(value, 3)
    assert not parts.holds()


def test_without_messages_the_step_costs_in_proportion_to_its_weight():
    """The loss is L_T + w L, so that equal steps in w are equal steps in the loss, and not of 0."""
    losses = []
    for weight in (1.0, 2.0, 3.0):
        whole = diffusion()
        pair = whole.one_step(weighting=lambda t, weight=weight: torch.full(t.shape, weight))
        losses.append(loss((pair.model, pair.guide)))
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0])
    assert float(losses[1] - losses[0]) > 0.1


def test_a_compiled_loss_that_is_not_finite_has_no_part_in_the_sum_of_gradients(interpreted):
    """Of two batches that one step adds up, the one with a number that is not finite is left out, compiled or not."""
    whole = diffusion(network=Scaling())
    svi = pyrodiff.SVI(
        whole.model,
        whole.guide,
        partial(torch.optim.SGD, lr=1e-3),
        pyrodiff.DiffusionELBO(),
        accumulate=2,
        nonfinite="skip",
        compile=True,
    )
    x_0 = torch.linspace(-1, 1, 10).reshape(5, 2)
    for _ in range(3):
        svi.step(x_0)
    before = whole.reverse.denoiser.network.factor.item()
    with pytest.warns(RuntimeWarning, match="skipped"):
        svi.step(torch.full_like(x_0, torch.nan))
    assert interpreted
    after = whole.reverse.denoiser.network.factor.item()
    assert math.isfinite(after)
    assert after != pytest.approx(before, abs=1e-9)


class Broken(Noting):
    """A network that knows the first two steps alone."""

    def forward(self, x_t, t):
        return super().forward(x_t, t) + torch.where(t > 2, torch.nan, 0.0)[:, None]


def test_a_bound_in_which_a_term_is_no_number_says_so_in_that_term():
    """What is given is validated, and a first call at t = 2; what is computed is not, and says so in its term."""
    found = pyrodiff.bound(diffusion(network=Broken()), torch.ones(5, 2), generator=0)
    assert found.denoising[1:].isnan().all()
    assert found.denoising[0].isfinite().all()
    assert found.prior.isfinite().all()
    assert found.reconstruction.isfinite().all()


class Random(PyroModule):
    """A network with a random weight."""

    def __init__(self):
        super().__init__()
        self.factor = PyroSample(pyro.distributions.Normal(0.0, 1.0))

    def forward(self, x_t, t):
        return self.factor * x_t


def test_a_random_weight_is_drawn_before_the_chain():
    """Its site is the first one, so that it stands outside the plate of the data and does not wait for a call."""
    trace = pyro.poutine.trace(diffusion(network=Random()).model).get_trace(torch.ones(5, 2))
    sites = [name for name in trace.stochastic_nodes if name != "data"]
    assert sites[0].endswith("factor")
    assert sites[1] == "x_4"


class Stored(PyroModule):
    """A network whose parameter is one of Pyro's."""

    def __init__(self):
        super().__init__()
        self.factor = PyroParam(torch.tensor(0.3), constraint=constraints.positive)

    def forward(self, x_t, t):
        return self.factor * x_t


def test_a_bound_leaves_no_parameter_in_the_store():
    """It is no program, so that what a program of the same names has in the store, or will have, is not touched."""
    pyrodiff.bound(diffusion(network=Stored()), torch.ones(5, 2), generator=0)
    assert not list(pyro.get_param_store().keys())


def test_particles_of_a_prior_without_a_kl_have_draws_of_their_own():
    """The first of two particles is the one that stands alone, so that the mean of both is another number."""
    whole = diffusion(prior=pyro.distributions.StudentT(5.0, torch.zeros(2), 1.0).to_event(1))
    one, two = (pyrodiff.bound(whole, torch.ones(5, 2), num_particles=number, generator=0).prior for number in (1, 2))
    assert float((one - two).abs().min()) > 1e-5
