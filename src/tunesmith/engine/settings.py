"""What a run file says about the loop."""

from typing import Literal

from pydantic import Field

from tunesmith.settings import Settings


class TrainSettings(Settings):
    """How long, how fast, with which optimiser."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data; ignored where max_steps is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=4, ge=1)
    """Rows a device takes at once (the micro-batch)."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches an optimiser step sums up; the effective batch is batch_size x
    accumulation_steps x processes."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate, of all methods alike; the method's own default where none is given, and
    of several methods each its own."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up (wsd: warm-up, stable, decay)."""
    warmup: int | float = Field(default=0.03, ge=0)
    """Steps (or a fraction below 1 of all steps) over which the learning rate rises from 0."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd only: share of all steps in the final decay."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the decay ends, as a share of the peak."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW (fused where there is a fused one), or bitsandbytes' AdamW with 8-bit state."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices (vectors such as norms and biases are left alone, and so
    are a method's gates and factors)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this; none leaves it."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without improvement of evaluation.best."""


class EvaluationSettings(Settings):
    """When and what to measure."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps; none evaluates only before and after training."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once in evaluation."""
    metrics: list[Literal["accuracy", "exact_match", "bleu", "rouge_l"]] = Field(
        default_factory=list
    )
    """Beside the loss: accuracy scores `choices`; the others generate, and compare the reply."""
    choices: list[str] = Field(default_factory=list)
    """For accuracy: the replies to choose among by their likelihood."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate on only so many rows (prompts, for metrics that generate)."""
    samples: int = Field(default=3, ge=0)
    """Replies generated for the report, before and after."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated reply."""
    rows: Literal["all", "even", "odd"] = "all"
    """Which of the evaluation rows (and prompts); a comparison chooses learning rates by the even
    ones and reports the odd ones."""
    general: str | None = None
    """A text file whose loss is measured before and after, or `bundled` for one that comes along:
    how much of general language a run forgets. Language models only."""
    inference: bool = False
    """Measure how much longer a forward pass takes with the method than without."""
    best: str = "loss"
    """The metric that decides the best checkpoint and early stopping."""


class CheckpointSettings(Settings):
    """What is kept on disk while training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps; none saves at interruption and at the end only."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep; the best one is kept besides."""


class EngineSettings(Settings):
    """How the step is computed."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What matrix products compute in; auto is the model's dtype, or bfloat16 under autocast where
    base weights train in float32 and the hardware does bfloat16 well."""
    speed: Literal["auto", "compiled", "safe"] = "auto"
    """Compile every block of the model as one graph (compiled), or run blocks, loss and attention
    by the plain code that serves every case (safe); auto compiles on CUDA. A block that is no
    single graph runs as it is, with a warning that says why; so do all under fsdp."""
    checkpointing: Literal["auto", "none", "selective", "attention", "full", "offload"] = "auto"
    """What the backward pass computes again instead of having it kept: nothing (none), all but
    matrix products and attention (selective), all but attention (attention), whole blocks (full),
    whole blocks whose inputs wait in the host's memory (offload). auto begins with the least that
    is planned to fit, and goes on where memory runs out."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes the first accelerator there is."""
    distribution: Literal["auto", "ddp", "fsdp"] = "auto"
    """Several processes: replicate (ddp) or shard weights, gradients and optimiser (fsdp, FSDP2);
    auto is ddp. One process ignores it."""
    padding: Literal["auto", "free", "right"] = "auto"
    """Batches without padding (segments side by side) where the model's attention allows it, or
    padded on the right."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "varlen", "math"] = "auto"
    """On CUDA, the kernel that padding-free batches take whose segments are of one length; auto
    measures which is fastest for the device and shape and remembers it. Other batches take the
    one for segments of any length (varlen)."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads PyTorch may use; none leaves its default."""


class TrackingSettings(Settings):
    """Where else the events go."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list
    )
    """Trackers to log to, through accelerate; `pip install tunesmith[trackers]`."""
    project: str = "tunesmith"
    """Project (experiment) name in the tracker."""
    log_every: int = Field(default=1, ge=1)
    """Steps between two lines of metrics.jsonl and of the console."""
