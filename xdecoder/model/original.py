"""The original X-Decoder in ours: its weights, and the proof that ours then computes what it computed.

    python -m xdecoder.model.original FILE.pt

FILE.pt holds an original's configuration, weights, inputs and whatever it computed from them, stage by stage
(X-Decoder, 7). Names and shapes of the weights: X-Decoder, 6.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from torch import Tensor

from schemas.jobs import BackboneConfig, ModelConfig, QuirksConfig, TextConfig
from xdecoder.model.xdecoder import XDecoder

State = Mapping[str, Tensor]

QUIRKS = QuirksConfig(
    masked_image_query=True,
    image_query_segments=True,
    padding_counts=True,
    phrases_together=True,
    bicubic_masks=True,
)

# A class is asked for with the mean of CLIP's sentences for ImageNet and of the name alone, 81 in all, each
# with a full stop (X-Decoder, 4.4).
PROMPTS: tuple[str, ...] = (*(sentence("{}") for sentence in open_clip.OPENAI_IMAGENET_TEMPLATES), "{}.")

# ------------------------------------------------------------------------------------------------ the weights

_HEAD, _PIXEL = r"sem_seg_head\.predictor\.", r"sem_seg_head\.pixel_decoder\."
_TEXT = _HEAD + r"lang_encoder\."
_QKV = "{query,key,value}"  # one stacked parameter of theirs is three of ours
_T = "^T"  # theirs multiplies from the right: x @ W

# Every name of the original -> ours. Regular expressions, each for a whole name; the first that fits counts.
NAMES: Sequence[tuple[str, str]] = [
    (r"backbone_proj", "pooled_embed.weight" + _T),
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (_PIXEL + r"input_proj\.(weight|bias)", r"pixel_decoder.enter.0.\1"),
    (_PIXEL + r"mask_features\.(weight|bias)", r"pixel_decoder.mask_features.0.\1"),
    # theirs count from the finest map, ours from the coarsest
    *[
        (_PIXEL + rf"{theirs}_{last - i}\.{part}(weight|bias)", rf"pixel_decoder.{ours}.{i}.{n}.\1")
        for theirs, ours, last in (("adapter", "laterals", 3), ("layer", "outputs", 4))
        for i in range(last)
        for n, part in enumerate(("", r"norm\."))
    ],
    (
        _PIXEL + r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)",
        r"pixel_decoder.encoder.\1.attention.\2",
    ),
    (_PIXEL + r"transformer\.encoder\.layers\.(\d+)\.linear1\.(.+)", r"pixel_decoder.encoder.\1.ffn.0.\2"),
    (_PIXEL + r"transformer\.encoder\.layers\.(\d+)\.linear2\.(.+)", r"pixel_decoder.encoder.\1.ffn.2.\2"),
    (_PIXEL + r"transformer\.encoder\.layers\.(\d+)\.(norm[12]\..+)", r"pixel_decoder.encoder.\1.\2"),
    (
        _HEAD + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
        r"decoder.layers.\1.cross.\2",
    ),
    (_HEAD + r"transformer_cross_attention_layers\.(\d+)\.norm\.(.+)", r"decoder.layers.\1.norm1.\2"),
    (_HEAD + r"transformer_self_attention_layers\.(\d+)\.self_attn\.(.+)", r"decoder.layers.\1.self.\2"),
    (_HEAD + r"transformer_self_attention_layers\.(\d+)\.norm\.(.+)", r"decoder.layers.\1.norm2.\2"),
    (_HEAD + r"transformer_ffn_layers\.(\d+)\.linear1\.(.+)", r"decoder.layers.\1.ffn.0.\2"),
    (_HEAD + r"transformer_ffn_layers\.(\d+)\.linear2\.(.+)", r"decoder.layers.\1.ffn.2.\2"),
    (_HEAD + r"transformer_ffn_layers\.(\d+)\.norm\.(.+)", r"decoder.layers.\1.norm3.\2"),
    *[(_HEAD + rf"mask_embed\.layers\.{i}\.(.+)", rf"decoder.mask_embed.{2 * i}.\1") for i in range(3)],
    (_HEAD + r"decoder_norm\.(.+)", r"decoder.norm.\1"),
    (_HEAD + r"query_feat\.weight", "decoder.contents.weight"),
    (_HEAD + r"query_embed\.weight", "decoder.positions.weight"),
    (_HEAD + r"level_embed\.weight", "decoder.level_embed.weight"),
    (_HEAD + r"pos_embed_caping\.weight", "decoder.caption_positions.weight"),
    (_HEAD + r"class_embed", "decoder.class_embed.weight" + _T),
    (_HEAD + r"caping_embed", "caption_embed.weight" + _T),
    (_TEXT + r"lang_proj", "text.project.weight" + _T),
    (_TEXT + r"logit_scale", "log_scale"),
    (_TEXT + r"lang_encoder\.positional_embedding", "text.positions"),
    (_TEXT + r"lang_encoder\.token_embedding\.weight", "text.token_embedding.weight"),
    (_TEXT + r"lang_encoder\.ln_final\.(.+)", r"text.norm.\1"),
    (_TEXT + r"lang_encoder\.resblocks\.(\d+)\.attn\.(.+)", r"text.blocks.\1.attention.\2"),
    (_TEXT + r"lang_encoder\.resblocks\.(\d+)\.ln_([12])\.(.+)", r"text.blocks.\1.norm\2.\3"),
    (_TEXT + r"lang_encoder\.resblocks\.(\d+)\.mlp\.c_(fc|proj)\.(.+)", r"text.blocks.\1.\2.\3"),
]
# Then, inside attention; and what is no weight.
_INSIDE = ((r"\.in_proj_(weight|bias)$", rf".{_QKV}.\1"), (r"\.out_proj\.", ".out."))
_BUFFERS = re.compile(r"criterion\.empty_weight|sem_seg_head\.predictor\.self_attn_mask|pixel_(mean|std)")
# What weights finetuned on VQA have on top; ours answers by texts.
_VQA = re.compile(_HEAD + r"(vqa_classifier\.\d+\.(weight|bias)|query_feat_caping\.weight)")


def translate(state: State) -> dict[str, Tensor]:
    """Tensors of the original (weights or their gradients) under our names, in our shapes.

    Raises `ValueError` that lists every name the original does not have.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if _BUFFERS.fullmatch(name) or _VQA.fullmatch(name):
            continue
        target = _target(name)
        if target is None:
            unknown.append(name)
        elif target.endswith(_T):
            ours[target.removesuffix(_T)] = tensor.T
        elif _QKV in target:
            for part, rows in zip(_QKV.strip("{}").split(","), tensor.chunk(3), strict=True):
                ours[target.replace(_QKV, part)] = rows
        else:
            ours[target] = tensor
    if unknown:
        raise ValueError(f"no parameters of an X-Decoder: {_listed(unknown)}")
    return ours


def left_out(state: State) -> list[str]:
    """The weights that have no place in ours: the VQA head."""
    return [name for name in state if _VQA.fullmatch(name)]


def _target(name: str) -> str | None:
    for theirs, ours in NAMES:
        match = re.fullmatch(theirs, name)
        if match:
            target = match.expand(ours)
            for pattern, inner in _INSIDE:
                target = re.sub(pattern, inner, target)
            return target
    return None


def load(model: XDecoder, state: State) -> None:
    """Fill every parameter of a model with the original's weights.

    Raises `ValueError` that lists all missing, unknown and ill-shaped names.
    """
    ours, wanted = translate(state), model.state_dict()
    problems = [
        f"missing: {_listed(sorted(wanted.keys() - ours.keys()))}" if wanted.keys() - ours.keys() else "",
        f"too many: {_listed(sorted(ours.keys() - wanted.keys()))}" if ours.keys() - wanted.keys() else "",
    ]
    problems += [
        f"{name} is {list(ours[name].shape)}, not {list(wanted[name].shape)}"
        for name in sorted(ours.keys() & wanted.keys())
        if ours[name].shape != wanted[name].shape
    ]
    if any(problems):
        raise ValueError("weights of another architecture; " + "; ".join(p for p in problems if p))
    model.load_state_dict({name: tensor.contiguous() for name, tensor in ours.items()})


def model_config(state: State, *, heads: int | None = None, text_heads: int | None = None) -> ModelConfig:
    """The architecture that weights of the original belong to.

    heads    of attention, which no shape tells; 64 channels each by default, as in all released weights
    Raises `ValueError` where a parameter that tells a size is missing.
    """
    head, text = "sem_seg_head.predictor.", "sem_seg_head.predictor.lang_encoder.lang_encoder."
    width = _side(state, head + "class_embed", 0)
    depths = tuple(
        _count(state, rf"backbone\.layers\.{i}\.blocks") for i in range(_count(state, r"backbone\.layers"))
    )
    blocks = [f"backbone.layers.{i}.blocks.0." for i in range(len(depths))]
    options = {
        "embed_dim": _side(state, "backbone.patch_embed.proj.weight", 0),
        "depths": depths,
        "focal_levels": tuple(_count(state, re.escape(b) + r"modulation\.focal_layers") for b in blocks),
        "focal_windows": tuple(_side(state, b + "modulation.focal_layers.0.0.weight", -1) for b in blocks),
    }
    return ModelConfig(
        width=width,
        heads=heads or max(1, width // 64),
        ffn=_side(state, head + "transformer_ffn_layers.0.linear1.weight", 0),
        decoder_layers=_count(state, re.escape(head) + "transformer_ffn_layers"),
        encoder_layers=_count(state, _PIXEL + r"transformer\.encoder\.layers"),
        latents=_side(state, head + "query_feat.weight", 0) - 1,
        task_tokens=False,
        text_contexts=0,
        prompts=PROMPTS,
        no_object="background",
        backbone=BackboneConfig(
            name="focal_dw" if blocks and blocks[0] + "dw1.weight" in state else "focal",
            out_indices=tuple(i for i in range(len(depths)) if f"backbone.norm{i}.weight" in state),
            options=options,
        ),
        text=TextConfig(
            layers=_count(state, re.escape(text) + "resblocks"),
            heads=text_heads or max(1, width // 64),
            context=_side(state, text + "positional_embedding", 0),
            norm_eps=1e-12,
        ),
        quirks=QUIRKS,
    )


def weights(content: Any) -> State:
    """The state dict in what an official file holds: flat, or in a training state, which prefixes its names.

    Raises `ValueError` where there is none, or where one is not finite.
    """
    found = content.get("module", content) if isinstance(content, Mapping) else {}
    state = found if isinstance(found, Mapping) else {}
    anchor = next((name for name in state if str(name).endswith("backbone_proj")), None)
    tensors = all(isinstance(n, str) and isinstance(tensor, Tensor) for n, tensor in state.items())
    if anchor is None or not tensors:
        raise ValueError("not the weights of an X-Decoder: backbone_proj is missing, or not all are tensors")
    bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{bad} holds NaN or infinity: the file is damaged, or its training had diverged")
    return {name.removeprefix(anchor.removesuffix("backbone_proj")): tensor for name, tensor in state.items()}


def _side(state: State, name: str, axis: int) -> int:
    if name not in state or not state[name].ndim:
        raise ValueError(f"not the weights of an X-Decoder: {name} is missing, or has no sides")
    return state[name].shape[axis]


def _count(state: State, prefix: str) -> int:
    """How many numbers follow a prefix, as in layers.0, layers.1 ..."""
    return len({m.group(1) for m in (re.match(prefix + r"\.(\d+)\.", name) for name in state) if m})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# ------------------------------------------------------------------------------------------------ the door


def read(path: Path) -> Any:
    """What a file of tensors and plain values holds; nothing in it is executed.

    Raises `ValueError` where there is no such file, or it is none of these.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: no file of tensors ({' '.join(str(error).split())[:160]})") from None


def main(argv: Sequence[str]) -> int:
    """Compare: 0 where every stage is within its tolerance, 1 where one is not, 2 where none can be."""
    from xdecoder.replay import DELIBERATE, UNCOMPARED, replay  # it needs what stands above

    equal = True
    try:
        if len(argv) != 1:
            raise ValueError("usage: python -m xdecoder.model.original FILE.pt")
        for stage in replay(read(Path(argv[0]))):
            equal &= stage.equal
            verdict = "" if stage.equal else "  DIFFERS"
            sys.stdout.write(f"{stage.name:<48} {stage.difference:8.1e}  of {stage.tolerance:.0e}{verdict}\n")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__} {' '.join(str(error).split())}"
        sys.stderr.write(f"error: nothing to compare: no golden file of an X-Decoder: {said}\n")
        return 2
    except (ValueError, RuntimeError) as error:  # the latter is torch's, of shapes that do not fit
        sys.stderr.write(f"error: nothing to compare: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write("\nOurs does otherwise, on purpose:\n" + "".join(f"- {line}\n" for line in DELIBERATE))
    listed = "".join(f"- {place}: {why}\n" for place, why in UNCOMPARED.items())
    sys.stdout.write("\nRecorded, and not compared:\n" + listed)
    sys.stdout.write("every stage is equal\n" if equal else "NOT equal\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
