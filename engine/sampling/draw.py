"""Choosing the next token: sampled from the exact distribution, or the likeliest.

Axes: B rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_BLOCK = 512  # tokens of the vocabulary that are searched at a time


def penalise(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Make ids that were already written less likely, as the library does.

    logits: (B, V). written: (B, V) bool. A positive logit is divided, a negative one multiplied.
    """
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(written, lower, logits)


def sample_tokens(
    logits: Tensor, *, temperature: float, uniforms: Tensor | None, banned: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature); temperature 0 is greedy.

    logits: (B, V). uniforms: (B,) in [0, 1), the only randomness (None when greedy). banned: (V,)
    bool. Returns ids (B,), their fp32 log-probs (B,) and the entropy of the distribution (B,), in
    nats, both at this temperature (greedy: at 1). The distribution is not truncated. Sums over
    blocks of SAMPLE_BLOCK tokens are rounded to fp32, a relative error of about 1e-6.
    """
    logits = logits.float() / (temperature or 1.0)
    logits = logits if banned is None else logits.masked_fill(banned, -torch.inf)
    missing = -logits.shape[1] % SAMPLE_BLOCK
    blocks = F.pad(logits, (0, missing), value=-torch.inf).unflatten(1, (-1, SAMPLE_BLOCK))
    masses = blocks.logsumexp(-1).double()  # (B, blocks)
    ids = logits.argmax(-1) if temperature == 0 else _invert_cdf(blocks, masses, uniforms)
    total = masses.logsumexp(-1)
    logprobs = (logits.gather(1, ids[:, None])[:, 0] - total).float()
    # clamped, as a banned token's 0 times -inf would be NaN
    surprise = (total.float()[:, None] - logits).clamp(max=1e9)
    return ids, logprobs, ((-surprise).exp() * surprise).sum(-1)


def _invert_cdf(blocks: Tensor, masses: Tensor, uniforms: Tensor) -> Tensor:
    """The first token of each row at which the cumulative distribution exceeds u.

    blocks: (B, blocks, SAMPLE_BLOCK) logits. masses: (B, blocks), the log-sum-exp of each, fp64.
    uniforms: (B,). Returns (B,).

    Finds the block of tokens first, then the token in it: a GPU is slow at one running sum over V,
    but sums blocks in parallel. A banned token adds nothing, so it is never the first to exceed u.
    """
    cdf = (masses - masses.amax(-1, keepdim=True)).exp().cumsum(-1)
    target = uniforms.double()[:, None] * cdf[:, -1:]
    block = (cdf <= target).sum(-1, keepdim=True)
    before = F.pad(cdf, (1, 0)).gather(1, block)
    share = (target - before) / (cdf.gather(1, block) - before)  # of the block, before the token
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double()
    inside = (inside - masses.gather(1, block)).exp().cumsum(-1)
    # rounding may make the share 1, beyond the last token of the block
    target = inside[:, -1:] * share.clamp(max=1 - 2**-52)
    return block[:, 0] * SAMPLE_BLOCK + (inside <= target).sum(-1)
