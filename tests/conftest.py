"""What every test starts from: the same random numbers, no chosen backend, no compiled graph of another test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def clean_state(monkeypatch):
    monkeypatch.delenv("SORA_FAST_BACKEND", raising=False)
    monkeypatch.delenv("SORA_FAST_CHECK", raising=False)
    torch.manual_seed(0)
