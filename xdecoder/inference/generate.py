"""Words out of the decoder: greedy captions.

Letters: `R` requests, `T` tokens so far.
"""

import torch
from torch import Tensor

from xdecoder.model.decoder import Pixels
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import END, PAD, START, detokenize


@torch.no_grad()
def greedy(model: XDecoder, pixels: Pixels, images: Tensor, task: Tensor, max_tokens: int) -> list[str]:
    """The most likely next token, again and again, until every caption has ended or holds `max_tokens`
    tokens.

    images int64[R] into the batch of `pixels`; task float[R, D] the captioning sentence for each
    """
    ids = torch.full((len(images), 1), START, device=images.device)
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for _ in range(min(max_tokens, model.config.context - 1)):
        # an unfinished text has no end mark: one is lent, so that all of its slots count as text
        text = model.text(torch.cat((ids, torch.full_like(ids[:, :1], END)), 1))
        slots = model.ask(pixels, "captioning", images, task, text).final.text
        assert slots is not None
        token = model.caption_logits(slots[:, ids.shape[1] - 1]).argmax(-1)
        token = torch.where(ended, PAD, token)
        ids = torch.cat((ids, token[:, None]), 1)
        ended |= token == END
        if ended.all():
            break
    return [detokenize(row[1:]) for row in ids.tolist()]
