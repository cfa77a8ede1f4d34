"""One supervised fine-tuning job on random weights, by the code that `tunesmith train` runs."""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.data.collate import Collator
from tunesmith.data.packing import WINDOW, pack
from tunesmith.data.prepare import PreparedData
from tunesmith.data.rows import TokenRow, join
from tunesmith.engine.distribution import Peers, connect
from tunesmith.engine.events import CheckpointingChosen, Event, MicroBatchHalved, StepDone, Warned
from tunesmith.jobs.assemble import (
    Assembled,
    Program,
    attach_seeded,
    choose_dtypes,
    choose_padding,
)
from tunesmith.jobs.train import fit_run, task_of
from tunesmith.models.quantize import quantise, require_quantiser
from tunesmith.spec import Run, validate

WARMUP = 3
"""Steps before the timed ones: compiling, and the first lengths."""
PROFILED = 2
"""Steps that a profile covers."""
ALPACA = Path(__file__).with_name("alpaca_lengths.json")
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""Llama 3.1 8B, Llama 3.2 1B, and one for a CPU."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 16, "alpha": 16},
    "dora": {"name": "lora", "rank": 16, "alpha": 16, "dora": True},
    "ia3": {"name": "ia3"},
    "prefix": {"name": "prefix_tuning", "length": 20, "init": "random"},
    "adapter": {"name": "adapter", "placement": "houlsby"},
    "full": {"name": "full", "keep_base": False},
    "full-bf16": {"name": "full", "keep_base": False, "weights": "model"},
}


@dataclass(frozen=True)
class Job:
    """What is measured."""

    shape: str = "8b"
    method: str = "lora"
    quantize: str = "none"
    products: str = "dtype"
    checkpointing: str = "none"
    tokens: str = "4x2048"
    """Rows at once x tokens a row."""
    data: str = "full"
    """full: every position supervised, rows full; alpaca: lengths of real rows, packed."""
    speed: str | None = None
    attention: str | None = None
    dtype: str = "auto"
    optimizer: str = "adamw"
    steps: int = 8
    device: str = "cuda"
    limit: float | None = None
    """GiB that PyTorch may take; what it needs beyond that is out of memory."""

    @property
    def rows(self) -> int:
        """Rows at once."""
        return int(self.tokens.split("x")[0])

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.tokens.split("x")[1])

    def run(self) -> Run:
        """Return the job as a run file says it.

        Raises:
            SpecError: a setting that this version does not know.
        """
        asked = {"speed": self.speed, "attention": self.attention}
        engine = {"device": self.device, "checkpointing": self.checkpointing}
        return validate(
            {
                "name": "bench",
                "model": {"name": "random", "dtype": self.dtype}
                | {"quantize": self.quantize, "products": self.products},
                "method": METHODS[self.method],
                "data": {
                    "train": [{"path": "random"}],
                    "max_length": self.length,
                    "packing": self.data == "alpaca",
                },
                "engine": engine | {key: value for key, value in asked.items() if value},
                "train": {
                    "batch_size": self.rows,
                    "max_steps": 1_000_000,  # the clock stops before, so nothing is saved
                    "learning_rate": 1e-5,
                    "schedule": "constant",
                    "warmup": 0,
                    "optimizer": self.optimizer,
                },
            },
            source="bench",
            lines={},
        ).resolved()


class Rows:
    """An endless stream of random tokens."""

    rows_per_epoch = None
    epoch = 0.0

    def __init__(self, job: Job, vocab: int) -> None:
        self._random = np.random.default_rng(0)
        self._vocab = vocab
        self._bins = _packed(job.length) if job.data == "alpaca" else [[(0, job.length)]]
        self._next = 0

    def take(self, count: int) -> list[TokenRow]:
        """Return the next `count` rows."""
        rows = []
        for _ in range(count):
            samples = self._bins[self._next % len(self._bins)]
            rows.append(join([self._sample(*sample) for sample in samples]))
            self._next += 1
        return rows

    def _sample(self, prompt: int, reply: int) -> TokenRow:
        ids = self._random.integers(3, self._vocab, prompt + reply, dtype=np.int32)
        return TokenRow(ids, np.arange(prompt + reply) >= prompt, (prompt + reply,))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a measurement is not resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore `state`."""


def _packed(length: int) -> list[list[tuple[int, int]]]:
    """Return rows of real (prompt, reply) lengths, each of at most `length` tokens."""
    pairs = [
        (min(prompt, length - 1), min(reply, length - min(prompt, length - 1)))
        for prompt, reply in json.loads(ALPACA.read_text(encoding="utf-8"))["lengths"]
    ]
    bins = []
    for start in range(0, len(pairs), WINDOW):
        window = pairs[start : start + WINDOW]
        bins += [[window[i] for i in row] for row in pack([sum(x) for x in window], length)]
    return bins[:-1]  # the last is not full


class Enough(Exception):  # noqa: N818 - no error
    """The steps that were asked for are done."""


class Clock:
    """Hears of every step, and ends the run after the last one."""

    def __init__(self, steps: int, device: torch.device, profile: Path | None = None) -> None:
        self.begun = self.built = time.perf_counter()
        self.ends: list[float] = []
        self.done: list[StepDone] = []
        self.said: list[str] = []
        self.first_after = 0.0
        """Seconds of this process at the end of the first step."""
        self.steps, self._device, self._target = steps, device, profile
        self._profiler: Any = None

    def __call__(self, event: Event) -> None:
        """Take the time of a step.

        Raises:
            Enough: it was the last.
        """
        if isinstance(event, CheckpointingChosen | MicroBatchHalved | Warned):
            self.said.append(event.message)
        if not isinstance(event, StepDone):
            return
        # The event is there when the device has done with the step, so nothing needs to wait.
        self.ends.append(time.perf_counter())
        self.done.append(event)
        if len(self.ends) == 1:
            self.first_after = time.time() - psutil.Process().create_time()
        if len(self.ends) == WARMUP and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if len(self.ends) == WARMUP + self.steps:
            self._profile_or_stop()
        elif len(self.ends) == WARMUP + self.steps + PROFILED:
            self._stop_profile()

    def _profile_or_stop(self) -> None:
        if self._target is None:
            raise Enough
        # More steps, which are not timed; one may be on its way already.
        self._wait()
        self._profiler = torch.profiler.profile()
        self._profiler.start()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _stop_profile(self) -> None:
        self._wait()
        self._profiler.stop()
        kind = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=kind, row_limit=40)
        self._target.write_text(f"{table}{_idle(self._profiler.events())}", encoding="utf-8")
        raise Enough


def _idle(events: Iterable[FunctionEvent]) -> str:
    """Return a line on how long the GPU had nothing to do between its first kernel and its last."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
    )
    if not spans:
        return ""
    reached, idle = spans[0][0], 0.0
    for start, end in spans:
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return f"CUDA idle: {idle / 1e3:.3f}ms of {(reached - spans[0][0]) / 1e3:.3f}ms\n"


def measure(job: Job, *, profile: Path | None = None) -> dict[str, Any]:
    """Run `job` and return what was measured; the model is gone afterwards.

    Args:
        job: what to run.
        profile: where to write the kernels of one more step and their times.
    """
    torch.compiler.reset()
    run = job.run()
    peers = connect(run.engine)
    clock = Clock(job.steps, peers.device, profile)
    with TemporaryDirectory() as folder, memory_limit(job.limit):
        assembled = assemble_random(run, job, peers)
        clock.built = time.perf_counter()
        trainable = sum(p.numel() for p in assembled.tuned.trainable().values())
        with contextlib.suppress(Enough):
            fit_run(run, task_of(assembled), run_dir=Path(folder), listeners=[clock], peers=peers)
    del assembled
    gc.collect()
    if peers.device.type == "cuda":
        torch.cuda.empty_cache()
    return asdict(job) | {"trainable": trainable} | _result(clock)


@contextlib.contextmanager
def memory_limit(gib: float | None) -> Iterator[None]:
    """Let PyTorch take no more than `gib` of the device inside a `with` block."""
    if gib is None:
        yield
        return
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def assemble_random(run: Run, job: Job, peers: Peers) -> Assembled:
    """Return `run` as `assemble` would, with random weights and rows instead of files."""
    require_quantiser(run.model, peers.device)
    dtypes = choose_dtypes(run, peers.device)
    model = random_llama(job.shape, peers.device, dtypes.weights)
    if run.model.quantize != "none":
        quantise(model, run.model, device=peers.device)
    padding = choose_padding(run, model)
    tuned = attach_seeded(model, run)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    return Assembled(
        run=run,
        tuned=tuned,
        program=Program(model, run.objective),
        tokenizer=None,  # type: ignore[arg-type]  # there is no text
        facts=None,  # type: ignore[arg-type]
        data=PreparedData(Rows(job, model.config.vocab_size), None),  # type: ignore[arg-type]
        collate=Collator(0, padding),
        autocast_dtype=dtypes.autocast(mixed=mixed),
    )


def llama_config(shape: str) -> LlamaConfig:
    """Return the configuration of a Llama of this shape."""
    return LlamaConfig(
        **{
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        }
        | SHAPES[shape]
    )


def random_llama(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a Llama of this shape with random weights, made on `device`, in eval mode."""
    config = llama_config(shape)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _result(clock: Clock) -> dict[str, Any]:
    timed = clock.done[WARMUP : WARMUP + clock.steps]
    ends = clock.ends[WARMUP - 1 : WARMUP + clock.steps]
    seconds = [after - before for before, after in pairwise(ends)]
    step = statistics.median(seconds)
    rate = {
        kind: statistics.median(
            getattr(event, kind) / time for event, time in zip(timed, seconds, strict=True)
        )
        for kind in ("tokens", "supervised_tokens")
    }
    first = clock.ends[0] - clock.begun
    return {
        "tokens_per_second": round(rate["tokens"], 1),
        "supervised_tokens_per_second": round(rate["supervised_tokens"], 1),
        "step_seconds": round(step, 4),
        "steps_seconds": [round(x, 4) for x in seconds],
        "peak_gib": round(timed[-1].memory_bytes / 2**30, 2),
        "first_step_seconds": round(first, 2),
        "start_seconds": round(clock.first_after, 2),
        "compile_seconds": round(clock.ends[0] - clock.built - step, 2),
        "loss_first": clock.done[0].loss,
        "loss_last": clock.done[-1].loss,
        "said": clock.said,
    }
