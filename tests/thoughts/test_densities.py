import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from rl_soft.thoughts import densities, noise
from rl_soft.thoughts.densities import Dirichlet, GumbelTopK, SoftToken

INF = float("inf")


def random_logits(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def kinds(logits, k=5, tau=0.1):
    """One of every random kind, also where every other id is cut off."""
    cut = logits.masked_fill(torch.arange(logits.shape[-1]) % 2 == 1, -INF)
    return [
        GumbelTopK(logits, k, tau),
        GumbelTopK(cut, k, tau),
        Dirichlet(logits, k, gamma=4.0),
        Dirichlet(cut, k, gamma=4.0),
        GumbelTopK(logits, 1, 1.0),
    ]


KINDS = ["gumbel", "cut-gumbel", "dirichlet", "cut-dirichlet", "token"]


# ---------------------------------------------------------------- normalisation


def ordered_masses(logits, k, tau, nodes=48):
    """Mass of every ordered support, by Gauss-Legendre quadrature of the density.

    With z_1 > ... > z_K the gaps d_i = z_i - z_{i+1} and w_i = e^{-d_i} in (0, 1), the density is a rational function
    of w, and prod d(x_i - x_r) = tau^{-(K-1)} prod dw_i / w_i.
    """
    t, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    w = torch.cartesian_prod(*[(t + 1) / 2] * (k - 1)).view(-1, k - 1)
    weight = torch.cartesian_prod(*[weight / 2] * (k - 1)).view(-1, k - 1).prod(-1)
    z = torch.cat([torch.zeros(len(w), 1), w.log().cumsum(-1)], -1).double()
    x = (z / tau).log_softmax(-1)  # (P, K)
    supports = torch.tensor(list(itertools.permutations(range(len(logits)), k)))
    action = SoftToken(supports[:, None].expand(-1, len(x), -1), x.expand(len(supports), -1, -1))
    density = GumbelTopK(logits.expand(*action.support.shape[:2], -1), k, tau).log_prob(action).exp()
    return supports, (density * weight / w.prod(-1)).sum(-1) / tau ** (k - 1)


def plackett_luce(logits, supports):
    pi = logits.softmax(-1)[supports]
    return (pi / (1 - pi.cumsum(-1) + pi)).prod(-1)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("v", "k"), [(4, 2), (6, 2), (4, 3), (5, 3), (6, 3)])
def test_total_mass_is_one_and_supports_have_plackett_luce_masses(v, k, tau):
    logits = random_logits(v, seed=v, dtype=torch.float64)
    supports, masses = ordered_masses(logits, k, tau)
    assert abs(masses.sum() - 1) < 1e-9
    torch.testing.assert_close(masses, plackett_luce(logits, supports), atol=1e-9, rtol=0)


def test_samples_follow_the_density():
    """Counts over (ordered support, bin of the gap) against the quadrature, V = 4, K = 2; generator and seeds."""
    logits, tau, n, bins = random_logits(4, dtype=torch.float64), 0.5, 200_000, 12
    t, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
    w = (torch.arange(bins)[:, None] + (t + 1) / 2) / bins  # (bins, nodes), w = e^{-gap}
    x = torch.stack([torch.zeros_like(w), w.log() / tau], -1).log_softmax(-1)
    supports = torch.tensor(list(itertools.permutations(range(4), 2)))
    action = SoftToken(supports[:, None, None].expand(-1, *x.shape), x.expand(len(supports), *x.shape))
    density = GumbelTopK(logits.expand(*action.support.shape[:-1], 4), 2, tau).log_prob(action).exp()
    expected = (density / tau / w * weight / 2 / bins).sum(-1) * n  # (12 supports, bins)
    d = GumbelTopK(logits.float().expand(n, 4), 2, tau)
    for source in ({"generator": torch.Generator().manual_seed(0)}, {"seeds": torch.arange(n), "position": 3}):
        sample = d.sample(**source)
        gap = tau * (sample.log_weights[:, 0] - sample.log_weights[:, 1])
        bucket = ((-gap).exp() * bins).long().clamp(max=bins - 1)
        pair = (sample.support[:, None] == supports).all(-1).long().argmax(-1)
        counts = torch.bincount(pair * bins + bucket, minlength=len(supports) * bins).view_as(expected)
        chi2, dof = ((counts - expected) ** 2 / expected).sum(), expected.numel() - 1
        assert abs(chi2 - dof) < 4 * math.sqrt(2 * dof)


# ---------------------------------------------------------------- special cases


@pytest.mark.parametrize("tau", [0.1, 0.7, 2.0])
def test_whole_vocabulary_is_the_exp_concrete_density(tau):
    """The same base measure: no constant and no Jacobian between the two."""
    logits = random_logits(3, 12, dtype=torch.float64)
    theirs = ExpRelaxedCategorical(torch.tensor(tau, dtype=torch.float64), logits=logits)
    x = theirs.sample()
    ours = GumbelTopK(logits, 12, tau).log_prob(SoftToken(torch.arange(12).expand(3, 12), x))
    torch.testing.assert_close(ours, theirs.log_prob(x))


def test_one_slot_is_the_categorical():
    logits = random_logits(7, 50)
    ids = torch.arange(7)[:, None]
    action = SoftToken(ids, torch.zeros(7, 1))
    expected = torch.distributions.Categorical(logits=logits / 0.6).log_prob(ids[:, 0])
    for tau in (1.0, 0.3):
        d = GumbelTopK(logits, 1, tau, temperature=0.6)
        torch.testing.assert_close(d.log_prob(action), expected)
    torch.testing.assert_close(d.entropy(), torch.distributions.Categorical(logits=logits / 0.6).entropy())


def test_dirichlet_is_torchs_up_to_the_measure():
    """torch's density is with respect to the weights; ours, in log-ratio coordinates, is prod e^{x_i} times that."""
    logits = random_logits(6, 40, dtype=torch.float64)
    d = Dirichlet(logits, 5, gamma=3.0, temperature=0.7)
    action = d.sample(generator=torch.Generator().manual_seed(0))
    x = action.log_weights.double().log_softmax(-1)
    concentration = 3 * (logits / 0.7).gather(-1, action.support).softmax(-1)
    theirs = torch.distributions.Dirichlet(concentration).log_prob(x.exp())
    torch.testing.assert_close(d.log_prob(SoftToken(action.support, x)), theirs + x.sum(-1))


@pytest.mark.parametrize("addressed", [False, True])
def test_dirichlet_samples_have_the_right_moments(addressed):
    n, gamma = 40_000, 2.0
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    d = Dirichlet(logits.expand(n, 4), 4, gamma)
    action = d.sample(seeds=torch.arange(n)) if addressed else d.sample(torch.Generator().manual_seed(0))
    x = torch.zeros(n, 4).scatter(-1, action.support, action.log_weights).double()
    a = gamma * logits.double().softmax(-1)
    total = torch.tensor(gamma, dtype=torch.float64)
    moments = [
        (x.exp(), a / gamma, a / gamma * (1 - a / gamma) / (gamma + 1)),
        (x, a.digamma() - total.digamma(), torch.polygamma(1, a) - torch.polygamma(1, total)),
    ]
    for value, mean, variance in moments:
        assert ((value.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
        torch.testing.assert_close(value.var(0)[:3], variance[:3], rtol=0.05, atol=0)


# ---------------------------------------------------------------- gradients and ratios


@pytest.mark.parametrize("kind", range(5), ids=KINDS)
def test_score_is_the_finite_difference(kind):
    logits = random_logits(2, 9, dtype=torch.float64).requires_grad_()
    action = kinds(logits, k=4, tau=0.4)[kind].sample(torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda u: kinds(u, k=4, tau=0.4)[kind].log_prob(action), logits, atol=1e-6, rtol=0)


def test_score_formula():
    logits = random_logits(9, dtype=torch.float64).requires_grad_()
    d = GumbelTopK(logits, 3, 0.4)
    action = d.sample(torch.Generator().manual_seed(1))
    (score,) = torch.autograd.grad(d.log_prob(action), logits)
    x = torch.full((9,), float(action.log_weights.min()), dtype=torch.float64)
    x[action.support] = action.log_weights.double()
    inside = torch.zeros(9).double().index_fill(0, action.support, 1)
    torch.testing.assert_close(score, inside - 3 * (logits - 0.4 * x).softmax(-1))


@pytest.mark.parametrize("kind", range(5), ids=KINDS)
def test_expected_ratio_is_one(kind):
    """V = 200, K = 5, tau = 0.1: E[p_new / p_old] = 1 within 4 standard errors at 20 random updates."""
    n = 8000
    for update in range(20):
        logits = random_logits(200, seed=update, scale=1.5)
        old = kinds(logits.expand(n, -1))[kind]
        action = old.sample(torch.Generator().manual_seed(update))
        new = kinds((logits + random_logits(200, seed=100 + update, scale=0.05)).expand(n, -1))[kind]
        ratio = (new.log_prob(action) - old.log_prob(action)).double().exp()
        assert ratio.std() > 1e-3
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(n)


# ---------------------------------------------------------------- precision


def wide_logits(shape):
    logits = random_logits(2, 152_000, seed=3, scale=2)
    if shape != "flat":  # the largest probability is 1 - 1e-7, or all but certain
        logits[:, 777] = logits.logsumexp(-1) + (math.log(1e7) if shape == "peaked" else 150)
    return logits


@pytest.mark.parametrize("shape", ["flat", "peaked", "certain"])
def test_float32_is_enough_at_a_wide_vocabulary(shape):
    logits = wide_logits(shape)
    seeds = torch.tensor([5, 6])
    for k, tau in [(1, 0.05), (5, 0.1), (8, 5.0), (64, 0.05), (64, 1.0), (64, 5.0)]:
        single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
        action = GumbelTopK(single, k, tau).sample(seeds=seeds)
        assert action.log_weights.isfinite().all()
        a, b = GumbelTopK(single, k, tau).log_prob(action), GumbelTopK(double, k, tau).log_prob(action)
        assert (a - b).abs().max() < 1e-3
        (grad_a,), (grad_b,) = torch.autograd.grad(a.sum(), single), torch.autograd.grad(b.sum(), double)
        assert grad_a.isfinite().all()
        torch.testing.assert_close(grad_a.double(), grad_b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [GumbelTopK, Dirichlet])
def test_float64_logits_have_a_density_in_float64(kind):
    """Log-weights are float32 numbers. What they are multiplied with is not rounded to float32."""
    distribution = kind(random_logits(50, 40, dtype=torch.float64) * 20, 8, 3.7)
    thought = distribution.sample(seeds=torch.arange(50))
    same = SoftToken(thought.support, thought.log_weights.double())
    assert thought.log_weights.dtype == torch.float32
    assert distribution.log_prob(thought).dtype == torch.float64
    torch.testing.assert_close(distribution.log_prob(thought), distribution.log_prob(same), atol=1e-11, rtol=0)


@pytest.mark.parametrize("shape", ["flat", "peaked"])
def test_dirichlet_at_a_wide_vocabulary(shape):
    logits = wide_logits(shape)
    single, double = logits.clone().requires_grad_(), logits.double()
    action = Dirichlet(single, 10, 4.0).sample(seeds=torch.tensor([1, 2]))
    log_prob = Dirichlet(single, 10, 4.0).log_prob(action)
    assert (log_prob - Dirichlet(double, 10, 4.0).log_prob(action)).abs().max() < 1e-3
    assert torch.autograd.grad(log_prob.sum(), single)[0].isfinite().all()


def test_bfloat16_logits_cost_their_rounding_and_no_more():
    logits = random_logits(4, 1000, scale=3)
    rounded = logits.bfloat16()
    d = GumbelTopK(rounded, 8, 0.3)
    action = d.sample(torch.Generator().manual_seed(0))
    exact = GumbelTopK(logits, 8, 0.3).log_prob(action)
    assert d.log_prob(action).dtype == torch.float32
    torch.testing.assert_close(
        d.log_prob(action), GumbelTopK(rounded.float(), 8, 0.3).log_prob(action), rtol=0, atol=0
    )
    # the score has an L1 norm of at most 2 K
    assert ((d.log_prob(action) - exact).abs() <= 2 * 8 * (logits - rounded.float()).abs().amax(-1)).all()


# ---------------------------------------------------------------- gathered statistics and absent slots


def test_thoughts_tokens_and_padding_share_one_call():
    logits = random_logits(4, 30, dtype=torch.float64).requires_grad_()
    full = GumbelTopK(logits, 4, 0.3).sample(torch.Generator().manual_seed(0))
    log_weights = full.log_weights.double()
    log_weights[1] = torch.tensor([0, -INF, -INF, -INF])  # a token
    log_weights[2, 3] = -INF  # a nucleus of three ids
    log_weights[2] = log_weights[2].log_softmax(-1)
    log_weights[3] = -INF  # padding
    action = SoftToken(full.support, log_weights)
    statistics = densities.gather_statistics(logits, full.support, action.present)
    result = densities.gumbel_topk_log_prob(*statistics, log_weights, 0.3)
    expected = [
        GumbelTopK(logits[0], 4, 0.3).log_prob(SoftToken(full.support[0], log_weights[0])),
        logits[1].log_softmax(-1)[full.support[1, 0]],
        GumbelTopK(logits[2], 3, 0.3).log_prob(SoftToken(full.support[2, :3], log_weights[2, :3])),
        torch.zeros(()).double(),
    ]
    torch.testing.assert_close(result, torch.stack(expected))
    torch.testing.assert_close(GumbelTopK(logits, 4, 0.3).log_prob(action), result)
    (grad,) = torch.autograd.grad(result.sum(), logits, retain_graph=True)
    assert grad.isfinite().all() and (grad[3] == 0).all()
    (expected_grad,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("name", ["gumbel_topk_log_prob", "dirichlet_log_prob"])
def test_statistics_forms_ignore_absent_slots_and_have_finite_gradients(name):
    form = getattr(densities, name)
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    log_outside = torch.tensor([-INF]).requires_grad_()
    log_weights = torch.tensor([[-0.1, -3.0, -4.0]]).log_softmax(-1).requires_grad_()
    inputs = (log_probs, log_outside, log_weights)
    grads = torch.autograd.grad(form(*inputs, 0.5).sum(), inputs, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    pad = torch.full((1, 2), -INF)
    for junk in (-INF, 3.0):
        padded = torch.cat([log_probs, torch.full((1, 2), junk)], -1)
        value = form(padded, log_outside, torch.cat([log_weights, pad], -1), 0.5)
        torch.testing.assert_close(value, form(log_probs, log_outside, log_weights, 0.5))
        assert torch.autograd.grad(value.sum(), log_probs)[0].isfinite().all()
    nothing = form(padded[:, 3:].detach().requires_grad_(), torch.zeros(1), pad, 0.5)
    assert nothing.item() == 0


def test_outside_mass_does_not_cancel():
    logits = torch.tensor([[100.0, 0.0, -1.0, -2.0]])
    _, log_outside = densities.gather_statistics(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(log_outside, torch.tensor([math.log(math.exp(-1) + math.exp(-2)) - 100]))
    _, log_outside = densities.gather_statistics(logits, torch.tensor([[3, 2, 1, 0]]))
    assert log_outside.item() == -INF


def test_masked_vocabulary():
    """-inf logits: never sampled, and where fewer than K ids are left the thought has fewer slots."""
    logits = random_logits(5, 12)
    logits[:, 3:] = -INF
    logits.requires_grad_()
    d = GumbelTopK(logits, 4, 0.5)
    action = d.sample(torch.Generator().manual_seed(0))
    assert (action.present.sum(-1) == 3).all()
    log_prob = d.log_prob(action)
    torch.testing.assert_close(
        log_prob, GumbelTopK(logits[:, :3], 3, 0.5).log_prob(SoftToken(*(t[:, :3] for t in action)))
    )
    (grad,) = torch.autograd.grad(log_prob.sum() + d.entropy().sum(), logits)
    assert grad.isfinite().all()


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", range(5), ids=KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind):
    logits = random_logits(33, 5001)
    seeds = torch.tensor([noise.address(7, f"problem-{i}", i) for i in range(33)])
    positions = torch.arange(33) % 5
    whole = kinds(logits)[kind].sample(seeds=seeds, position=positions)
    assert (whole.log_weights.diff(dim=-1).nan_to_num(nan=0) <= 0).all()
    assert whole.support.dtype == torch.int64 and whole.log_weights.dtype == torch.float32
    for rows in ([4], [32, 0], list(range(32, -1, -1))):
        part = kinds(logits[rows])[kind].sample(seeds=seeds[rows], position=positions[rows])
        assert torch.equal(part.support, whole.support[rows]) and torch.equal(
            part.log_weights, whole.log_weights[rows]
        )
    one = kinds(logits[4])[kind].sample(seeds=seeds[4], position=positions[4])
    assert torch.equal(one.log_weights, whole.log_weights[4])
    again = kinds(logits)[kind].sample(seeds=seeds, position=positions + 1)
    assert not torch.equal(again.support, whole.support)


def test_noise_is_gumbel_noise():
    b, v = 64, 20_000
    g = noise.gumbel(torch.arange(b), 0, v).double()
    assert g.isfinite().all()
    u = (-(-g).exp()).exp()
    counts = torch.histc(u, 100, 0, 1)
    assert abs(((counts - b * v / 100) ** 2 / (b * v / 100)).sum() - 99) < 4 * math.sqrt(198)
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * b * v)
    tail = (g > 12).double().mean()  # the part that decides who is sampled
    assert abs(tail - (1 - math.exp(-math.exp(-12)))) < 4 * math.sqrt(tail / (b * v))


def test_noise_is_uncorrelated_across_neighbours():
    b, v = 64, 20_000
    u, next_step = (noise.uniform(torch.arange(b), step, v).double() for step in (5, 6))
    other_stream = noise.uniform(torch.arange(b), 5, v, stream=1).double()
    pairs = {
        "index": (u[:, 1:], u[:, :-1]),
        "index + 64": (u[:, 64:], u[:, :-64]),
        "seed": (u[1:], u[:-1]),
        "step": (u, next_step),
        "stream": (u, other_stream),
        "seed and step": (u[1:], next_step[:-1]),
    }
    cells = 16
    for name, (first, second) in pairs.items():
        cell = (first * cells).long() * cells + (second * cells).long()
        counts = torch.bincount(cell.flatten(), minlength=cells**2).double()
        expected, dof = first.numel() / cells**2, cells**2 - 1
        assert abs(((counts - expected) ** 2 / expected).sum() - dof) < 4 * math.sqrt(2 * dof), name
        z = ((first - 0.5) * (second - 0.5)).mean() * 12 * math.sqrt(first.numel())
        assert abs(z) < 4, name


def test_noise_has_fixed_values():
    """The numbers are part of the interface: a change of them breaks the resumption of runs."""
    assert noise.address(0, "gsm8k-17", 3) == ADDRESS
    u = noise.uniform(torch.tensor([0, 2**62]), torch.tensor([0, 9]), 3)
    torch.testing.assert_close(u, torch.tensor(UNIFORM))
    assert 0 <= noise.address(-1, "", 0, 4) < 2**63
    assert noise.address(0, "a", 1) != noise.address(0, "a", 11) != noise.address(0, "a1", 1)


ADDRESS = 884363898637632377
UNIFORM = [[0.30702293, 0.87594640, 0.18608467], [0.48566300, 0.70665497, 0.24839094]]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda u: GumbelTopK(u, 0, 1.0), "k: .* got 0"),
        (lambda u: GumbelTopK(u, 6, 1.0), "k: .* V = 5, got 6"),
        (lambda u: GumbelTopK(u, 2, 0.0), "tau: .* got 0"),
        (lambda u: GumbelTopK(u, 2, -1.0), "tau"),
        (lambda u: GumbelTopK(u, 2, math.nan), "tau"),
        (lambda u: GumbelTopK(u, 2, 1.0, temperature=0.0), "temperature"),
        (lambda u: GumbelTopK(u.long(), 2, 1.0), "logits: .*int64"),
        (lambda u: Dirichlet(u, 2, 0.0), "gamma"),
        (lambda u: GumbelTopK(u, 1, 1.0).sample(seeds=torch.zeros(2, dtype=torch.int64)), "seeds: .*shape"),
        (lambda u: GumbelTopK(u, 1, 1.0).sample(seeds=torch.zeros(3)), "seeds: .*int64"),
        (lambda u: GumbelTopK(u, 1, 1.0).sample(torch.Generator(), torch.zeros(3, dtype=torch.int64)), "not both"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("support", "weights", "message"),
    [
        ([0, 5], [0.5, 0.5], "outside the vocabulary"),
        ([0, -1], [0.5, 0.5], "outside the vocabulary"),
        ([1, 1], [0.5, 0.5], "repeated"),
        ([0, 1], [0.5, 0.4], "log_weights"),
        ([0, 1], [0.5, math.nan], "log_weights"),
        ([0, 4], [0.5, 0.5], "-inf"),
        ([0, 1, 2], [0.5, 0.5], "shape"),
    ],
)
@pytest.mark.parametrize("kind", range(4), ids=KINDS[:4])
def test_bad_thoughts(kind, support, weights, message):
    d = kinds(torch.tensor([0.0, 0.0, 0.0, 0.0, -INF]), k=2)[kind]
    with pytest.raises(ValueError, match=message):
        d.log_prob(SoftToken(torch.tensor(support), torch.tensor(weights).log()))


def test_rounded_log_weights_are_refused():
    action = GumbelTopK(torch.zeros(5), 2, 1.0).sample()
    with pytest.raises(ValueError, match="bfloat16"):
        GumbelTopK(torch.zeros(5), 1, 1.0).log_prob(SoftToken(action.support, action.log_weights.bfloat16()))
