"""The optimiser's parameter groups and the learning rate of every step."""

import math

from torch import nn, optim
from torch.distributed.tensor import DTensor

from schemas.jobs import OptimConfig

# Tables that are no `nn.Embedding`: of the text encoder, of Swin's windows (OneFormer, 1.11).
POSITIONS = ("text.positions", "relative_position_bias_table")


def make_optimizer(model: nn.Module, config: OptimConfig) -> optim.AdamW:
    """AdamW with a slower backbone and text encoder.

    No decay for norms, embeddings, biases and single vectors; the original's rule misses biases and the text
    encoder's norms. Each group carries `scale`, its factor on the scheduled rate.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    # one kernel updates a group, and cannot mix whole weights and shares of some (FSDP2)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.split(".")
        scale = config.backbone_scale if "backbone" in part else config.text_scale if "text" in part else 1.0
        plain = parameter.ndim < 2 or id(parameter) in embeddings or name.endswith(POSITIONS)
        decay = 0.0 if plain else config.weight_decay
        groups.setdefault((scale, decay, isinstance(parameter, DTensor)), []).append(parameter)
    return optim.AdamW(
        [
            {"params": p, "lr": config.lr * s, "scale": s, "weight_decay": d}
            for (s, d, _), p in groups.items()
        ],
        lr=config.lr,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The base rate of step `step` in [0, steps): linear warm-up, then the schedule.

    multistep drops by 10 at the milestones (fractions of the steps), poly decays with power 0.9 (both of the
    papers), cosine goes to zero, constant stays.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = step / steps
    return config.lr * _SCHEDULES[config.schedule](done, config)


def _multistep(done: float, config: OptimConfig) -> float:
    return float(0.1 ** sum(done >= milestone for milestone in config.milestones))


def _poly(done: float, config: OptimConfig) -> float:
    return float((1 - done) ** 0.9)


def _cosine(done: float, config: OptimConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _constant(done: float, config: OptimConfig) -> float:
    return 1.0


_SCHEDULES = {"multistep": _multistep, "poly": _poly, "cosine": _cosine, "constant": _constant}
