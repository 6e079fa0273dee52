"""What do three answers about one picture cost, where it is seen once?

    python -m benchmarks.sharing [--side 512] [--rounds 3] [--backbone focalnet_tiny_srf]

Paired in one run: the panoptic answer alone; panoptic, semantic and instance of a picture that was seen once,
decoded together or one after the other; and the three without sharing. From pixels to full-size answers, at
the paper's width and depth with random weights, in seconds of this process's CPU.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.paired import measure, table
from schemas.jobs import BackboneConfig, ModelConfig
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference.predictor import Pictures, Predictor
from xdecoder.model.files import ModelCard
from xdecoder.model.xdecoder import XDecoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="pixels of the picture, square")
    parser.add_argument("--classes", type=int, default=133)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="focalnet_tiny_srf")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = ModelConfig(backbone=BackboneConfig(name=arguments.backbone))
    names = tuple(Category(name=f"class {i}", isthing=i % 2 == 0) for i in range(arguments.classes))
    card = ModelCard(
        model=config,
        taxonomy=Taxonomy(name="many", categories=names),
        answers=(),
        image_size=arguments.side,
        image_text_size=224,
    )
    predictor = Predictor(XDecoder(config).eval(), card)
    shape = (arguments.side, arguments.side, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def three(images: Pictures) -> None:
        predictor.panoptic(images, object_threshold=0)
        predictor.semantic(images)
        predictor.instance(images)

    ways: dict[str, Callable[[], object]] = {
        "one": lambda: predictor.panoptic([picture], object_threshold=0),
        "three, together": lambda: three(predictor.see([picture], ("panoptic", "semantic", "instance"))),
        "three, seen once": lambda: three(predictor.see([picture])),
        "three, apart": lambda: three([picture]),
    }
    ways["one"]()  # the class list is embedded once, and not what is measured
    times = measure(ways, arguments.rounds)
    print(f"{arguments.backbone}, {arguments.side} pixels, {arguments.classes} classes; CPU seconds")
    print(table(times, "one"))


if __name__ == "__main__":
    main()
