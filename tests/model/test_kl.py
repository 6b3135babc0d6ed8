"""The KL to the reference for K > 1: that of the categoricals, exact, finite, and weighted as TRL weighs its own.

pytest tests/model/test_kl.py
pytest tests/model/test_kl.py -m slow    two processes, under DDP, ZeRO-2 and ZeRO-3
"""

import copy
import itertools
import weakref
from dataclasses import replace

import pytest
import test_parallel
import torch
import yaml
from conftest import tiny_policy
from peft import LoraConfig
from test_grpo import THINKING, TOKENS, config, dataset, soft_trainer, train
from test_head import Wrapped
from torch import nn
from trl import GRPOTrainer

from rl_soft.config.recipe import load_recipe
from rl_soft.model import kl as kl_module
from rl_soft.model import policy
from rl_soft.model.kl import categorical_kl
from rl_soft.model.think import mix_embeddings, position_ids
from rl_soft.thoughts.densities import GumbelTopK
from rl_soft.train import pipeline as run
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.normaliser import aggregate
from rl_soft.train.soft_batch import SoftBatch

N, H, V = 37, 16, 211


def problem(bias=False, scale=1.0, distance=0.3):
    """(hidden, lm_head, ref_hidden, ref_lm_head), the reference `distance` away."""
    torch.manual_seed(0)
    lm_head = nn.Linear(H, V, bias=bias)
    nn.init.normal_(lm_head.weight, std=scale)
    hidden = torch.randn(N, H)
    ref_head = copy.deepcopy(lm_head)
    with torch.no_grad():
        ref_head.weight += distance * scale * torch.randn(V, H)
    return hidden.requires_grad_(), lm_head, hidden.detach() + distance * torch.randn(N, H), ref_head


def plain(hidden, lm_head, ref_hidden, ref_head, temperature=1.0, softcap=None):
    """The formula, with materialised logits."""

    def log_probs(states, module):
        logits = module(states)
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        divisor = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
        return (logits / divisor).log_softmax(-1)

    log_p, log_q = log_probs(hidden, lm_head), log_probs(ref_hidden, ref_head).detach()
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def grads(f, *args, parameters=(), **kwargs):
    """Values, and the gradients of a random combination of them."""
    kl = f(*args, **kwargs)
    weights = torch.randn(len(kl), generator=torch.Generator().manual_seed(1)).to(kl)
    return [kl.detach(), *torch.autograd.grad((kl * weights).sum(), [args[0], *parameters])]


def in_float64(hidden, lm_head, ref_hidden, ref_head):
    exact = hidden.detach().double().requires_grad_()
    return exact, copy.deepcopy(lm_head).double(), ref_hidden.double(), copy.deepcopy(ref_head).double()


@pytest.mark.parametrize("path", ["trained", "frozen", "module", "weight"])
@pytest.mark.parametrize(("bias", "softcap", "rowwise"), itertools.product([False, True], [None, 5.0], [False, True]))
def test_equals_the_formula_in_float64(path, bias, softcap, rowwise):
    args = problem(bias=bias and path != "weight")
    exact_args = in_float64(*args)
    hidden, lm_head, ref_hidden, ref_head = args
    temperature = torch.linspace(0.5, 1.5, N) if rowwise else 0.8
    common = {"temperature": temperature, "softcap": softcap}
    trained = path != "frozen"
    lm_head.requires_grad_(trained)
    expected = grads(plain, *exact_args, parameters=list(exact_args[1].parameters()) if trained else (), **common)
    module = {"module": Wrapped(lm_head), "weight": lm_head.weight}.get(path, lm_head)
    parameters = list(lm_head.parameters()) if trained else ()
    for chunk_size in (1, 10, 37, None):  # 10 leaves a last chunk of 7
        ours = grads(
            categorical_kl, hidden, module, ref_hidden, ref_head,
            chunk_size=chunk_size, parameters=parameters, **common,
        )  # fmt: skip
        for a, b in zip(ours, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("path", ["trained", "frozen"])
def test_is_nothing_at_equality_and_never_negative(path):
    hidden, lm_head, _, _ = problem()
    lm_head.requires_grad_(path == "trained")
    kl, gradient = grads(categorical_kl, hidden, lm_head, hidden.detach(), lm_head)
    assert (kl == 0).all() and gradient.abs().max() < 1e-7
    for distance in (1e-6, 1e-4, 1e-2):
        args = problem(distance=distance)
        kl = categorical_kl(*args)
        exact = plain(*in_float64(*args))
        assert (kl >= 0).all()
        # The float32 logits are off by 1e-6 or so, and the divergence is quadratic in what is off.
        torch.testing.assert_close(kl.double(), exact, rtol=1e-2, atol=1e-10)


def test_stays_finite_where_the_estimate_of_the_density_overflows():
    """TRL's k3 of a thought's log-densities is infinite for a policy that moved; the divergence itself is not."""
    hidden, lm_head, ref_hidden, ref_head = problem(scale=4.0, distance=2.0)
    logits, ref_logits = lm_head(hidden).detach(), ref_head(ref_hidden).detach()
    thought = GumbelTopK(ref_logits, 4, 0.5).sample(torch.Generator().manual_seed(0))  # of an earlier policy
    d = GumbelTopK(ref_logits, 4, 0.5).log_prob(thought) - GumbelTopK(logits, 4, 0.5).log_prob(thought)
    k3 = d.exp() - d - 1
    assert k3.isinf().any()
    kl, gradient = grads(categorical_kl, hidden, lm_head, ref_hidden, ref_head)
    assert kl.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(
        kl.double(), plain(*in_float64(hidden, lm_head, ref_hidden, ref_head)), rtol=1e-4, atol=0
    )
    far = [x * 50 if isinstance(x, torch.Tensor) else x for x in (hidden.detach(), lm_head, -ref_hidden, lm_head)]
    assert categorical_kl(*far).isfinite().all()


@pytest.mark.parametrize("path", ["trained", "frozen", "module"])
def test_no_more_than_a_chunk_of_logits_is_alive(path):
    hidden, lm_head, ref_hidden, ref_head = problem()
    lm_head.requires_grad_(path == "trained")
    module = Wrapped(lm_head) if path == "module" else lm_head
    rows, saved = [], weakref.WeakSet()
    ref_head.register_forward_hook(lambda m, args, out: rows.append(len(out)))

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.tensor):
        kl = categorical_kl(hidden, module, ref_hidden, ref_head, chunk_size=10)
    assert not [s.tensor.shape for s in saved if s.tensor.shape[-1:] == (V,)]
    kl.sum().backward()
    assert max(rows) == 10 and sum(rows) == (N if path == "frozen" else 2 * N)


def test_spare_calls_of_a_partitioned_head_change_nothing(monkeypatch):
    """Where another rank has more chunks both heads are called as often here, forward and backward."""
    hidden, lm_head, ref_hidden, ref_head = problem()
    args = (hidden, Wrapped(lm_head), ref_hidden, Wrapped(ref_head))
    expected = grads(categorical_kl, *args, chunk_size=10, parameters=[lm_head.weight])
    calls = []
    for module in (lm_head, ref_head):
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(kl_module, "most_calls", lambda lm_head, calls, device: calls + 2)
    ours = grads(categorical_kl, *args, chunk_size=10, parameters=[lm_head.weight])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len(calls) == 2 * 2 * (4 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_hidden": torch.zeros(N - 1, H)}, "ref_hidden: expected the 37 rows of hidden, got 36"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_input(changes, message):
    names = ("hidden", "lm_head", "ref_hidden", "ref_lm_head")
    with pytest.raises(ValueError, match=message):
        categorical_kl(**{**dict(zip(names, problem(), strict=True)), **changes})


# ---------------------------------------------------------------------------------------------------------------------
# In training


def saved_policy(folder, tied=True):
    """A policy that has a path, as a reference for full fine-tuning needs."""
    made = tiny_policy(tied=tied)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return policy.load_policy(str(folder))


def logits_of(model, inputs):
    """(B, C, V) logits that predict the recorded actions, by the model as it is."""
    embedding = model.get_input_embeddings()
    fed = mix_embeddings(embedding, inputs["support"], inputs["log_weights"])
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    embeds = torch.cat([embedding(inputs["prompt_ids"]), fed], 1)
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids(mask)).logits
    return logits[:, inputs["prompt_ids"].shape[1] - 1 : -1]


LORA = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.mark.parametrize(
    "reference",
    ["full", "lora", "head beside lora", "copy of the adapter", "copy of the adapter and its head"],
)
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, reference):
    """With equal rewards all that is left of the loss is beta times the mean divergence from the right reference."""
    made = saved_policy(tmp_path / "model", tied="head" not in reference)
    peft = None
    if reference != "full":
        save = ["lm_head"] if "head" in reference else None
        peft = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=save, **LORA)
    if reference.startswith("copy"):
        from peft import get_peft_model

        made.model, peft = get_peft_model(made.model, peft), None
    thinking = replace(THINKING, temperature=1.3, thought_temperature=0.8)
    trainer = SoftGRPOTrainer(
        made.model, reward_funcs=lambda completions, **_: [1.0] * len(completions), peft_config=peft,
        args=config(tmp_path, beta=0.2, loss_type="bnpo", max_steps=1), train_dataset=dataset(),
        processing_class=made.tokenizer, thinking=thinking, ratio="joint",
    )  # fmt: skip
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    generator = torch.Generator().manual_seed(0)
    moved = [p + 0.5 * p.std() * torch.randn(p.shape, generator=generator) for p in start]
    divisors, checked = (0.8, 1.3), []

    @torch.no_grad()
    def move_to(values):
        for p, value in zip(trained, values, strict=True):
            p.copy_(value)

    @torch.no_grad()
    def reference_logits(inputs):
        if reference.startswith("copy") or reference == "full":
            move_to(start)
            logits = logits_of(model, inputs)
            move_to(moved)
            return logits
        with model.disable_adapter():
            return logits_of(model, inputs)

    def compare(self, model, inputs, *args, **kwargs):
        inputs = self._prepare_inputs(inputs)
        divisor = torch.where(inputs["thought_mask"].bool(), *divisors)[..., None]
        log_q = (reference_logits(inputs).double() / divisor).log_softmax(-1)
        log_p = (logits_of(model, inputs).double() / divisor).log_softmax(-1)
        on = inputs["action_mask"].bool()
        assert on.any() and not on.all()
        theirs = 0.2 * (log_p.exp() * (log_p - log_q)).sum(-1)[on].mean()
        ours = self.compute_loss(model, inputs)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4) and theirs > 1e-4
        for a, b in zip(*(torch.autograd.grad(x, trained, allow_unused=True) for x in (ours, theirs)), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7
        checked.append(True)
        return ours.detach()

    move_to(moved)  # the policy leaves its reference
    trainer.training_step = compare.__get__(trainer)
    train(trainer)
    assert checked


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_is_weighted_as_trl_weighs_its_own(tmp_path, loss_type):
    """TRL's loss with and without its per-token KL, which a chosen reference makes a known number a position."""
    trainer = soft_trainer(
        tmp_path, TOKENS, loss_type=loss_type, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        steps_per_generation=4, max_steps=4, mask_truncated_completions=True, use_bias_correction_kl=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    compute, seen = trainer._compute_loss, []

    def check(model, inputs):
        trainer._soft, trainer._pass = SoftBatch.from_dict(inputs), None
        d = torch.randn(inputs["completion_ids"].shape, generator=generator)
        for training in (True, False):
            trainer.model.train(training)
            with torch.no_grad():
                without = GRPOTrainer._compute_loss(trainer, model, inputs)
                trainer.beta = 0.3
                reference = {"ref_per_token_logps": trainer._pass.log_probs + d}
                with_kl = GRPOTrainer._compute_loss(trainer, model, {**inputs, **reference})
                trainer.beta = 0.0
                ours = 0.3 * aggregate(trainer, d.exp() - d - 1, inputs)
            assert (with_kl - without).item() == pytest.approx(ours.item(), rel=1e-3, abs=1e-6)
            seen.append(ours.item())
        trainer.model.train()
        return compute(model, inputs)

    trainer._compute_loss = check
    train(trainer)
    assert len(seen) == 2 * 8 and max(seen) > 1e-3


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_starts_at_the_reference_and_beta_holds_it_there(tmp_path, lora):
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    last = {}
    for beta in (1e-6, 2.0):
        made = saved_policy(tmp_path / f"model{beta}")
        values = {"beta": beta, "num_iterations": 2, "max_steps": 12, "peft_config": peft}
        trainer = soft_trainer(tmp_path / f"run{beta}", made=made, **values)
        assert trainer.full_kl_beta == beta
        logs = train(trainer)
        assert logs[0]["kl"] == pytest.approx(0, abs=1e-9)
        assert all(log["kl"] > 0 for log in logs[1:])
        assert all(torch.tensor(log[k]).isfinite() for log in logs for k in ("loss", "grad_norm", "kl"))
        for log in logs[1:]:
            inside = sorted([log["thoughts/kl"], log["answer/kl"]])
            assert inside[0] <= log["kl"] <= inside[1]
        last[beta] = sum(log["kl"] for log in logs[-4:]) / 4
    assert last[2.0] < 0.5 * last[1e-6], last


def test_each_row_keeps_its_own_reference(tmp_path):
    """The states travel with their rows through shuffling and splitting."""
    values = {"beta": 0.5, "num_iterations": 2, "max_steps": 4}
    logs = []
    for name, per_device, accumulation in (("one", 8, 1), ("many", 2, 4)):
        made = saved_policy(tmp_path / f"model-{name}")
        batches = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        logs.append(train(soft_trainer(tmp_path / name, made=made, **batches, **values)))
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-4)
    assert logs[0][-1]["kl"] > 1e-4


@pytest.mark.parametrize("ratio", ["factored", "top1", "pathwise"])
def test_other_ratios_have_the_same_divergence(tmp_path, ratio):
    joint, other = (
        train(soft_trainer(tmp_path / r, made=saved_policy(tmp_path / f"m{r}"), ratio=r, beta=0.1, max_steps=2))
        for r in ("joint", ratio)
    )
    assert all(log["grad_norm"] > 0 and torch.tensor(log["kl"]).isfinite() for log in other)
    assert other[1]["answer/kl"] > 0
    if ratio == "pathwise":  # thoughts are no actions there
        assert other[1]["thoughts/kl"] == 0
    else:
        assert other[0]["kl"] == joint[0]["kl"] and other[1]["thoughts/kl"] > 0


def test_one_slot_keeps_trls_estimate(tmp_path):
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    thinking = replace(THINKING, thought="token", thought_k=1)
    trainer = soft_trainer(tmp_path, thinking, peft_config=peft, beta=0.1)
    assert trainer.beta == 0.1 and trainer.full_kl_beta == 0
    for log in train(trainer):
        inside = sorted([log["thoughts/kl"], log["answer/kl"]])
        assert inside[0] <= log["kl"] <= inside[1]


def test_a_reference_that_would_be_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"beta 0.1: .* made in memory"):
        soft_trainer(tmp_path, beta=0.1)
    made = saved_policy(tmp_path / "model")
    with pytest.raises(ValueError, match="ref_model_sync_steps must be a multiple of the 2 optimizer steps"):
        soft_trainer(tmp_path, made=made, beta=0.1, num_iterations=2, sync_ref_model=True, ref_model_sync_steps=3)


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codi")
    (folder / "codi.yaml").write_text(yaml.safe_dump({**test_parallel.CODI, "output_dir": str(folder / "codi")}))
    run.run(load_recipe(folder / "codi.yaml"))
    return folder / "codi.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_processes_are_one(tmp_path, warm_start, stage, lora):
    """Both heads partitioned (ZeRO-3), chunks of three positions: ranks have unequal numbers of them."""
    if stage:
        pytest.importorskip("deepspeed")
    values = {"beta": 0.5, "num_iterations": 2, "max_steps": 4, "use_peft": lora, "lora_r": 4, "chunk_size": 3}
    one = test_parallel.write(tmp_path / "one", warm_start, per_device_train_batch_size=16, **values)
    run.run(load_recipe(one))
    two = test_parallel.write(tmp_path / "two", warm_start, per_device_train_batch_size=2, **values)
    process = test_parallel.launch(tmp_path / "two", stage, "-m", "rl_soft", two)
    error = process.communicate(timeout=400)[1]
    assert (tmp_path / "two/rl/model").exists(), error[-3000:]
    logs = [test_parallel.metrics(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == 4 and logs[0][3]["kl"] > 1e-6
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
