import copy
import itertools

import pytest
import torch
from torch import nn

from rl_soft.model import head
from rl_soft.model.head_product import plain_head
from rl_soft.thoughts import densities
from rl_soft.thoughts.densities import GumbelTopK

INF = float("inf")
N, H, V, K = 37, 16, 211, 6
TAU = 0.3


class Wrapped(nn.Module):
    """A head that must be called, since its weight alone is not the head."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return self.linear(hidden)


def problem(dtype=torch.float32, bias=False, scale=1.0):
    """(hidden, lm_head, support, log_weights): thoughts, with tokens at rows 5 to 8 and padding at row 10."""
    torch.manual_seed(0)
    lm_head = nn.Linear(H, V, bias=bias)
    nn.init.normal_(lm_head.weight, std=scale)
    lm_head = lm_head.to(dtype)
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    with torch.no_grad():
        support, log_weights = GumbelTopK(lm_head(hidden), K, TAU).sample()
    log_weights[5:9] = torch.tensor([0.0] + [-INF] * (K - 1))
    log_weights[10] = -INF
    return hidden, lm_head, support, log_weights


def plain(
    hidden, lm_head, support, log_weights, tau, temperature=1.0, softcap=None, density=densities.gumbel_topk_log_prob
):
    logits = lm_head(hidden).float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    statistics = densities.gather_statistics(logits, support, log_weights > -INF)
    return density(*statistics, log_weights, tau), densities.entropy(logits)


def backward(f, *args, parameters=(), **kwargs):
    """Values, and the gradients of a random combination of log-densities and entropies."""
    args[0].grad = None
    for p in parameters:
        p.grad = None
    log_prob, entropy = f(*args, **kwargs)
    u, v = torch.randn(2, len(log_prob), generator=torch.Generator().manual_seed(1))
    used = (args[3] > -INF).any(-1)
    (log_prob * u + entropy * v * used).sum().backward()
    return [log_prob.detach(), entropy.detach()[used], args[0].grad, *(p.grad for p in parameters)]


def assert_same(ours, theirs, rtol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert (a - b).float().norm() <= rtol * b.float().norm()


@pytest.mark.parametrize("path", ["trained", "frozen", "module", "weight"])
@pytest.mark.parametrize(("bias", "softcap", "rowwise"), itertools.product([False, True], [None, 5.0], [False, True]))
def test_equals_the_plain_pass(path, bias, softcap, rowwise):
    hidden, lm_head, support, log_weights = problem(bias=bias and path != "weight")
    temperature = torch.linspace(0.5, 1.5, N) if rowwise else 0.8
    lm_head.requires_grad_(path != "frozen")
    module = {"module": Wrapped(lm_head), "weight": lm_head.weight}.get(path, lm_head)
    common = {"temperature": temperature, "softcap": softcap, "parameters": list(lm_head.parameters())}
    expected = backward(plain, hidden, lm_head, support, log_weights, TAU, **common)
    for chunk_size in (1, 10, 37, None):  # 10 leaves a last chunk of 7
        result = backward(
            head.soft_log_prob, hidden, module, support, log_weights, TAU, chunk_size=chunk_size, **common
        )
        assert_same(result, expected)
        assert result[0][10] == 0 and (chunk_size != 1 or (result[2][10] == 0).all())


def test_tokens_are_ordinary_log_probs():
    hidden, lm_head, support, log_weights = problem()
    log_prob, _ = head.soft_log_prob(hidden, lm_head, support, log_weights, TAU, 0.7)
    expected = (lm_head(hidden) / 0.7).log_softmax(-1).gather(-1, support[:, :1])[5:9, 0]
    torch.testing.assert_close(log_prob[5:9], expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_another_density_with_tokens_off_the_thought_mask(frozen):
    hidden, lm_head, support, log_weights = problem()
    lm_head.requires_grad_(not frozen)
    mask = torch.arange(N) >= 9
    form = densities.dirichlet_log_prob

    def mixed(log_probs, log_outside, x, tau):
        return torch.where(mask, form(log_probs, log_outside, x, tau), log_probs[:, 0])

    parameters = list(lm_head.parameters())
    args = (hidden, lm_head, support, log_weights, TAU)
    ours = backward(head.soft_log_prob, *args, density=form, thought_mask=mask, chunk_size=8, parameters=parameters)
    assert_same(ours, backward(plain, *args, density=mixed, parameters=parameters))


@pytest.mark.parametrize("path", ["trained", "frozen", "module"])
def test_statistics(path):
    hidden, lm_head, support, log_weights = problem()
    lm_head.requires_grad_(path != "frozen")
    module = Wrapped(lm_head) if path == "module" else lm_head
    present = log_weights > -INF
    ours = head.support_statistics(hidden, module, support, 0.8, present=present, chunk_size=10)
    logits = lm_head(hidden) / 0.8
    expected = (*densities.gather_statistics(logits, support, present), densities.entropy(logits))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours[0].exp().sum(-1) + ours[1].exp(), torch.ones(N))
    assert (ours[0] > -INF).equal(present | (~present.any(-1, keepdim=True) & (torch.arange(K) == 0)))
    for i in range(3):  # each statistic by itself: the others come back without a gradient
        loss = [t[:5].square().sum() for t in (ours[i], expected[i])]
        (a,), (b,) = (torch.autograd.grad(x, hidden, retain_graph=True) for x in loss)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["trained", "frozen", "module"])
def test_bfloat16(path):
    """As close to float64 as its operands allow; a module's product is its own, and is rounded."""
    hidden, lm_head, support, log_weights = problem(torch.bfloat16)
    lm_head.requires_grad_(path != "frozen")
    parameters = [lm_head.weight]
    exact_head = copy.deepcopy(lm_head).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    args = (support, log_weights, TAU)
    with torch.no_grad():
        rounding = (lm_head(hidden).double() - exact_head(exact_hidden)).abs().max()
    exact = backward(plain, exact_hidden, exact_head, *args, parameters=[exact_head.weight])
    reference = backward(plain, hidden, lm_head, *args, parameters=parameters)
    module = Wrapped(lm_head) if path == "module" else lm_head
    ours = backward(head.soft_log_prob, hidden, module, *args, chunk_size=10, parameters=parameters)
    if path == "module":
        torch.testing.assert_close(ours[0], reference[0], rtol=0, atol=1e-4)  # the same bfloat16 logits
        assert ((ours[0] - exact[0]).abs() <= 2 * K * rounding).all()
    else:
        assert ((ours[0] - exact[0]).abs() <= rounding / 100).all()
    for a, b, c in zip(ours[2:], reference[2:], exact[2:], strict=True):
        if a is not None:
            assert a.dtype == torch.bfloat16
            assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-3 * c.norm()


def test_autocast_of_a_float32_head():
    hidden, lm_head, support, log_weights = problem()
    args = (hidden, lm_head, support, log_weights, TAU)
    parameters = [lm_head.weight]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = backward(plain, *args, parameters=parameters)
        for trained in (True, False):
            lm_head.requires_grad_(trained)
            ours = backward(head.soft_log_prob, *args, chunk_size=10, parameters=parameters)
            for a, b in zip(ours[: 4 if trained else 3], theirs, strict=False):
                assert a.dtype == b.dtype
                assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("path", ["trained", "frozen"])
def test_a_certain_policy_keeps_its_gradients(path):
    """With all but e^-150 of the mass on one id the other slots still compete, and their gradients are float64's."""
    hidden, lm_head, _, _ = problem()
    lm_head.requires_grad_(path == "trained")
    with torch.no_grad():
        lm_head.weight[0] = 0
        lm_head.weight[0, 0] = 1
        hidden[:, 0] = 160 + hidden[:, 0]
        lm_head.weight[1:, 0] *= 0.01
    support, log_weights = GumbelTopK(lm_head(hidden.detach()), K, TAU).sample()
    exact_head, exact_hidden = copy.deepcopy(lm_head).double(), hidden.detach().double().requires_grad_()
    exact_head.requires_grad_(path == "trained")

    def exact(hidden, lm_head, support, log_weights, tau):
        d = GumbelTopK(lm_head(hidden), K, tau)
        return d.log_prob(densities.SoftToken(support, log_weights)), d.entropy()

    ours = backward(head.soft_log_prob, hidden, lm_head, support, log_weights, TAU, parameters=[lm_head.weight])
    theirs = backward(exact, exact_hidden, exact_head, support, log_weights, TAU, parameters=[exact_head.weight])
    assert ours[2].abs().amax() > 0.1
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i != 1 and a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_whole_vocabulary():
    hidden, lm_head, _, _ = problem()
    for trained in (True, False):
        lm_head.requires_grad_(trained)
        action = GumbelTopK(lm_head(hidden.detach()), V, TAU).sample()
        args = (hidden, lm_head, *action, TAU)
        parameters = [lm_head.weight]
        assert_same(
            backward(head.soft_log_prob, *args, parameters=parameters), backward(plain, *args, parameters=parameters)
        )


def test_tied_head():
    """The head's weight is the embedding: gradients from both uses add up."""
    _, lm_head, support, log_weights = problem()
    embedding = nn.Embedding(V, H)
    embedding.weight = lm_head.weight
    grads = []
    for f in (head.soft_log_prob, plain):
        hidden = embedding(torch.arange(N)).tanh()
        hidden.retain_grad()
        grads.append(backward(f, hidden, lm_head, support, log_weights, TAU, parameters=[lm_head.weight]))
    assert_same(*grads)


def test_lora_head():
    peft = pytest.importorskip("peft")
    hidden, lm_head, support, log_weights = problem()
    model = nn.ModuleDict({"lm_head": lm_head})
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    adapted = model["lm_head"]
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    assert len(parameters) == 2 and plain_head(adapted) is None
    args = (hidden, adapted, support, log_weights, TAU, 0.8)
    ours = backward(head.soft_log_prob, *args, chunk_size=10, parameters=parameters)
    assert_same(ours, backward(plain, *args, parameters=parameters))


def test_heads_that_must_be_called():
    linear = nn.Linear(4, 7)
    assert plain_head(linear) is not None and plain_head(linear.weight) is not None
    hooked = nn.Linear(4, 7)
    hooked.register_forward_hook(lambda *_: None)
    partitioned = nn.Linear(4, 7)
    partitioned.weight.ds_id = 0  # what ZeRO-3 sets
    replaced = nn.Linear(4, 7)
    replaced.forward = linear.forward  # what accelerate does
    for module in (
        Wrapped(linear),
        hooked,
        partitioned,
        replaced,
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 7)),
    ):
        assert plain_head(module) is None


def test_spare_calls_of_a_partitioned_head_change_nothing(monkeypatch):
    """Where another rank has more chunks the module is called as often here, forward and backward."""
    hidden, lm_head, support, log_weights = problem()
    args = (hidden, Wrapped(lm_head), support, log_weights, TAU)
    parameters = [lm_head.weight]
    expected = backward(head.soft_log_prob, *args, chunk_size=10, parameters=parameters)
    calls = []
    lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(head, "most_calls", lambda lm_head, calls, device: calls + 2)
    assert_same(backward(head.soft_log_prob, *args, chunk_size=10, parameters=parameters), expected)
    assert len(calls) == 2 * (4 + 2)
    log_prob, _ = head.soft_log_prob(*args, chunk_size=10, entropy_grad=False)
    log_prob.sum().backward()
    assert len(calls) == 4 * (4 + 2)


def test_entropy_can_be_a_metric_only():
    hidden, lm_head, support, log_weights = problem()
    full, expected = head.soft_log_prob(hidden, lm_head, support, log_weights, TAU)
    (grad,) = torch.autograd.grad(full.sum(), hidden)
    for frozen in (False, True):
        lm_head.requires_grad_(not frozen)
        log_prob, entropy = head.soft_log_prob(hidden, lm_head, support, log_weights, TAU, entropy_grad=False)
        assert not entropy.requires_grad
        torch.testing.assert_close(entropy, expected)
        torch.testing.assert_close(torch.autograd.grad(log_prob.sum(), hidden)[0], grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients(frozen):
    hidden, lm_head, support, log_weights = problem()
    lm_head.requires_grad_(not frozen)
    args = (hidden, lm_head, support, log_weights, TAU)
    with_grad = head.soft_log_prob(*args)
    with torch.no_grad():
        without = head.soft_log_prob(*args)
    for a, b in zip(with_grad, without, strict=True):
        torch.testing.assert_close(a, b)
        assert a.requires_grad and not b.requires_grad


@pytest.mark.parametrize("path", ["trained", "frozen", "module"])
def test_no_more_than_a_chunk_of_logits_is_saved(path):
    """Nothing of (rows, V) is kept for backward."""
    hidden, lm_head, support, log_weights = problem()
    lm_head.requires_grad_(path == "trained")
    module = Wrapped(lm_head) if path == "module" else lm_head
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.shape), t)[1], lambda t: t):
        head.soft_log_prob(hidden, module, support, log_weights, TAU, chunk_size=10)
    assert not [s for s in sizes if len(s) == 2 and s[1] == V]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameter": 0.0}, "parameter"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"hidden": torch.zeros(N - 1, H)}, "hidden"),
        ({"log_weights": torch.zeros(N, K + 1)}, "log_weights"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_bad_input(changes, message):
    names = ("hidden", "lm_head", "support", "log_weights")
    with pytest.raises(ValueError, match=message):
        head.soft_log_prob(**{**dict(zip(names, problem(), strict=True)), "parameter": TAU, **changes})
