"""CLIP of open_clip in our parts: its text tower is our `TextEncoder` under other names, its picture tower
judges regions (`inference/zeroshot.py`). Weights are fetched where a job asks for them.
"""

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

# open_clip's names of a block -> ours; the attention's three projections stand in one matrix there
_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.out_proj": "attention.out",
    "mlp.c_fc": "fc",
    "mlp.c_proj": "proj",
}


def load_clip(name: str) -> Any:
    """An open_clip model with weights, `MODEL/TAG`. Raises `ValueError` where open_clip knows no such."""
    model, _, tag = name.partition("/")
    if tag not in open_clip.list_pretrained_tags_by_model(model):
        near = [f"{m}/{t}" for m, t in open_clip.list_pretrained() if m.startswith(model[:5])][:6]
        raise ValueError(f"open_clip has no {name!r}; write MODEL/TAG, near: {near}")
    return open_clip.create_model(model, pretrained=tag).eval().requires_grad_(False)


def clip_text(name: str) -> dict[str, Tensor]:
    """The text tower's weights under the names of our `TextEncoder`."""
    return text_weights(load_clip(name).state_dict())


def text_weights(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip `CLIP` -> those of our `TextEncoder` (QuickGELU models alone are equal)."""
    ours = {
        "token_embedding.weight": source["token_embedding.weight"],
        "positions": source["positional_embedding"],
        "norm.weight": source["ln_final.weight"],
        "norm.bias": source["ln_final.bias"],
        "project.weight": source["text_projection"].T,
    }
    layers = {key.split(".")[2] for key in source if key.startswith("transformer.resblocks.")}
    for layer in sorted(layers, key=int):
        theirs, here = f"transformer.resblocks.{layer}.", f"blocks.{layer}."
        for part in ("weight", "bias"):
            for old, new in _BLOCK.items():
                ours[f"{here}{new}.{part}"] = source[f"{theirs}{old}.{part}"]
            joined = source[f"{theirs}attn.in_proj_{part}"]
            for kind, values in zip(("query", "key", "value"), joined.chunk(3), strict=True):
                ours[f"{here}attention.{kind}.{part}"] = values
    return {key: value.float().clone(memory_format=torch.contiguous_format) for key, value in ours.items()}
