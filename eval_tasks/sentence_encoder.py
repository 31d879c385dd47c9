"""What texts mean: embeddings of a sentence encoder."""

import numpy as np
import torch
from transformers import AutoModel

from modeling_protogen.loading import load_tokenizer, load_weights


def sentence_embeddings(name: str, texts: list[str], batch_size: int = 32) -> np.ndarray:
    """
    Mean over tokens of the last states, scaled to length 1, as in the sentence-transformers models without a further
    layer (Reimers & Gurevych, 2019, arXiv:1908.10084).

    Args:
        name (`str`): Hub id or folder of an encoder such as `sentence-transformers/all-MiniLM-L6-v2`.
        texts (`list[str]`)

    Returns:
        `np.ndarray` of shape `(texts, dim)`, float32.
    """
    tokenizer = load_tokenizer(name)
    model = load_weights(AutoModel.from_pretrained, name, dtype=torch.float32).eval()
    parts = []
    for first in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[first : first + batch_size], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts).numpy()
