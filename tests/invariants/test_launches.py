"""How many kernels a decode step of a 1.5B model launches, counted on GPU tensors that have no data.

A launch costs about 2 microseconds, also within a CUDA graph, and most kernels of a step take no longer. The bounds
below are what the step may not pass; docs/gpu.md says what they mean.

pytest tests/invariants/test_launches.py -rP
"""

from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engine import EXPLICIT, make
from test_fake_cuda import fake, onto_cuda  # noqa: F401  (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from rl_soft.model.head_product import float32_logits
from rl_soft.rollouts.engine import Engine
from rl_soft.rollouts.kernels import few_launches as few
from rl_soft.rollouts.kernels import gpu_rules, gpu_sampling
from rl_soft.thoughts.layout import Layout

ROWS, K = 64, 8
TOTAL, OF_BOOKKEEPING, WITH_ADAPTER = 429, 12, 1829  # before: 1,391, 202 and 2,567
QWEN = {  # Qwen2.5-1.5B
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
FREE = {
    "device",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
}
SEVERAL = {"logsumexp": 6, "linalg_vecdot": 2, "topk": 4, "sort": 4, "nonzero": 4}  # of kernels, in one operation


class Launches(TorchDispatchMode):
    """Kernels by the part of a step that launches them, and by operation."""

    def __init__(self):
        super().__init__()
        self.part, self.parts, self.operations = "model", Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        on_gpu = any(x.is_cuda for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor))
        if on_gpu and not func.is_view and name not in FREE:
            copies = name == "addmm" and args[0].dim() == 2  # of what the product is added to
            self.add(name, 1 + copies if copies else SEVERAL.get(name, 1))
        return out

    def add(self, name, count=1):
        self.parts[self.part] += count
        self.operations[self.part, name] += count

    @contextmanager
    def within(self, part):
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


class Stub:
    """A Triton kernel that counts its launches and computes nothing."""

    def __init__(self, launches, name):
        self.launches, self.name = launches, name

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.add(self.name)


def model_of(dtype=torch.bfloat16):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN), dtype=dtype).eval()
    return model.requires_grad_(False)


@pytest.fixture
def counted(fake, monkeypatch):  # noqa: F811
    """Counts of a step by its parts."""

    def count(adapter=False, slots=K):
        launches = Launches()

        def within(owner, name, part):
            inner = getattr(owner, name)

            def wrapped(*args, **kwargs):
                with launches.within(part):
                    return inner(*args, **kwargs)

            monkeypatch.setattr(owner, name, wrapped)

        def attention(query, key, value, *args, **kwargs):
            launches.add("attention")
            return query.new_empty(*query.shape[:-1], value.shape[-1])

        def norm(x, shape, weight, eps):  # one kernel, which a torch without CUDA has not
            launches.add("rms_norm")
            return torch.empty_like(x)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        monkeypatch.setattr(torch.nn.functional, "rms_norm", norm)
        monkeypatch.setattr(gpu_sampling, "usable", lambda x: x.is_cuda)
        monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
        stand_in = SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length())
        monkeypatch.setattr(gpu_rules, "_agrees", lambda *args: True)
        monkeypatch.setattr(gpu_rules, "_judged", {})
        for module in (gpu_sampling, gpu_rules):
            monkeypatch.setattr(module, "triton", stand_in)
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Stub(launches, name))
        _, layout = make("llama", replace(EXPLICIT, thought_k=slots, num_thoughts=64))
        model = model_of()
        if adapter:
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        prompts = [[5, 6, 7]] * ROWS
        monkeypatch.setattr(few, "free_memory", lambda device: None)
        monkeypatch.setattr(few.FewLaunches, "judge", lambda self, *args: setattr(self, "agreed", True))
        with fake, torch.no_grad(), ExitStack() as stack:
            onto_cuda(model)
            stack.enter_context(few.few_launches(model))
            stack.enter_context(float32_logits(model))
            engine = Engine(model, Layout(layout.thinking, layout.tokenizer), prompts, torch.arange(ROWS), [2], 10**6)
            engine.replay.on = False
            engine.enter()
            engine.step()
            within(engine, "next_input", "mixing")
            within(engine.cache, "whole_mask", "masks")
            within(engine.walk, "sample", "state machine")
            within(gpu_sampling, "draw", "sampling")
            within(gpu_sampling, "log_outside", "sampling")
            launches.parts.clear()
            launches.operations.clear()
            with launches:
                engine.step()
        return launches

    return count


BOOKKEEPING = ("mixing", "masks", "state machine")


def shown(launches):
    lines = [f"{launches.parts.total()} launches: {dict(launches.parts)}"]
    lines += [f"  {part}: {n} {name}" for (part, name), n in launches.operations.most_common()]
    return "\n".join(lines)


def test_a_step(counted):
    launches = counted()
    assert launches.parts.total() <= TOTAL, shown(launches)
    assert sum(launches.parts[part] for part in BOOKKEEPING) <= OF_BOOKKEEPING, shown(launches)


def test_the_number_of_slots_changes_nothing(counted):
    few, many = (counted(slots=k).parts for k in (2, 32))
    assert few == many


def test_a_step_with_an_adapter(counted):
    """In bfloat16 an adapter stays beside its weights: six launches for each of seven products per layer."""
    launches = counted(adapter=True)
    assert launches.parts.total() <= WITH_ADAPTER, shown(launches)
