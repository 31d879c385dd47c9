"""Decoders to measure with."""

import torch
from embedded import resolve
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.latency import best_device


def load_frozen_decoder(name: str, dtype: str):
    """The decoder's tokenizer, and the decoder in memory of its own, so that using it first costs no reading."""
    path = resolve(name)
    device = best_device()
    decoder = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()
    return AutoTokenizer.from_pretrained(path), decoder.requires_grad_(False).eval()
