"""What runs on a GPU, on tensors of a GPU that have no data: torch's FakeTensorMode.

A tensor left on the CPU, a dtype that does not fit, and a look at a value (which stops a CUDA graph) are errors here.
Backward passes are not run: autograd asks for a real device.

pytest tests/invariants/test_fake_cuda.py
"""

import ctypes
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from peft import LoraConfig, get_peft_model
from test_codi import batch_of
from test_codi import make as codi_trainer
from test_engine import EXPLICIT, LATENT, MODELS, arguments, make
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl_soft.model.projector import add_projector
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.model.value_head import add_value_head
from rl_soft.rollouts.engine import Engine
from rl_soft.rollouts.recording import Walk
from rl_soft.thoughts import noise
from rl_soft.thoughts.decoding import Decoding

PRECISIONS = [("float32", True), ("bfloat16", False)]  # dtype of the weights, autocast


def device_guard() -> None:
    """Let torch built without CUDA switch to a CUDA device, by the guard of the meta device, which does nothing."""
    cuda, meta = 1, 14  # c10::DeviceType
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as error:
        pytest.skip(f"this build of torch has no table of devices that a test can write to: {error}")
    guards[cuda] = guards[cuda] or guards[meta]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """The mode itself, which is on for the whole test."""
    device_guard()
    monkeypatch.setattr("rl_soft.model.head_triton.usable", lambda logits: False)  # kernels need the data
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_: False)  # a look, in prefills
    noise.index_hashes.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)  # real CPU tensors are then fake CPU tensors
    noise.index_hashes.cache_clear()


def onto_cuda(model) -> None:
    """Fake weights and buffers in the place of the real ones; call it inside the mode."""
    made: dict[int, tuple] = {}

    def fake(x):
        if x is not None and id(x) not in made:
            new = torch.empty(x.shape, dtype=x.dtype, device="cuda")
            made[id(x)] = torch.nn.Parameter(new, x.requires_grad) if isinstance(x, torch.nn.Parameter) else new, x
        return None if x is None else made[id(x)][0]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: fake(x) for name, x in held.items()})


def with_adapter(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


class Transfers(TorchDispatchMode):
    """Operations that read one device and write another."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            self.found.add(str(func))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# The decode step


def assert_step_stays(fake, made, layout, seeds=True, decoding=None) -> None:
    _, _, prompts, row_seeds, eos = arguments(made, layout, samples=2)
    head = made.model.get_output_embeddings()
    with fake, torch.no_grad():
        onto_cuda(made.model)
        engine = Engine(made.model, layout, prompts, row_seeds if seeds else None, eos, 10**6, "none", decoding)
        assert engine.replay.on
        engine.replay.on = False  # no device to record on
        if layout.thinking.kind.reads_hidden:
            head.register_forward_pre_hook(lambda _, args: setattr(engine, "read", args[0]))
        engine.enter()
        assert engine.cache.grain > 1 and engine.cache.layers[0].keys.is_cuda
        with Transfers() as transfers:
            engine.step()
        assert transfers.found <= {"aten.fill_.Tensor"}  # a number of the program's own, which a graph keeps
        assert {x.device.type for x in vars(engine.walk.out).values() if isinstance(x, torch.Tensor)} == {"cuda"}


@pytest.mark.parametrize("kind", MODELS)
def test_the_step_of_a_model(fake, kind):
    made, layout = make(kind)
    made.model.bfloat16()
    assert_step_stays(fake, made, layout)


@pytest.mark.parametrize("thought", ["token", "soft", "gumbel", "dirichlet", "hidden", "hybrid"])
def test_the_step_of_a_thought(fake, thought):
    latent = thought in ("hidden", "hybrid")
    made, layout = make("llama", replace(LATENT if latent else EXPLICIT, thought=thought))
    if latent:
        add_projector(made.model, gated=thought == "hybrid")
    made.model.bfloat16()
    assert_step_stays(fake, made, layout)


@pytest.mark.parametrize(
    "decoding", [Decoding(top_k=5, top_p=0.9, min_p=0.01, cold_stop_entropy=0.1), Decoding(top_k=5, order="paper")]
)
def test_the_step_of_a_decoding(fake, decoding):
    assert_step_stays(fake, *make("llama", EXPLICIT), decoding=decoding)


def test_the_step_with_an_adapter_and_without_noise(fake):
    made, layout = make("qwen2", replace(LATENT, thought_k=0))
    made.model.set_attn_implementation("float64")
    made.model = with_adapter(made.model.bfloat16()).eval()
    assert_step_stays(fake, made, layout, seeds=False)


def test_a_look_is_found(fake, monkeypatch):
    """The test of the tests."""
    inner = Walk.sample

    def sample(self, live, logits, hidden):
        inner(self, live, logits, hidden)
        if hasattr(self, "entered"):
            bool(live.is_thought.any())
        self.entered = True

    monkeypatch.setattr(Walk, "sample", sample)
    with pytest.raises(DataDependentOutputException):
        assert_step_stays(fake, *make())


class Memory(TorchDispatchMode):
    """The most bytes of a GPU that tensors made in this mode held at once."""

    def __init__(self):
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_cuda and (storage := x.untyped_storage())._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.held.values()))
        return out


@pytest.mark.parametrize("thought", ["token", "gumbel", "dirichlet"])
def test_a_draw_holds_five_float32_copies_of_the_logits(fake, thought):
    """As `estimate` counts them, beside the logits: at 512 rows and V = 151,936, 1.4 GiB."""
    m, V = 512, 151936
    _, layout = make("llama", replace(EXPLICIT, thought=thought, thought_k=5))
    with fake, torch.no_grad():
        device = torch.device("cuda:0")
        noise.index_hashes(V, device)
        walk = Walk(layout, V, m, torch.zeros(m, dtype=torch.int64, device=device), [2], device)
        live, logits = walk.places(m, None, None), torch.empty(m, V, dtype=torch.bfloat16, device=device)
        with Memory() as memory:
            walk.sample(live, logits, None)
    assert 4.9 < memory.most / (m * V * 4) < 5.1


# ---------------------------------------------------------------------------------------------------------------------
# The training passes


class Whole(TorchFunctionMode):
    """Positions picked by a mask are all positions: how many there are is in the data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        masked = [x for x in args[1:2] if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if masked and func is torch.Tensor.__getitem__:
            assert args[0].device == args[1].device
            return args[0].flatten(0, args[1].dim() - 1)
        if masked and func is torch.Tensor.masked_scatter:
            assert len({x.device for x in args}) == 1
            return args[2].reshape(args[0].shape)
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast(on: bool):
    """torch.autocast refuses a GPU that is not there."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", on)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


RATIOS = ("joint", "factored", "top1", "conditional", "pathwise")
PASSES = [
    *({"ratio": ratio} for ratio in RATIOS),
    {"thought": "hybrid"},
    {"thought": "dirichlet"},
    {"reference": True},
    {"reference": True, "adapter": True, "value": True},
    {"adapter": True, "checkpointing": True},
    {"states_only": True},
]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize(("dtype", "amp"), PRECISIONS)
@pytest.mark.parametrize("case", PASSES, ids=lambda case: " ".join(map(str, case.values())))
def test_the_scored_forward(fake, monkeypatch, case, dtype, amp):
    thinking = replace(LATENT, thought=case.get("thought", "gumbel"))
    made = tiny_policy()
    model = base = made.model.to(getattr(torch, dtype))
    add_soft_forward(base)
    if thinking.thought == "hybrid":
        add_projector(base, gated=True)
    if "adapter" in case:
        model = with_adapter(base)
        # The frozen head's Jacobian is formed at once, by autograd.
        monkeypatch.setattr(torch.autograd, "grad", lambda _, xs, **kwargs: [torch.zeros_like(x) for x in xs])
    if "value" in case:
        add_value_head(base)
    if "checkpointing" in case:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    B, P, C, K, H = 3, 7, 12, 3, base.config.hidden_size
    with fake, autocast(amp), torch.device("cuda"):
        onto_cuda(model)
        on = torch.ones(B, C, dtype=torch.bool)
        soft = SoftInputs(
            prompt_ids=torch.ones(B, P, dtype=torch.int64),
            support=torch.ones(B, C, K, dtype=torch.int64),
            log_weights=torch.zeros(B, C, K),
            action_mask=on,
            thought_mask=on,
            thinking=thinking,
            ratio=case.get("ratio", "joint"),
            seeds=torch.zeros(B, dtype=torch.int64),
            support_log_probs=torch.zeros(B, C, K),
            entropy_grad=True,
            states_only="states_only" in case,
            ref_states=torch.zeros(B, C, H, dtype=base.dtype) if "reference" in case else None,
            ref_head=base.get_output_embeddings(),
        )
        mask = torch.ones(B, P + C, dtype=torch.int64)
    with fake, autocast(amp), Whole():
        out = model(attention_mask=mask, soft=soft)
    if "states_only" in case:
        assert out.states.is_cuda and out.states.dtype == base.dtype
        return
    assert (out.kl is not None) == ("reference" in case) and (out.value_preds is not None) == ("value" in case)
    for x in out.values():
        assert x.is_cuda and x.dtype == torch.float32 and x.shape == (B, C)


@pytest.mark.parametrize(("dtype", "amp"), PRECISIONS)
@pytest.mark.parametrize("thought", ["gumbel", "hybrid"])
def test_the_loss_of_codi(fake, tmp_path, thought, dtype, amp):
    made = tiny_policy()
    made.model.to(getattr(torch, dtype))
    trainer = codi_trainer(tmp_path, made=made, thought=thought)
    batch = batch_of(trainer, 4)
    with fake, autocast(amp):
        onto_cuda(trainer.model)
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in batch.items()}
        loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.is_cuda and loss.dtype == torch.float32
