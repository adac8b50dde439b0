"""Group attention: a group's prompt is read once, and each completion sees it and itself.

Axes: P prompts, G completions per prompt, B = P * G completions, S prompt length, C completion
length, L length of a packed row, N completion tokens in it, V vocabulary; H heads, K key-value
heads, D head size.

The G completions of a group share their prompt, and causal attention makes the prompt's hidden
states independent of what follows. One idea serves sampling and update alike: a completion attends
to its group's prompt and to itself.

- Update: one flat row `[prompt_1 | o_11 .. o_1G | prompt_2 | ...]`, no padding (`token_logprobs`).
- Sampling: a prompt is prefilled once, its keys and values are kept once (engine/sampling/sampler.py).

Both reach the library's Qwen2.5-VL through an attention function registered as GROUP_ATTENTION, and
the vision tower's windows through another (`use_group_attention`). A CPU computes both with SDPA, a
GPU in bf16 with PyTorch's flash attention over rows of unequal lengths; tests/BENCH.md says why.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

GROUP_ATTENTION = "group_attention"
WINDOW_ATTENTION = "windows_as_flash"  # a name with "flash" is handed all windows in one call
HEAD_CHUNK = 1024  # completion tokens whose logits exist at a time: 0.6 GB with V = 151,936
# torch 2.11 takes grouped queries without being told
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Prompt:
    """One image and its question, as the model reads them (CPU tensors)."""

    prompt_ids: Tensor  # (S,) long, one image placeholder for each image token
    pixel_values: Tensor  # (patches, patch size) float
    image_grid_thw: Tensor  # (1, 3) long, patches in time, height, width


def has_flash(x: Tensor) -> bool:
    """Whether PyTorch's flash attention over rows of unequal lengths takes this tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


class GroupLayout:
    """Who sees whom in a packed row: lengths of the prompts and of the completions behind each.

    sequences: see `_sequences`; as tensors, in which compiled layers find no length that is fixed.
    """

    def __init__(
        self,
        prompt_lengths: tuple[int, ...],
        completion_lengths: tuple[tuple[int, ...], ...],
        device: torch.device = torch.device("cpu"),
    ):
        self.prompt_lengths, self.completion_lengths = prompt_lengths, completion_lengths
        self.sequences = self._sequences(device)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention over the row. q: (1, H, L, D); k, v: (1, K, L, D). Returns (1, H, L, D).

        No mask over (L, L): a call for each prompt and each completion, or on a GPU one flash
        attention of everything, which took 0.84 of the time of two calls a group.
        """
        if has_flash(q):
            keys, *ends = self.sequences
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            # from fp32, so that backward adds up the gradients of a prompt's keys in fp32
            k, v = (x.float().index_select(0, keys).to(x.dtype) for x in (k, v))
            causal = {"window_size": (-1, 0), "scale": scaling, **GROUPED}
            return varlen_attn(q, k, v, *ends, **causal).transpose(0, 1)[None]
        sizes = [s + sum(c) for s, c in zip(self.prompt_lengths, self.completion_lengths)]
        groups = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        lengths = zip(self.prompt_lengths, self.completion_lengths)
        return torch.cat([_attend_group(*g, *n, scaling) for g, n in zip(groups, lengths)], dim=2)

    def _sequences(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Prompts and completions as sequences of their own, each with the keys that it sees.

        Returns the keys' places in the row, one sequence behind the other; where the queries and
        the keys of each sequence begin and the last ends (int32); the longest of both.
        """
        keys, queries, start = [], [], 0
        for prompt, own in zip(self.prompt_lengths, self.completion_lengths):
            if len(own) <= 1:  # an ordinary row
                prompt, own = prompt + sum(own), ()
            shared = torch.arange(start, start + prompt)
            keys.append(shared)
            start += prompt
            for length in own:
                keys.append(torch.cat([shared, torch.arange(start, start + length)]))
                start += length
            queries += [prompt, *own]
        lengths = torch.tensor([[0, *queries], [0, *map(len, keys)]])
        ends = to_device(lengths.cumsum(1).int(), device)
        return to_device(torch.cat(keys), device), *ends, *lengths.amax(1).tolist()


def _attend_group(q, k, v, prompt_length, completion_lengths, scaling):
    """One group, (1, heads, S + C_1 + .. + C_G, D): the prompt causal, completions over both."""

    def attend(q, k, v):
        # the last token of a sequence sees all keys, each one before it one less
        mask, gqa = causal_lower_right(q.shape[2], k.shape[2]), q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=gqa)

    lengths = (prompt_length, *completion_lengths)
    if len(lengths) == 2:  # one completion, as in SFT: an ordinary row, 6 % faster whole
        lengths = (sum(lengths),)
    # split, not sliced: backward of each slice would fill a whole row with zeros
    (q, *own_q), (k, *own_k), (v, *own_v) = (x.split(lengths, dim=2) for x in (q, k, v))
    outputs = [attend(q, k, v)]
    for q, *own in zip(own_q, own_k, own_v):
        outputs.append(attend(q, *(torch.cat(pair, dim=2) for pair in zip((k, v), own))))
    return torch.cat(outputs, dim=2)


def _group_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The library's attention call; `attention_mask` is the layout that the model was given.

    kwargs: the library passes every attention function further names; none concerns this one.
    """
    return attention_mask.attend(module, query, key, value, scaling).transpose(1, 2), None


def _window_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs
):
    """The vision tower's attention within windows or images, which follow each other in a row.

    query, key, value: (1, H, L, D). cu_seq_lens_q: (windows + 1,), where each begins and the last
    ends. The library's own way with SDPA is a call for each window, some 27 an image and layer.
    """
    if has_flash(query):  # with 16 images 0.3 of the time of the way below
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return varlen_attn(q, k, v, *ends, scale=scaling)[None], None
    q, k, v = (x[0] for x in (query, key, value))
    return _windows_by_length(q, k, v, cu_seq_lens_q, scaling)[None], None


def _windows_by_length(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scaling: float) -> Tensor:
    """Attention within windows, those of one length in one call. (H, L, D) -> (L, H, D)"""
    lengths = ends.diff().long()
    counts, outputs, start = Counter(lengths.tolist()), [], 0
    # patches with those of short windows first; a window's own stay together and in order
    order = lengths.repeat_interleave(lengths, output_size=q.shape[1]).argsort(stable=True)
    if len(counts) > 1:
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
    for length, count in sorted(counts.items()):
        cut = (x[:, start : start + length * count] for x in (q, k, v))
        windows = (x.unflatten(1, (count, length)).transpose(0, 1) for x in cut)
        output = F.scaled_dot_product_attention(*windows, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (patches, H, D)
        start += length * count
    return outputs[0] if len(counts) == 1 else torch.cat(outputs)[order.argsort()]


AttentionInterface.register(GROUP_ATTENTION, _group_attention)
AttentionInterface.register(WINDOW_ATTENTION, _window_attention)


def use_group_attention(model: nn.Module) -> nn.Module:
    """Give a Qwen2.5-VL the attention functions of this module, and return it.

    Its vision tower embeds patches by a matmul from then on, equal up to rounding.
    """
    model.config.text_config._attn_implementation = GROUP_ATTENTION
    # set here: asked for when a model is loaded, a name with "flash" is looked for on the hub
    model.config.vision_config._attn_implementation = WINDOW_ATTENTION
    patches = model.model.visual.patch_embed
    patches.forward = partial(_embed_patches, patches.proj)
    return model


def _embed_patches(proj: nn.Conv3d, pixels: Tensor) -> Tensor:
    """Patch embedding as a matmul (kernel = stride = patch).

    pixels: (patches, patch size). On a CPU it takes a ninth of the convolution's time.
    """
    return F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1))


@dataclass(frozen=True)
class PackedBatch:
    """Prompts and their completions as one flat row on the device that computes."""

    input_ids: Tensor  # (1, L)
    position_ids: Tensor  # (3, 1, L)
    pixel_values: Tensor  # (patches of all images, patch size)
    image_grid_thw: Tensor  # (P, 3)
    layout: GroupLayout
    predicted_from: Tensor  # (N,) place in the row whose hidden state predicts the completion token
    completion_ids: Tensor  # (N,)
    completion_mask: Tensor  # (B, C) bool, from lengths


def prompt_positions(model: nn.Module, prompt: Prompt) -> Tensor:
    """M-RoPE positions (3, S) of a prompt, by the library's own rule. CPU."""
    ids = prompt.prompt_ids[None]
    is_image = (ids == model.config.image_token_id).int()
    return model.model.get_rope_index(ids, is_image, image_grid_thw=prompt.image_grid_thw)[0][:, 0]


def pack(
    model: nn.Module,
    prompts: list[Prompt],
    completions: list[list[Tensor]],
    device: torch.device | None = None,
) -> PackedBatch:
    """Lay P prompts, each with its completions (1-D id tensors), in one flat row.

    Every completion's positions restart at max(prompt position) + 1, as if it alone followed.
    device: of the row, where it is not that of the model's parameters (`--offload`).
    """
    ids, positions, sources, empty = [], [], [], torch.zeros(0, dtype=torch.long)
    start = 0
    for prompt, group in zip(prompts, completions, strict=True):
        at_prompt = prompt_positions(model, prompt)
        ids.append(prompt.prompt_ids)
        positions.append(at_prompt)
        start += len(prompt.prompt_ids)
        last = start - 1
        for completion in group:
            steps = torch.arange(len(completion))
            ids.append(completion)
            positions.append((at_prompt.max() + 1 + steps).expand(3, -1))
            # token 0 is predicted by the prompt's last state, token t by the state of token t - 1
            sources.append(torch.where(steps == 0, last, start + steps - 1))
            start += len(completion)
    lengths = tuple(tuple(len(completion) for completion in group) for group in completions)
    device = device or model.device
    to = partial(to_device, device=device)
    return PackedBatch(
        input_ids=to(torch.cat(ids)[None]),
        position_ids=to(torch.cat(positions, dim=1)[:, None]),
        # joined on the device: a new tensor of 100 MB on the host takes longer than all copies
        pixel_values=torch.cat([to(prompt.pixel_values) for prompt in prompts]),
        image_grid_thw=to(torch.cat([prompt.image_grid_thw for prompt in prompts])),
        layout=GroupLayout(tuple(len(p.prompt_ids) for p in prompts), lengths, device),
        predicted_from=to(torch.cat([empty, *sources])),
        completion_ids=to(torch.cat([empty, *sum(completions, [])])),
        completion_mask=to(mask_from_lengths(torch.tensor(sum(lengths, ())))),
    )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; a GPU copies it from pinned memory while Python goes on."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def mask_from_lengths(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B, longest) bool, True on the first `length` places of each row."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device)[None] < lengths[:, None]


def token_logprobs(
    model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, banned: Tensor | None = None
) -> Tensor:
    """log pi_theta of each completion token given image, prompt and tokens before it (Eqs. 1-4).

    temperature and banned ((V,) bool or None) must be those the tokens were sampled with.
    Returns (B, C) fp32 with gradient, zeros behind each completion's end.
    """
    hidden = hidden_states(model, batch, None)[batch.predicted_from]
    logprobs = head_logprobs(model.lm_head, hidden, batch.completion_ids, temperature, banned)
    padded = torch.zeros(batch.completion_mask.shape, device=hidden.device)
    return padded.masked_scatter(batch.completion_mask, logprobs)


def head_logprobs(
    head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float, banned: Tensor | None
) -> Tensor:
    """Log-prob of each id where its last hidden state predicts it. (N, width), (N,) -> (N,) fp32.

    In chunks, and where there are several backward computes each again: of logits in fp32 no more
    than (HEAD_CHUNK, V) exist at a time.
    """
    chunk = chunk_logprobs(temperature, compiled=ids.is_cuda)
    if len(ids) <= HEAD_CHUNK:
        return chunk(head, hidden, ids, banned)
    chunks = zip(hidden.split(HEAD_CHUNK), ids.split(HEAD_CHUNK))
    return torch.cat([checkpoint(chunk, head, *c, banned, use_reentrant=False) for c in chunks])


@cache
def chunk_logprobs(temperature: float, *, compiled: bool) -> Callable[..., Tensor]:
    """`head_logprobs` of one chunk, at this temperature.

    compiled: one graph for chunks of any size, with fewer passes over the logits. The temperature
    is a constant in it: as an argument it is a CPU scalar, whose code needs a C++ compiler.
    """
    scale = str(temperature)  # Dynamo would make an input of a float, and takes a string as it is

    def logprobs(head, hidden, ids, banned):
        logits = head(hidden).float() / float(scale)
        if banned is not None:
            logits = logits.masked_fill(banned, -torch.inf)
        # not log_softmax: it would write all of (chunk, V) only to gather from it
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)

    return torch.compile(logprobs, dynamic=True) if compiled else logprobs


def hidden_states(model, batch, cache):
    """Last hidden states (L, width) of a packed row; `cache` (or None) collects keys and values."""
    return model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        attention_mask={"full_attention": batch.layout},
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state[0]
