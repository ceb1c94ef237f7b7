import logging

import pytest
import torch

from hf_bcd import BCDConfig
from hf_bcd.training import hardware


@pytest.mark.parametrize(
    ("found", "warned"), [({"avx2": True}, True), ({"avx2": True, "amx_bf16": True}, False), ({"bf16": True}, False)]
)
def test_bfloat16_without_hardware_is_named(tmp_path, monkeypatch, caplog, found, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **found})
    hardware.warn_of_emulation.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            BCDConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to="none")
    hardware.warn_of_emulation.cache_clear()
    assert [("bfloat16 in software" in message) for message in caplog.messages] == [True] * warned


def test_float32_warns_of_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    hardware.warn_of_emulation.cache_clear()
    BCDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert not caplog.messages
