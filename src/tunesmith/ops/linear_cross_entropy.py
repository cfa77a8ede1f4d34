"""Log-probabilities of given tokens straight from hidden states and the head's weight.

The logits of all positions, (tokens, vocab), never exist whole: only supervised positions reach the
head, chunk by chunk, and a chunk's logits are overwritten by their own gradient. The idea is that
of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989, sec. 3.2) and Cut Cross-Entropy (Wijmans et al.
2024, arXiv:2411.09009), in plain PyTorch, so that it runs on every device.

Throughout, for logits z = h W^T + b and a label y: log p = z_y - log sum exp z.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.ops.chunked_head import (
    Gradients,
    Head,
    Softmax,
    blocks,
    chunks,
    compute_dtype,
    device_type,
    exact_dtype,
)
from tunesmith.ops.loss_by_logits import fused_loss_by_logits, is_plain
from tunesmith.types import IGNORE


class LossAndCorrect(NamedTuple):
    """A summed loss, and how often the label had the largest logit."""

    total: Tensor
    """() float32 (float64 for float64 inputs), differentiable."""
    correct: Tensor
    """() int64."""


class LogProbsAndCorrect(NamedTuple):
    """Log-probabilities, and how often the label had the largest logit."""

    log_probs: Tensor
    """(tokens,) float32 (float64 for float64 inputs), differentiable; 0 where IGNORE."""
    correct: Tensor
    """() int64."""


class LogProbsAndEntropy(NamedTuple):
    """Per position, both differentiable and 0 where the label is IGNORE."""

    log_probs: Tensor
    """(tokens,) float32 (float64 for float64 inputs): log p(label), in nats."""
    entropy: Tensor
    """(tokens,) as `log_probs`: -sum p log p over the vocabulary, in nats."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    z_loss: float | None = None,
    all_supervised: bool = False,
) -> Tensor:
    """Return the sum of -log p(label) over the positions whose label is not IGNORE.

    The gradients are computed in the forward pass, while a chunk's logits are there, so backward
    only scales them; the weight's only if the weight trains. Products run in the inputs' dtype (the
    autocast dtype where autocast is on), softmax and sums in float32.

    Args:
        hidden: (tokens, width) float, the states that the head sees.
        weight: (vocab, width) float, the output embedding.
        labels: (tokens,) int64, already shifted: the token that `hidden[t]` predicts, or IGNORE.
        bias: (vocab,) of the output embedding.
        chunk_size: positions a chunk; by default as many as keep its logits near 64 MiB on a CPU
            and 512 MiB elsewhere.
        softcap: c of c tanh(z / c) on the logits (Gemma 2, arXiv:2408.00118, sec. 2).
        z_loss: zeta of the term zeta (log sum exp z)^2 that is added for each position and keeps
            the logits from drifting (PaLM, arXiv:2204.02311, sec. 5).
        all_supervised: that no label is IGNORE, so that nobody looks: on a GPU that would wait.

    Returns:
        () float32 (float64 for float64 inputs), in nats; 0 without supervised positions.
    """
    options = _Options(softcap, chunk_size, z_loss=z_loss, all_supervised=all_supervised)
    return _summed_loss(hidden, Head(weight, bias), labels, options=options).total


def linear_cross_entropy_and_correct(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    z_loss: float | None = None,
    all_supervised: bool = False,
) -> LossAndCorrect:
    """Return what `linear_cross_entropy` does and how many labels have the largest logit."""
    options = _Options(softcap, chunk_size, True, z_loss=z_loss, all_supervised=all_supervised)
    return _summed_loss(hidden, Head(weight, bias), labels, options=options)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return log p(label) per position, (tokens,) float32, 0 where the label is IGNORE.

    Differentiable; backward computes each chunk's logits anew, because the gradient of each
    position is known only then. Arguments as for `linear_cross_entropy`.
    """
    options = _Options(softcap, chunk_size)
    return _per_token(hidden, Head(weight, bias), labels, options=options).log_probs


def token_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> LogProbsAndEntropy:
    """Return what `token_log_probs` does and the entropy of each position's distribution."""
    options = _Options(softcap, chunk_size, with_entropy=True)
    found = _per_token(hidden, Head(weight, bias), labels, options=options)
    return LogProbsAndEntropy(found.log_probs, found.entropy)


def token_log_probs_and_correct(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> LogProbsAndCorrect:
    """Return what `token_log_probs` does and how many labels have the largest logit."""
    options = _Options(softcap, chunk_size, count_correct=True)
    found = _per_token(hidden, Head(weight, bias), labels, options=options)
    return LogProbsAndCorrect(found.log_probs, found.correct)


class _PerPosition(NamedTuple):
    log_probs: Tensor
    entropy: Tensor
    correct: Tensor


class _Options(NamedTuple):
    softcap: float | None
    chunk_size: int | None
    count_correct: bool = False
    with_entropy: bool = False
    z_loss: float | None = None
    all_supervised: bool = False


def _summed_loss(
    hidden: Tensor, head: Head, labels: Tensor, *, options: _Options
) -> LossAndCorrect:
    if not options.all_supervised:
        supervised = (labels != IGNORE).nonzero().squeeze(-1)
        if len(supervised) < len(labels):
            hidden, labels = hidden[supervised], labels[supervised]
    dtype = compute_dtype(hidden, head.weight)
    graph = torch.is_grad_enabled()
    values = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, *head, labels, options, dtype, graph
    )
    return LossAndCorrect(*values)


def _per_token(hidden: Tensor, head: Head, labels: Tensor, *, options: _Options) -> _PerPosition:
    supervised = (labels != IGNORE).nonzero().squeeze(-1)
    dtype = compute_dtype(hidden, head.weight)
    chosen, targets = hidden[supervised], labels[supervised]
    log_probs, entropy, correct = _PerToken.apply(  # type: ignore[no-untyped-call]
        chosen, *head, targets, options, dtype
    )
    zeros = log_probs.new_zeros(len(labels))
    return _PerPosition(
        zeros.index_put((supervised,), log_probs),
        zeros.index_put((supervised,), entropy),
        correct,
    )


class _SummedLoss(torch.autograd.Function):
    """Sum of -log p and the z-loss. Its gradient by the logits is known in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        labels, options, dtype, graph = rest
        needed = [graph and needs for needs in ctx.needs_input_grad[:3]]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        head, hidden = Head(weight, bias).cast(dtype), hidden.detach().to(dtype)
        gradients = Gradients.start(hidden, head, needed)
        total, correct = hidden.new_zeros((), dtype=exact_dtype(dtype)), labels.new_zeros(())
        work = _Work(head.weight, labels, total, correct, options, any(needed))
        fused = device_type(hidden) == "cuda" and any(needed) and not is_plain()
        by_logits = work.whole if fused else work.in_blocks
        for chunk in chunks(len(labels), weight, options.chunk_size):
            logits = by_logits(chunk, F.linear(hidden[chunk], *head))
            gradients.add(chunk, logits, hidden, head.weight)
            del logits
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if g is None else _scaled(g, by_total, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient x factor, (), in `dtype`, without a copy in another.

    In float32 or more: rounding the factor would scale every gradient by the same error.
    """
    if gradient.dtype == factor.dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return (gradient.to(factor.dtype) * factor).to(dtype)


class _Work(NamedTuple):
    """What is done with each chunk's logits, (rows, vocab); both ways come to the same."""

    weight: Tensor
    labels: Tensor
    total: Tensor
    correct: Tensor
    options: _Options
    with_gradient: bool

    def whole(self, chunk: slice, logits: Tensor) -> Tensor:
        """Add to the sums and return the gradient by the logits: in one pass, for a GPU."""
        options = self.options
        done = fused_loss_by_logits(logits, self.labels[chunk], options.softcap, options.z_loss)
        self.total.add_(done.total)
        self.correct.add_(done.correct)
        return done.gradient

    def in_blocks(self, chunk: slice, logits: Tensor) -> Tensor:
        """Do so in blocks that a CPU's cache holds, and in the place of the logits."""
        options = self.options
        for rows, block in blocks(chunk, len(logits), self.weight):
            softmax = Softmax.of(logits[block], options.softcap)
            self.total.sub_(softmax.log_probs(self.labels[rows]).sum())
            if options.z_loss is not None:
                self.total.add_(options.z_loss * softmax.log_sum.square().sum())
            if options.count_correct:
                self.correct.add_((softmax.logits.argmax(-1) == self.labels[rows]).sum())
            if self.with_gradient:
                logits[block] = _loss_by_logits(softmax, self.labels[rows], options)
            del softmax  # or it would be there while the next one is made
        return logits


def _loss_by_logits(softmax: Softmax, labels: Tensor, options: _Options) -> Tensor:
    by_logits = softmax.p
    if options.z_loss is not None:
        by_logits = by_logits.mul_(1 + 2 * options.z_loss * softmax.log_sum)
    by_logits.scatter_add_(-1, labels[:, None], -torch.ones_like(softmax.log_sum))
    return softmax.uncapped(by_logits, options.softcap)


class _PerToken(torch.autograd.Function):
    """Log p(y) and entropy H of each row, and how many y have the largest logit.

    Given gradients g by log p(y) and e by H, the gradient by the logits is
    g (onehot(y) - p) - e p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels, options, dtype = rest
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.dtype = options, dtype
        head, hidden = Head(weight, bias).cast(dtype), hidden.detach().to(dtype)
        log_probs = hidden.new_zeros(len(labels), dtype=exact_dtype(dtype))
        entropy, correct = torch.zeros_like(log_probs), labels.new_zeros(())
        for chunk in chunks(len(labels), weight, options.chunk_size):
            logits = F.linear(hidden[chunk], *head)
            for rows, block in blocks(chunk, len(logits), weight):
                softmax = Softmax.of(logits[block], options.softcap)
                log_probs[rows] = softmax.log_probs(labels[rows])
                if options.with_entropy:
                    entropy[rows] = softmax.entropy()
                if options.count_correct:
                    correct.add_((softmax.logits.argmax(-1) == labels[rows]).sum())
                del softmax
            del logits
        ctx.mark_non_differentiable(correct)
        return log_probs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        head, hidden = Head(weight, bias).cast(ctx.dtype), hidden.to(ctx.dtype)
        gradients = Gradients.start(hidden, head, ctx.needs_input_grad[:3])
        for chunk in chunks(len(labels), weight, ctx.options.chunk_size):
            logits = F.linear(hidden[chunk], *head)
            for rows, block in blocks(chunk, len(logits), weight):
                softmax = Softmax.of(logits[block], ctx.options.softcap)
                by_log_probs, by_entropy = (by[rows, None] for by in by_outputs[:2])
                factor = by_log_probs
                if ctx.options.with_entropy:
                    factor = factor + by_entropy * softmax.surprise()
                by_logits = (-softmax.p * factor).scatter_add_(-1, labels[rows, None], by_log_probs)
                logits[block] = softmax.uncapped(by_logits, ctx.options.softcap)
                del softmax, by_logits, factor
            gradients.add(chunk, logits, hidden, head.weight)
            del logits
        return *gradients, None, None, None
