"""What `engine.checkpointing: auto` begins with: the least whose plan leaves room."""

import pytest
import torch

from tunesmith.engine.blocks import Level, levels_of
from tunesmith.engine.settings import EngineSettings
from tunesmith.jobs.least_recomputation import least, room_on

PLANNED = {"none": 1000, "selective": 850, "attention": 400, "full": 200, "offload": 100}
LEVELS = levels_of(EngineSettings(), compiled=False)


@pytest.mark.parametrize(
    ("room", "level"),
    [
        (2000, Level(None)),
        (1020, Level("selective")),  # 1000 would leave 2 %
        (850, Level("attention", 0.375)),  # 1000 - 3/8 600 = 775, under 95 % of it
        (430, Level("attention")),
        (300, Level("full")),
        (50, Level("offload")),
    ],
)
def test_the_least_that_leaves_room_is_taken(room: int, level: Level) -> None:
    assert least(LEVELS, PLANNED.__getitem__, room).level == level


def test_what_is_not_needed_is_not_planned() -> None:
    asked: list[str] = []

    def peak(mode: str) -> int:
        asked.append(mode)
        return PLANNED[mode]

    assert least(LEVELS, peak, 2000).reason.startswith("planned at ")
    assert asked == ["none"] * len(asked)


@pytest.mark.parametrize(("share", "room"), [(1.0, 70), (0.5, 50), (0.9, 70)])
def test_the_share_of_memory_that_a_process_may_take_is_kept_to(
    share: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share_of(index: int | None) -> float:
        assert not isinstance(index, torch.device), "a device without an index is refused there"
        return share

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share_of, raising=False)
    assert room_on(torch.device("cuda")) == room
    assert room_on(torch.device("cuda", 1)) == room
