"""A merged folder is a plain model to vLLM: what it writes greedily is what transformers writes."""

from __future__ import annotations

import peft
import torch
from soft_models import build
from transformers import AutoModelForCausalLM

from rl_soft.model.export import export


def test_vllm_loads_a_merged_folder(tmp_path, engines):
    from vllm import LLM, SamplingParams

    made, folder = build("llama", tmp_path / "model")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
    model.save_pretrained(tmp_path / "adapter")
    made.tokenizer.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "merged")
    ids = made.tokenizer.encode("12+34=", add_special_tokens=False)
    expected = model.eval().generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    llm = LLM(str(tmp_path / "merged"), dtype="float32", enforce_eager=True, max_model_len=96, max_num_seqs=4)
    (out,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert list(out.outputs[0].token_ids) == expected.tolist()
