"""The device and the dtype that are fastest here."""

import torch


def best_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def fastest_dtype() -> str:
    """bfloat16 where the processor computes in it, float32 elsewhere, where bfloat16 takes several times as long."""
    if torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "bfloat16"
    return "float32"


def synchronize() -> None:
    """Waits for the accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
