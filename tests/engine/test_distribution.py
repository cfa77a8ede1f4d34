"""Devices, and the random generators on them."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from plain_task import plain_task, train
from tunesmith.engine import random_state
from tunesmith.engine.distribution import Peers, connect
from tunesmith.engine.memory import peak_memory
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import SetupError

CPU = torch.device("cpu")


def draw() -> list[float]:
    numpy = float(np.random.standard_normal())  # noqa: NPY002
    return [random.random(), random.gauss(), numpy, torch.rand(1).item()]


def test_one_process_needs_no_group() -> None:
    peers = connect(EngineSettings(device="cpu", threads=1))
    assert (peers.size, peers.rank, peers.is_main, peers.control) == (1, 0, True, None)
    assert peers.device == CPU
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(SetupError, match=r"engine.device: 'cuda' is not available here; use auto"):
        connect(EngineSettings(device="cuda"))


def test_sequence_lengths_stay_on_the_cpu() -> None:
    peers = Peers(torch.device("meta"))
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    batch = {"input_ids": torch.ones(1, 3), "cu_seq_lens_q": lengths, "max_length_q": 3}
    moved = peers.to_device(batch)
    assert moved["input_ids"].device.type == "meta"
    assert moved["cu_seq_lens_q"] is lengths
    assert moved["max_length_q"] == 3


def test_every_generator_goes_on_where_it_was() -> None:
    random_state.seed_all(3, CPU)
    draw()  # leaves half a pair of normal numbers in Python's and NumPy's generator
    state = random_state.capture(CPU)
    first = draw()
    random_state.restore(state, CPU)
    assert draw() == first


def test_the_same_seed_gives_the_same_numbers() -> None:
    random_state.seed_all(2**32 + 3, CPU)
    first = draw()
    random_state.seed_all(2**32 + 3, CPU)
    assert draw() == first


def test_what_is_drawn_inside_disturbs_nothing() -> None:
    random_state.seed_all(3, CPU)
    expected = draw()
    random_state.seed_all(3, CPU)
    with random_state.preserved(CPU):
        draw()
    assert draw() == expected


def test_peak_memory_counts_what_was_held() -> None:
    before = peak_memory(CPU)
    block = torch.ones(2**27, dtype=torch.uint8)
    del block
    assert peak_memory(CPU) >= max(before, 2**27)


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    # There Python takes no signals.
    steps: list[int] = []
    thread = threading.Thread(target=lambda: steps.append(train(plain_task(), tmp_path).steps))
    thread.start()
    thread.join()
    assert steps == [6]
