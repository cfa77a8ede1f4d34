"""Distillation on replies that the student writes itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunesmith
from pairs import pair_rows, run_of, write_rows
from reply_runs import StopError, adapter, events, kill_after, train_in_two_processes
from tiny import tiny_llama, tiny_tokenizer
from tunesmith import DataSettings, Full, ModelSettings, Run, Source
from tunesmith.data.rows import TokenRow
from tunesmith.engine.distribution import Peers
from tunesmith.engine.settings import CheckpointSettings
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.assemble import Assembled, assemble
from tunesmith.jobs.own_replies import OwnReplies, prompt_of
from tunesmith.models.loading import load_model
from tunesmith.objectives import Distillation

ALONE = Peers(torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    tiny_llama(hidden_size=48, initializer_range=0.2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def own(folder: Path, model: Path, teacher: Path, /, **changes: Any) -> Run:
    objective = {"on_policy": 1.0, "sampling": {"max_new_tokens": 6}} | changes.pop("objective", {})
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pair_rows(48)]
    path = folder / "rows.jsonl"
    if not path.exists():
        write_rows(path, rows)
    data = {"train": [Source(path=str(path))], "holdout": 8, "max_length": 128}
    made = run_of(
        folder,
        model,
        Distillation(teacher=ModelSettings(name=str(teacher), dtype="float32"), **objective),
        data=DataSettings(**(data | changes.pop("data", {}))),
    )
    for part, values in changes.items():
        updated = getattr(made, part).model_copy(update=values) if values else values
        made = made.model_copy(update={part: updated})
    return made


def stream(run: Run) -> tuple[Assembled, OwnReplies]:
    assembled = assemble(run, ALONE, lambda _: None)
    assert isinstance(assembled.run.objective, Distillation)
    return assembled, OwnReplies(assembled, assembled.run.objective, ALONE)


def replies(rows: list[TokenRow]) -> list[list[int]]:
    return [row.input_ids[row.supervised].tolist() for row in rows]


def test_the_replies_to_the_given_prompts_are_the_students(
    tmp_path: Path, tiny_model: Path, teacher: Path
) -> None:
    assembled, rows = stream(own(tmp_path, tiny_model, teacher))
    given = assembled.data.train.peek(8)
    taken = rows.take(8)
    for row, known in zip(taken, given, strict=True):
        start = int(row.supervised.argmax())
        assert row.input_ids[:start].tolist() == prompt_of(known)
        assert row.supervised[start:].all()
        assert 1 <= len(row.input_ids) - start <= 6
    assert replies(taken) != replies(given)
    assert len({tuple(reply) for reply in replies(taken)}) > 4  # each with noise of its own


def test_they_are_written_by_the_student_of_that_step(
    tmp_path: Path, tiny_model: Path, teacher: Path
) -> None:
    """With equal logits all tokens are equally likely."""
    assembled, rows = stream(own(tmp_path, tiny_model, teacher))
    state = rows.state_dict()
    first = replies(rows.take(4))
    rows.load_state_dict(state)
    assert replies(rows.take(4)) == first
    rows.load_state_dict(state)
    with torch.no_grad():
        assembled.tuned.model.model.norm.weight.zero_()
    assert replies(rows.take(4)) != first


def test_a_share_of_the_steps_has_own_replies(
    tmp_path: Path, tiny_model: Path, teacher: Path
) -> None:
    assembled, rows = stream(own(tmp_path, tiny_model, teacher, objective={"on_policy": 0.5}))
    own_steps = []
    for _ in range(40):
        given = replies(assembled.data.train.peek(1))
        own_steps.append(replies(rows.take(1)) != given)
    assert 10 < sum(own_steps) < 30


def test_replies_end_where_rows_do(tmp_path: Path, tiny_model: Path, teacher: Path) -> None:
    sampling = {"max_new_tokens": 60}
    run = own(
        tmp_path, tiny_model, teacher, objective={"sampling": sampling}, data={"max_length": 64}
    )
    _, rows = stream(run)
    assert max(len(row.input_ids) for row in rows.take(8)) == 64


def test_only_the_last_turn_is_replied_to() -> None:
    row = TokenRow(
        np.arange(8, dtype=np.int32), np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=bool), (8,)
    )
    assert prompt_of(row) == [0, 1, 2, 3, 4, 5]


def test_a_row_without_a_prompt_is_refused() -> None:
    row = TokenRow(np.arange(4, dtype=np.int32), np.ones(4, dtype=bool), (4,))
    with pytest.raises(DataError, match=r"objective.on_policy: a row begins with its reply"):
        prompt_of(row)


def test_a_student_comes_nearer_to_its_teacher_on_its_own_replies(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is the student with all logits twenty times as large."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    teacher = load_model(str(tiny_model))
    with torch.no_grad():
        teacher.model.model.norm.weight.mul_(20)
    teacher.model.save_pretrained(tmp_path / "sure")
    teacher.tokenizer.save_pretrained(tmp_path / "sure")
    objective = {"divergence": "reverse_kl"}
    train = {"max_steps": 30, "learning_rate": 1e-2}
    run = own(tmp_path, tiny_model, tmp_path / "sure", objective=objective, train=train)
    result = tunesmith.train(run.model_copy(update={"method": Full()}))
    losses = [e["loss"] for e in events(result.directory.path, "step_done")]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert result.summary["after"]["divergence"] < result.summary["before"]["divergence"]


def test_a_run_resumes_bit_for_bit(
    tmp_path: Path, tiny_model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    made = own(tmp_path, tiny_model, teacher, objective={"on_policy": 0.7}, train={"max_steps": 8})
    made = made.model_copy(update={"checkpoint": CheckpointSettings(every_steps=3)})
    whole = tunesmith.train(made.model_copy(update={"name": "whole"}))
    with pytest.raises(StopError):
        tunesmith.train(made, listeners=[kill_after(3)])
    cut = tunesmith.train(made, resume=True)
    ours, theirs = adapter(cut.directory.path), adapter(whole.directory.path)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": "cached"}, "replies are not yet written"),
        ({"label_weight": 0.1}, "label_weight is of given replies"),
        ({"on_policy": 0.0}, "set on_policy above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tiny_model: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        own(tmp_path, tiny_model, teacher, objective=settings)


def test_packing_is_refused(tmp_path: Path, tiny_model: Path, teacher: Path) -> None:
    with pytest.raises(SpecError, match=r"data.packing: true .* on_policy: 0"):
        stream(own(tmp_path, tiny_model, teacher, data={"packing": True}))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(
    tmp_path: Path, tiny_model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run = own(tmp_path / "two", tiny_model, teacher, train={"batch_size": 4})
    train_in_two_processes(run, tmp_path / "two")
    one = tunesmith.train(own(tmp_path / "one", tiny_model, teacher)).directory.path
    losses = [
        [e["loss"] for e in events(path, "step_done")]
        for path in (tmp_path / "two" / "runs" / "job", one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
