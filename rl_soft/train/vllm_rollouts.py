"""Rollouts of a trainer by vLLM: in this process (`vllm_mode: colocate`) or by a server (`rl-soft serve`).

TRL's `VLLMGeneration` keeps its settings, its processes and the way in which weights are collected (DDP, ZeRO-3, FSDP,
merged adapters). Here: how the engine is made, that each row is asked for with its own seed, and what comes back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import ensure_master_addr_port

from rl_soft.model.side_modules import language_model
from rl_soft.model.value_head import VALUE_HEAD
from rl_soft.rollouts.recording import Rollout
from rl_soft.rollouts.vllm import engine
from rl_soft.rollouts.vllm.options import check_length, check_vllm, engine_options, limits_for
from rl_soft.rollouts.vllm.request import Recorded
from rl_soft.thoughts.kinds import RATIOS
from rl_soft.thoughts.layout import Layout
from rl_soft.train.runtime.processes import uses_fsdp

TOKENS = 4096  # of a step; vLLM's profile of memory grows with it


def check(args: Any, ratio: str) -> None:
    """Before anything is made.

    Raises:
        ValueError: no vLLM that fits; FSDP; a ratio that TRL's correction cannot score; a server without NCCL.
    """
    if uses_fsdp():
        raise ValueError(
            "use_vllm under FSDP2 is not available: weights are pushed from whole models; use --zero 0 to 3"
        )
    check_vllm()
    if RATIOS[ratio].second_factor and args.vllm_importance_sampling_correction:
        raise ValueError(
            f"vllm_importance_sampling_correction: ratio {ratio} has two factors, and TRL corrects one; set it false, "
            "or use ratio joint or top1"
        )
    if args.vllm_mode == "server" and args.device.type != "cuda":
        raise ValueError("vllm_mode server: weights go to a server by NCCL, which needs a GPU; use vllm_mode colocate")


class SoftVLLM(VLLMGeneration):
    """TRL's, for soft rows.

    Args:
        trainer: a GRPO trainer of ours, whose settings it reads.
    """

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        self.layout: Layout = trainer.layout
        self.eos_ids: list[int] = list(trainer.eos_token_ids)
        self.folder = Path(args.output_dir) / "vllm"
        self.bf16 = trainer.accelerator.mixed_precision == "bf16"
        super().__init__(
            trainer.model,
            trainer.accelerator,
            trainer.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
        )

    # -- the engine ---------------------------------------------------------------------------------------------------

    def _init_vllm(self) -> None:
        if self.mode == "server":
            super()._init_vllm()
            if self.accelerator.is_main_process:
                from rl_soft.rollouts.vllm.server import Server

                self.server = Server(self.vllm_client.base_url)
                self.server.check(self.layout)
            return
        accelerator, size = self.accelerator, self.tensor_parallel_size
        if accelerator.num_processes % size:
            raise ValueError(
                f"vllm_tensor_parallel_size {size} must divide the {accelerator.num_processes} processes of the run"
            )
        if accelerator.is_main_process:
            self._write_folder()
        accelerator.wait_for_everyone()
        if size > 1:
            ranks = [list(range(i, i + size)) for i in range(0, accelerator.num_processes, size)]
            self.tp_group, _ = torch.distributed.new_subgroups_by_enumeration(ranks)
        os.environ |= {
            "RANK": str(accelerator.process_index),
            "LOCAL_RANK": str(accelerator.local_process_index),
            "WORLD_SIZE": str(accelerator.num_processes),
        }
        ensure_master_addr_port()
        from vllm import LLM

        from rl_soft.rollouts.vllm.models import leave_alone

        on_cpu = accelerator.device.type == "cpu"
        vocab_size = self.model.config.get_text_config().vocab_size
        options = engine_options(str(self.folder), *limits_for(self.layout.thinking, vocab_size))
        if self.max_model_length is not None:
            options["max_model_len"] = self.max_model_length
        if not on_cpu:
            options["gpu_memory_utilization"] = self.gpu_memory_utilization
        self.llm = LLM(
            model=str(self.folder),
            load_format="dummy",  # the weights are pushed before the first rollout
            dtype="bfloat16" if self.bf16 else str(next(self.model.parameters()).dtype).removeprefix("torch."),
            tensor_parallel_size=size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=TOKENS,
            enable_sleep_mode=self.enable_sleep_mode,
            enforce_eager=on_cpu,
            distributed_executor_backend="external_launcher",
            seed=accelerator.process_index // size,
            **options,
        )
        leave_alone(self.model)
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
        self._llm_weights_sleeping = self.enable_sleep_mode
        accelerator.wait_for_everyone()

    def _write_folder(self) -> None:
        """What vLLM makes the model of: its configuration, as it is now, and its tokenizer; no weights.

        The policy may have more ids than the checkpoint that it came from, or an adapter, or no checkpoint at all.
        """
        model = language_model(self.model)
        config = type(model.config).from_dict(model.config.to_dict())
        config.architectures = [type(model).__name__]
        config.save_pretrained(self.folder)
        self.processing_class.save_pretrained(self.folder)

    # -- weights ------------------------------------------------------------------------------------------------------

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """TRL's, without what vLLM does not have; rows that an adapter trains are merged into their matrix."""
        for name, value in super()._iter_named_params():
            if f"{VALUE_HEAD}." in name or "token_adapter.trainable_tokens" in name:
                continue
            yield name.replace(".token_adapter", ""), value

    def sync_weights(self) -> None:
        if self.mode == "colocate" and self.accelerator.device.type == "cpu":
            from rl_soft.rollouts.vllm.models import tie_again

            # A CPU has its weights packed, and packs them again; some at the end, when adapters are apart again.
            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.reload_weights(weights_iterator=((name, x.clone()) for name, x in self._iter_named_params()))
            tie_again(runner.model)
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()

    # -- rollouts -----------------------------------------------------------------------------------------------------

    def rollout(self, prompt_ids: list[list[int]], seeds: Tensor) -> Rollout:
        """One completion for each prompt of this process, as `rollouts.engine.rollout` makes it.

        Args:
            seeds: (B,) int64.

        Raises:
            ValueError: a context that is too short.
        """
        asked = [(ids, seed) for ids, seed in zip(prompt_ids, seeds.tolist(), strict=True)]
        ask = self._ask_server if self.mode == "server" else self._ask_engine
        vocab_size = self.model.config.get_text_config().vocab_size
        rows = ask(asked, vocab_size)
        return engine.assemble(self.layout, vocab_size, prompt_ids, seeds, self.eos_ids, rows, self.accelerator.device)

    def _ask_engine(self, asked: list[tuple[list[int], int]], vocab_size: int) -> list[list[Recorded]]:
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:  # a sleep of level 2 forgets them
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        size, first, every = self.tensor_parallel_size, 0, asked
        if size > 1:
            gathered: list[Any] = [None] * size
            torch.distributed.all_gather_object(gathered, asked, group=self.tp_group)
            every = [row for part in gathered for row in part]
            first = torch.distributed.get_rank(group=self.tp_group) * len(asked)
        longest = max(len(ids) for ids, _ in every)
        check_length(self.llm.llm_engine.model_config.max_model_len, longest, self.layout.max_completion_length)
        params = [engine.sampling_params(self.layout, vocab_size, self.eos_ids, None, seed) for _, seed in every]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids, _ in every], params, use_tqdm=False)
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True
        own = outputs[first : first + len(asked)]
        return [list(engine.positions_of(output.outputs[0].logprobs, vocab_size)) for output in own]

    def _ask_server(self, asked: list[tuple[list[int], int]], vocab_size: int) -> list[list[Recorded]]:
        """The main process asks for all."""
        every, answer = gather_object(asked), list[Any]([None])
        if self.accelerator.is_main_process:
            answer = [self.server.positions(self.layout, every, self.eos_ids, None)]
        broadcast_object_list(answer, from_process=0)
        rows: Any = answer[0]
        first = self.accelerator.process_index * len(asked)
        return rows[first : first + len(asked)]
