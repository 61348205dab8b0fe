"""What a run was measured on, without names of hosts or paths."""

from __future__ import annotations

import os
import platform
import shlex
import sys

import torch


def machine(device: str = "cpu") -> dict[str, str]:
    """CPU (and GPU) model, cores, versions, and the command."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = {
        "CPU": f"{_cpu()}, {cores} cores",
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]]),
    }
    if device.startswith("cuda"):
        named = {"GPU": torch.cuda.get_device_name(device)} | named
    return named


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            lines = [line.split(":", 1)[1].strip() for line in info if line.startswith(("model name", "flags"))]
        return lines[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
