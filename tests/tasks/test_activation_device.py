"""Activations stay on the device while they fit; what only a GPU can show, by logic."""

from __future__ import annotations

import pytest
import torch
from coldpress.tasks.skeleton import activation_device


def test_activations_move_to_the_cpu_when_they_take_more_than_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 2**20, 8 * 2**20))
    assert activation_device((8, 128, 1024), torch.bfloat16, "cuda:1") == "cuda:1"
    assert activation_device((9, 128, 1024), torch.bfloat16, "cuda:1") == "cpu"
    assert activation_device((8, 128, 1024), torch.float32, "cuda:1") == "cpu"
    assert activation_device((99, 128, 1024), torch.float32, "cpu") == "cpu"
