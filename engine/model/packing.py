"""Packing: prompts and completions in one flat row, and the log-probs of their tokens.

Axes as in attention.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.model.attention import GroupLayout, to_device
from engine.model.families import CACHE

LEAST_PREFIX = 128  # tokens; sharing the 15 of image-first prompts costs more than it saves
HEAD_CHUNK = 1024  # completion tokens whose logits exist at a time: 0.6 GB with V = 151,936


@dataclass(frozen=True)
class Prompt:
    """One image and its question as model inputs (CPU tensors)."""

    prompt_ids: Tensor  # (S,) long, with a placeholder for each image token
    pixel_values: Tensor  # (patches, patch size) float
    image_grid_thw: Tensor  # (1, 3) long, patches in time, height, width


@dataclass(frozen=True)
class PackedBatch:
    """Prompts and their completions as one flat row on the computing device."""

    input_ids: Tensor  # (1, L)
    position_ids: Tensor  # (3, 1, L)
    pixel_values: Tensor  # (patches of all images, patch size)
    image_grid_thw: Tensor  # (P, 3)
    layout: GroupLayout
    predicted_from: Tensor  # (N,) index in the row of the state that predicts each completion token
    completion_ids: Tensor  # (N,)
    completion_mask: Tensor  # (B, C) bool, from lengths


def pack(
    model: nn.Module,
    prompts: list[Prompt],
    completions: list[list[Tensor]],
    device: torch.device | None = None,
) -> PackedBatch:
    """Lay P prompts, each with its completions (1-D id tensors), in one flat row.

    Every completion's positions restart at max(prompt position) + 1, as if no other came before.
    device: of the row, if the model's parameters are elsewhere (`--offload`).
    """
    start = prefix = shared_prefix(prompts, model.config.image_token_id)
    ids, positions = [prompts[0].prompt_ids[:prefix]], [torch.arange(prefix).expand(3, -1)]
    sources, empty = [], torch.zeros(0, dtype=torch.long)
    for prompt, group in zip(prompts, completions, strict=True):
        tokens, grid = prompt.prompt_ids[None], prompt.image_grid_thw
        is_image = (tokens == model.config.image_token_id).int()
        # M-RoPE positions (3, S), by the library's own rule
        at_prompt = model.model.get_rope_index(tokens, is_image, image_grid_thw=grid)[0][:, 0]
        ids += [prompt.prompt_ids[prefix:], *group]
        positions.append(at_prompt[:, prefix:])
        start += len(prompt.prompt_ids) - prefix
        last = start - 1
        for completion in group:
            steps = torch.arange(len(completion))
            positions.append((at_prompt.max() + 1 + steps).expand(3, -1))
            # the prompt's last state predicts token 0, the state of token t - 1 predicts token t
            sources.append(torch.where(steps == 0, last, start + steps - 1))
            start += len(completion)
    own = tuple(len(prompt.prompt_ids) - prefix for prompt in prompts)
    lengths = tuple(tuple(len(completion) for completion in group) for group in completions)
    to = partial(to_device, device=device or model.device)
    return PackedBatch(
        input_ids=to(torch.cat(ids)[None]),
        position_ids=to(torch.cat(positions, dim=1)[:, None]),
        # joined on the device: joining 100 MB on the host takes longer than all copies
        pixel_values=torch.cat([to(prompt.pixel_values) for prompt in prompts]),
        image_grid_thw=to(torch.cat([prompt.image_grid_thw for prompt in prompts])),
        layout=GroupLayout(own, lengths, device or model.device, prefix),
        predicted_from=to(torch.cat([empty, *sources])),
        completion_ids=to(torch.cat([empty, *sum(completions, [])])),
        completion_mask=to(mask_from_lengths(torch.tensor(sum(lengths, ())))),
    )


def shared_prefix(prompts: Sequence[Prompt], image_id: int) -> int:
    """Number of text tokens that all prompts begin with; 0 if sharing them does not pay.

    With `--text-first` that is nearly all of the text, which a row then holds once.
    """
    first = prompts[0].prompt_ids
    room = min(len(prompt.prompt_ids) for prompt in prompts)
    alike = torch.stack([prompt.prompt_ids[:room] == first[:room] for prompt in prompts]).all(0)
    count = int((alike & (first[:room] != image_id)).int().cumprod(0).sum())
    return count if len(prompts) > 1 and count >= LEAST_PREFIX else 0


def mask_from_lengths(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B, longest) bool, True on the first `length` places of each row."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device)[None] < lengths[:, None]


def token_logprobs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, banned: Tensor | None = None
) -> Tensor:
    """log pi_theta of each completion token given image, prompt and tokens before it (Eqs. 1-4).

    temperature and banned ((V,) bool or None) must be those the tokens were sampled with.
    Returns (B, C) fp32 with gradient, zeros after each completion's end.
    """
    hidden = hidden_states(model, batch, None)[batch.predicted_from]
    logprobs = head_logprobs(model.lm_head, hidden, batch.completion_ids, temperature, banned)
    padded = torch.zeros(batch.completion_mask.shape, device=hidden.device)
    return padded.masked_scatter(batch.completion_mask, logprobs)


def head_logprobs(
    head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, banned: Tensor | None
) -> Tensor:
    """Log-prob of each id from the hidden state that predicts it. (N, width), (N,) -> (N,) fp32.

    Works in chunks, which backward recomputes: at most (HEAD_CHUNK, V) fp32 logits exist at a time.
    """
    chunk = chunk_logprobs(temperature, compiled=ids.is_cuda)
    if len(ids) <= HEAD_CHUNK:
        return chunk(head, hidden, ids, banned)
    chunks = zip(hidden.split(HEAD_CHUNK), ids.split(HEAD_CHUNK))
    return torch.cat([checkpoint(chunk, head, *c, banned, use_reentrant=False) for c in chunks])


@cache
def chunk_logprobs(temperature: float, *, compiled: bool) -> Callable[..., Tensor]:
    """The function that computes `head_logprobs` of one chunk at this temperature.

    compiled: as one graph for chunks of any size. The temperature is a constant of the graph; as an
    input it would be a CPU scalar, which needs a C++ compiler.
    """
    scale = str(temperature)  # Dynamo turns a float into an input, but not a string

    def logprobs(head, hidden, ids, banned):
        logits = head(hidden).float() / float(scale)
        if banned is not None:
            logits = logits.masked_fill(banned, -torch.inf)
        # not log_softmax, which writes all of (chunk, V) although one value per row is needed
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)

    return torch.compile(logprobs, dynamic=True) if compiled else logprobs


def hidden_states(model, batch, cache):
    """Last hidden states (L, width) of a packed row. cache: collects keys and values, or None."""
    return model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        layout=batch.layout,
        use_cache=cache is not None,
        **{CACHE: cache},
    ).last_hidden_state[0]
