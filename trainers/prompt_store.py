"""What the frozen decoder has read of prompts, on disk: in every epoch, and in every run, it is the same."""

import hashlib
import uuid
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from modeling_protogen.frozen_decoder import decoder_fingerprint, padded_left, read_prefix

from .files import CheckedTensors, read_run_json, save_tensors, write_json

INFO_NAME = "prompts.json"
KEYS_AND_VALUES, STATES = "keys_and_values", "states"


class PromptStore:
    """
    Stands in for [`read_prefix`] with one decoder: a prompt that is not in the folder is read and stored, one that is
    there is loaded. Several processes may use a folder at once. A token takes `2 * layers * key/value width + states *
    dim` numbers: 26 KB for SmolLM2-135M in bfloat16 and three hidden states.

    Args:
        folder (`str` or `Path`): an existing store, or a place for a new one.
        decoder (`PreTrainedModel`): its layers are of one shape.
        layers (`list[int]`): whose hidden states are kept; may be empty.

    Raises:
        ValueError: if the folder is another decoder's, or has other layers' states.
    """

    def __init__(self, folder: str | Path, decoder: PreTrainedModel, layers: list[int]):
        self.folder, self.layers = Path(folder), layers
        info = {"decoder": decoder_fingerprint(decoder), "dtype": str(decoder.dtype), "layers": layers}
        path = self.folder / INFO_NAME
        if not path.is_file():
            write_json(path, info)
        elif read_run_json(path, "Remove the folder: its prompts are read again.") != info:
            raise ValueError(
                f"{self.folder} holds prompts as another decoder or dtype read them, or other layers: "
                "use another folder."
            )
        self._files = {}
        self._names = set()
        self._open_new_files()

    def __len__(self) -> int:
        return len(self._files)

    def _open_new_files(self) -> None:
        """Those of other processes, and of earlier ones."""
        for path in self.folder.glob("*.safetensors"):
            if path.name not in self._names:
                self._open(path)

    def _open(self, path: Path) -> None:
        self._names.add(path.name)
        file = CheckedTensors(path, "Remove it: its prompts are read again.")
        self._files |= {name.partition(".")[0]: file for name in file.names}

    def __call__(
        self, decoder: PreTrainedModel, prefix_ids: torch.LongTensor, prefix_mask: torch.Tensor, layers: list[int]
    ) -> tuple[Cache, torch.Tensor | None]:
        """
        As [`read_prefix`].

        Raises:
            ValueError: if states of a layer are asked for that the store does not keep, or a file is damaged.
        """
        lacking = sorted({*layers} - {*self.layers})
        if lacking:
            raise ValueError(f"{self.folder} keeps the states of layers {self.layers}, not those of {lacking}.")
        names = [_name(ids[mask.bool()]) for ids, mask in zip(prefix_ids, prefix_mask, strict=True)]
        if any(name not in self._files for name in names):
            self._open_new_files()
        missing = [row for row, name in enumerate(names) if name not in self._files]
        if missing:
            self._store([names[row] for row in missing], decoder, prefix_ids[missing], prefix_mask[missing])

        def stacked(kind):
            parts = [self._files[name][f"{name}.{kind}"] for name in names]
            return torch.stack([padded_left(part, prefix_ids.shape[1]) for part in parts]).to(prefix_ids.device)

        cache = DynamicCache()
        for number, layer in enumerate(stacked(KEYS_AND_VALUES).unflatten(1, (-1, 2)).unbind(1)):
            cache.update(*layer.unbind(1), number)
        if not layers:
            return cache, None
        places = [self.layers.index(layer) for layer in layers]
        return cache, stacked(STATES)[:, places].transpose(1, 2)

    def _store(self, names: list[str], decoder, ids: torch.LongTensor, mask: torch.Tensor) -> None:
        cache, states = read_prefix(decoder, ids, mask, self.layers)
        # (batch, 2 * layers, heads, length, head_dim)
        stored = torch.stack([part for layer in cache.layers for part in (layer.keys, layer.values)], dim=1)
        tensors = {}
        for row, (name, length) in enumerate(zip(names, mask.sum(1).tolist(), strict=True)):
            tensors[f"{name}.{KEYS_AND_VALUES}"] = stored[row, ..., -length:, :].contiguous().cpu()
            if self.layers:  # (layers, length, dim)
                tensors[f"{name}.{STATES}"] = states[row, -length:].transpose(0, 1).contiguous().cpu()
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        save_tensors(path, tensors)
        self._open(path)


def _name(ids: torch.LongTensor) -> str:
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:32]
