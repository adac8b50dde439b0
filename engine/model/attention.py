"""Group attention: each completion attends to its group's prompt, stored once, and to itself.

Axes: P prompts, G completions per prompt, B = P * G completions, S prompt length, C completion
length, L length of a packed row, N completion tokens in it, V vocabulary; H heads, K key-value
heads, D head size.

The G completions of a group share their prompt. Attention is causal, so the prompt's hidden states
do not depend on what follows, and are computed once.

- Update: one flat row `[prompt_1 | o_11 .. o_1G | prompt_2 | ...]`, no padding (packing.py).
- Sampling: a prompt is prefilled once, and its keys and values are stored once (engine/sampling/).

The library's model calls an attention function registered as GROUP_ATTENTION, and another one for
the windows of the vision tower (`use_group_attention`). A CPU uses SDPA. A GPU in bf16 uses
PyTorch's flash attention over rows of unequal lengths; docs/speed.md says why.
"""

from collections import Counter
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

GROUP_ATTENTION = "group_attention"
WINDOW_ATTENTION = "windows_as_flash"  # the library passes all windows at once to a "flash" name
# torch 2.11 takes grouped queries without this argument
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; to a GPU asynchronously, from pinned memory."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def has_flash(x: Tensor) -> bool:
    """Whether PyTorch's flash attention supports this tensor's device and dtype."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


class GroupLayout:
    """Which token attends to which in a packed row: lengths of prompts and their completions.

    prefix: number of tokens at the start of the row that all prompts share (`--text-first`);
    prompt_lengths do not count them. sequences: from `_sequences`, as tensors, so that compiled
    layers do not specialise on lengths.
    """

    def __init__(
        self,
        prompt_lengths: tuple[int, ...],
        completion_lengths: tuple[tuple[int, ...], ...],
        device: torch.device = torch.device("cpu"),
        prefix: int = 0,
    ):
        self.prompt_lengths, self.completion_lengths = prompt_lengths, completion_lengths
        self.prefix = prefix
        self.sequences = self._sequences(device)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention over the row. q: (1, H, L, D); k, v: (1, K, L, D). Returns (1, H, L, D).

        No (L, L) mask is made. A CPU makes one call per prompt and completion. A GPU makes a single
        call of flash attention, which takes 0.84 times as long as two calls per group.
        """
        if has_flash(q):
            keys, *ends = self.sequences
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            # via fp32, so that backward sums the gradients of a prompt's keys in fp32
            k, v = (x.float().index_select(0, keys).to(x.dtype) for x in (k, v))
            causal = {"window_size": (-1, 0), "scale": scaling, **GROUPED}
            return varlen_attn(q, k, v, *ends, **causal).transpose(0, 1)[None]
        sizes = [s + sum(c) for s, c in zip(self.prompt_lengths, self.completion_lengths)]
        rows = (x.split([self.prefix, *sizes], dim=2) for x in (q, k, v))
        first, *groups = zip(*rows, strict=True)
        prefix = first if self.prefix else None
        outputs = [_attend(*prefix, scaling)] if prefix else []
        for group, *lengths in zip(groups, self.prompt_lengths, self.completion_lengths):
            outputs.append(_attend_group(*group, *lengths, scaling, prefix))
        return torch.cat(outputs, dim=2)

    def _sequences(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Prompts and completions as separate sequences, each with the keys that it attends to.

        Returns the indices of all keys in the row, sequence after sequence; the cumulative lengths
        of queries and of keys (int32, from 0); the longest length of queries and of keys.
        """
        prefix, start = torch.arange(self.prefix), self.prefix
        keys, queries = ([prefix], [self.prefix]) if self.prefix else ([], [])
        for prompt, own in zip(self.prompt_lengths, self.completion_lengths):
            if len(own) <= 1:  # prompt and completion are one causal sequence
                prompt, own = prompt + sum(own), ()
            shared = torch.cat([prefix, torch.arange(start, start + prompt)])
            keys.append(shared)
            start += prompt
            for length in own:
                keys.append(torch.cat([shared, torch.arange(start, start + length)]))
                start += length
            queries += [prompt, *own]
        lengths = torch.tensor([[0, *queries], [0, *map(len, keys)]])
        ends = to_device(lengths.cumsum(1).int(), device)
        return to_device(torch.cat(keys), device), *ends, *lengths.amax(1).tolist()


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention, aligned at the end: the last query sees all keys."""
    mask, gqa = causal_lower_right(q.shape[2], k.shape[2]), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=gqa)


def _attend_group(q, k, v, prompt_length, completion_lengths, scaling, prefix):
    """Attention of one group, (1, heads, S + C_1 + .. + C_G, D). prefix: its q, k, v, or None."""
    lengths = (prompt_length, *completion_lengths)
    if len(lengths) == 2:  # one completion, as in SFT: one causal sequence is 6 % faster
        lengths = (sum(lengths),)
    # split, not sliced: backward of each slice would fill a whole row with zeros
    (q, *own_q), (k, *own_k), (v, *own_v) = (x.split(lengths, dim=2) for x in (q, k, v))
    if prefix:
        k, v = (torch.cat(pair, dim=2) for pair in zip(prefix[1:], (k, v)))
    outputs = [_attend(q, k, v, scaling)]
    for q, *own in zip(own_q, own_k, own_v):
        both = (torch.cat(pair, dim=2) for pair in zip((k, v), own))
        outputs.append(_attend(q, *both, scaling))
    return torch.cat(outputs, dim=2)


def _group_attention(module, query, key, value, attention_mask, scaling, layout, **kwargs):
    """The library's attention call. layout: a GroupLayout or a DecodeStep."""
    return layout.attend(module, query, key, value, scaling).transpose(1, 2), None


def _window_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs
):
    """The vision tower's attention within windows or images, which follow each other in a row.

    query, key, value: (1, H, L, D). cu_seq_lens_q: (windows + 1,) cumulative lengths. With SDPA the
    library would make one call per window, about 27 per image and layer.
    """
    if has_flash(query):  # takes 0.3 times as long as SDPA below (16 images)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return varlen_attn(q, k, v, *ends, scale=scaling)[None], None
    q, k, v = (x[0] for x in (query, key, value))
    lengths = cu_seq_lens_q.diff().long()
    counts, outputs, start = Counter(lengths.tolist()), [], 0
    # short windows first; the patches of a window stay together and in order
    order = lengths.repeat_interleave(lengths, output_size=q.shape[1]).argsort(stable=True)
    if len(counts) > 1:
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
    for length, count in sorted(counts.items()):  # one call for all windows of a length
        cut = (x[:, start : start + length * count] for x in (q, k, v))
        windows = (x.unflatten(1, (count, length)).transpose(0, 1) for x in cut)
        output = F.scaled_dot_product_attention(*windows, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (patches, H, D)
        start += length * count
    output = outputs[0] if len(counts) == 1 else torch.cat(outputs)[order.argsort()]
    return output[None], None


AttentionInterface.register(GROUP_ATTENTION, _group_attention)
AttentionInterface.register(WINDOW_ATTENTION, _window_attention)


def use_group_attention(model: nn.Module) -> nn.Module:
    """Switch a model to this module's attention functions, and return it.

    Its vision tower then embeds patches by a matmul, equal up to rounding.
    """
    model.config.text_config._attn_implementation = GROUP_ATTENTION
    # not in from_pretrained, which looks up a name with "flash" on the hub
    model.config.vision_config._attn_implementation = WINDOW_ATTENTION
    patches = model.model.visual.patch_embed
    patches.forward = partial(_embed_patches, patches.proj)
    return model


def _embed_patches(proj: nn.Conv3d, pixels: Tensor) -> Tensor:
    """Patch embedding as a matmul (kernel = stride = patch).

    pixels: (patches, patch size). On a CPU it is nine times as fast as the convolution.
    """
    return F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
