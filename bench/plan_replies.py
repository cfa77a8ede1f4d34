"""A run that samples, with a model of no meaning: a roll-out, its scoring and the steps over it."""

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tunesmith.data.asked import Asked, AskedData, AskedReport, AskedStream
from tunesmith.data.collate_replies import ReplyCollator
from tunesmith.engine.blocks import Blocks, training_blocks
from tunesmith.engine.distribution import Peers
from tunesmith.engine.memory import peak_memory, reset_peak
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.jobs.assemble import (
    Assembled,
    Program,
    attach_seeded,
    choose_dtypes,
    choose_padding,
)
from tunesmith.jobs.experience import Experience
from tunesmith.jobs.planned_writing import writing_of
from tunesmith.jobs.roles import with_roles
from tunesmith.measure.process_heap import give_back
from tunesmith.models.chat import TokenizerFacts
from tunesmith.models.modes import autocasting
from tunesmith.models.quantize import quantise
from tunesmith.models.skeleton import skeleton
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rewards.build import build_reward
from tunesmith.spec import Run

NOTHING_ENDS = TokenizerFacts(0, (), "none", marks_assistant=False)


def measured_replies(run: Run, device: torch.device) -> int:
    """Return the peak bytes of a roll-out, its scoring and its steps, after one of each."""
    assembled = random_run(run, device)
    objective = run.objective
    assert isinstance(objective, FromReplies)  # noqa: S101 - what it is called for
    steps = objective.rollout.replies * objective.epochs // run.train.batch_size
    experience = Experience(assembled, Peers(device), build_reward(objective.rewards))
    tuned = assembled.tuned
    blocks = [tuned.model.get_submodule(block.path) for block in tuned.sites.blocks]
    optimizer = build_optimizer(tuned.trainable(), run.train, learning_rate=1e-6)
    give_back()
    with training_blocks(tuned.model, blocks, run.engine, device=device) as running:
        for number in range(2):
            if number:
                reset_peak(device)
            for _ in range(steps if number else 1):
                step(assembled, experience, running, device)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            experience._order = experience._order[:0]  # the next rows are of another roll-out
            experience._position = 0
            experience._pass = objective.epochs
    return peak_memory(device)


def step(
    assembled: Assembled, experience: Experience, running: Blocks, device: torch.device
) -> None:
    """Learn from the next rows, up to the gradients."""
    rows = experience.take(assembled.run.train.batch_size)
    batch = Peers(device).to_device(assembled.run.objective.prepared(assembled.collate(rows)))
    running.see(batch)
    with autocasting(device, assembled.autocast_dtype):
        terms = assembled.program(batch)
    torch.autograd.backward(terms.total / terms.count)


def random_run(run: Run, device: torch.device) -> Assembled:
    """Return the run with random weights and prompts of full length, all but one of them."""
    objective = run.objective
    assert isinstance(objective, FromReplies)  # noqa: S101 - what it is called for
    dtypes = choose_dtypes(run, device)
    model = skeleton(run.model, dtype=dtypes.weights, device=device)
    if run.model.quantize != "none":
        quantise(model, run.model, device=device)
    padding = choose_padding(run, model)
    tuned = with_roles(attach_seeded(model, run), run)
    model.train()
    vocabulary = model.config.get_text_config().vocab_size
    writing = writing_of(run, run.data.max_length, run.data.max_length)
    assert writing is not None  # noqa: S101 - such a run writes
    length = writing.prompt
    ids = torch.randint(vocabulary, (objective.rollout.replies, length)).tolist()
    ids[0] = ids[0][: length // 2]  # so that the others are not taken for free of padding
    rows = [Asked(some, [{"role": "user", "content": "-"}], {}) for some in ids]
    report = AskedReport((), len(rows), 0, 0, 0, ())
    stream = AskedStream([rows], report, run.data, seed=0)
    mixed = any(part.attachment.trains_base for part in tuned.parts)
    return Assembled(
        run=run,
        tuned=tuned,
        program=Program(model, objective),
        tokenizer=numbers(vocabulary),
        facts=NOTHING_ENDS,
        data=AskedData(stream, None, [], None),
        collate=ReplyCollator(0, padding),
        autocast_dtype=dtypes.autocast(mixed=mixed),
    )


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are their own numbers."""
    words = models.WordLevel({str(n): n for n in range(vocabulary)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
