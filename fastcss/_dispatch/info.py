"""Says what this installation can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .backends import IMPLEMENTATIONS, describe

PACKAGES = ("fastcss", "torch", "triton", "peft", "transformers", "safetensors", "numpy")


def info() -> dict:
    """Return versions, devices and implementations as plain data, as ``python -m fastcss info`` prints them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    devices = [f"cpu: {platform.machine()}, {capability}, {threads} threads"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "devices": devices,
        "implementations": {name: describe(name) for name in IMPLEMENTATIONS},
    }
