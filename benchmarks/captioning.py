"""What is kept of a caption's beginning saves how much? Cached decoding against decoding everything anew.

    python -m benchmarks.captioning [--tokens 77] [--rounds 3] [--width 512] [--threads 1]

Paired in one run, one after the other in each round, on the same random weights and pictures, without early
stop (the end mark is forbidden on all sides), in seconds of this process's CPU, so that what else the machine
does counts little. Peers: `growing` decodes the words so far anew for every word, `full` always all slots of
the context, as the original X-Decoder does. All three say the same words, or the run fails.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.paired import measure, table
from schemas.jobs import BackboneConfig, ModelConfig, TextConfig
from schemas.tasks import TASKS
from xdecoder.inference.generate import Search, captions
from xdecoder.model.decoder import Pixels
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import END, PAD, START, detokenize


@torch.no_grad()
def anew(model: XDecoder, pixels: Pixels, task: Tensor, tokens: int, *, full: bool) -> list[str]:
    """Greedy captions of all pictures, everything decoded for every word."""
    rows = len(task)
    ids = torch.full((rows, 1), START)
    for _ in range(tokens):
        rest = model.text.context - ids.shape[1] - 1 if full else 0
        padded = torch.cat((ids, torch.full((rows, 1), END), torch.full((rows, rest), PAD)), 1)
        text = model.text(padded)
        slots = model.ask(pixels, "captioning", torch.arange(rows), task, text).final.text
        assert slots is not None
        logits = model.caption_logits(slots[:, ids.shape[1] - 1])
        logits[:, END] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return [detokenize(row[1:]) for row in ids.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=77, help="slots of a caption; one fewer words are said")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--width", type=int, default=512, help="512 is the paper's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-full", action="store_true", help="leave out the slowest peer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = ModelConfig(
        width=arguments.width,
        ffn=4 * arguments.width,
        backbone=BackboneConfig(name="resnet10t"),
        text=TextConfig(context=arguments.tokens),
    )
    model = XDecoder(config).eval()
    words = arguments.tokens - 1
    with torch.no_grad():
        model.text.token_embedding.weight.normal_()  # the first weights say one word again and again
        images = torch.rand(arguments.pictures, 3, 224, 224)
        pixels = model.encode(images, torch.zeros(arguments.pictures, 224, 224, dtype=torch.bool))
        task = model.text(model.task_ids).sentence[[TASKS.index("captioning")] * arguments.pictures]
    where = torch.arange(arguments.pictures)
    ways: dict[str, Callable[[], list[str]]] = {
        "cached": lambda: captions(model, pixels, where, task, words, Search(min_tokens=words)),
        "growing": lambda: anew(model, pixels, task, words, full=False),
        "full": lambda: anew(model, pixels, task, words, full=True),
    }
    if arguments.skip_full:
        del ways["full"]
    times = measure(
        ways, arguments.rounds, lambda said: all(texts == said["cached"] for texts in said.values())
    )
    size = f"width {arguments.width}, {config.decoder_layers} layers"
    print(f"{words} words, {arguments.pictures} pictures, {size}; CPU seconds")
    print(table(times, "cached"))


if __name__ == "__main__":
    main()
