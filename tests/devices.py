"""The device that core and serving tests run on: `PREFILLSHARE_TEST_DEVICE`, the CPU unless set."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("PREFILLSHARE_TEST_DEVICE", "cpu"))
