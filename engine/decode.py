"""Group Relative Policy Optimization for Qwen2.5-VL: Sec. 3.3, Eqs. 2-5 and their tensors.

Axes: P prompts, G completions per prompt, B = P * G completions, S prompt length, C completion
length, L length of a packed row, N completion tokens in it, V vocabulary; H heads, K key-value
heads, D head size.

The G completions of a group share their prompt, and causal attention makes the prompt's hidden
states independent of what follows. One idea serves sampling and update alike, *group attention*: a
completion attends to its group's prompt and to itself.

- Update: one flat row `[prompt_1 | o_11 .. o_1G | prompt_2 | ...]`, no padding (`token_logprobs`).
- Sampling: a prompt is prefilled once, its keys and values are kept once (`sample`).

Both reach the library's Qwen2.5-VL through an attention function registered as GROUP_ATTENTION, and
the vision tower's windows through another (`use_group_attention`). A CPU computes both with SDPA, a
GPU in bf16 with PyTorch's flash attention over rows of unequal lengths; tests/BENCH.md says why.

Departures from the paper, or readings of it:

1. Eqs. 2-4 use a ratio per token, averaged over the completion and then over the group, as GRPO
   [21] does; `ratio="sequence"` is the ratio of whole outputs, as printed.
2. Eq. 5 divides by the sample standard deviation plus 1e-4.
3. The KL divergence is the estimator of [21]: ref/theta - log(ref/theta) - 1, per token.
4. At the first update on a batch pi_old's log-probs are pi_theta's own, detached; what the sampler
   reported is logged against them and never used in the loss.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

GROUP_ATTENTION = "group_attention"
WINDOW_ATTENTION = "windows_as_flash"  # a name with "flash" is handed all windows in one call
LOG_RATIO_LIMIT = 20.0  # e^20 is half a billion; more would overflow or take over all gradients
HEAD_CHUNK = 1024  # completion tokens whose logits exist at a time: 0.6 GB with V = 151,936
DRAW_BLOCK = 512  # tokens of the vocabulary that are looked through at a time
PREFILL_PROMPTS = 16  # prompts of one prefill, which keeps its activations below the update's
LOOK_EVERY = 16  # steps on a GPU between two looks at which rows are done
PIECE = 256  # keys that a GPU's multiprocessor reads in a decoding step
# torch 2.11 takes grouped queries without being told
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


# Eqs. 2-5: the objective


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Standardise rewards within each prompt's group (Eq. 5).

    rewards: (P, G) float. Returns (P, G) float; a group of equal rewards gives zeros.
    Uses the sample std (divide by G - 1), plus eps. Raises ValueError if G < 2.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group size {rewards.shape[1]}: Eq. 5 needs at least 2 completions")
    rewards = rewards - rewards[:, :1]  # equal rewards become exact zeros: a mean may round
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def policy_ratio(
    logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor, kind: str = "token"
) -> Tensor:
    """Probability ratio s_1 of the new to the old policy (Eq. 3).

    logprobs, old_logprobs, completion_mask: (B, C). Returns (B, C): a ratio per token, or with
    kind="sequence" the ratio of whole outputs, repeated along the row. Padding has ratio 1. The
    log-ratio is held within +-20: that of 1,000 tokens would overflow.
    """
    log_ratio = (logprobs - old_logprobs) * completion_mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio) * completion_mask
    elif kind != "token":
        raise ValueError(f'ratio {kind!r}: choose "token" or "sequence"')
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_ratio(ratio: Tensor, clip_eps: float) -> Tensor:
    """The ratio held within [1 - eps, 1 + eps], s_2 (Eq. 4). Any shape."""
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_eps: float) -> Tensor:
    """min[s_1 A, s_2 A], the first term of Eq. 2, with Eqs. 3-4 inside.

    ratio: (B, C). advantages: (B,). Returns (B, C), to be maximised.
    """
    advantages = advantages[:, None]
    return torch.minimum(ratio * advantages, clipped_ratio(ratio, clip_eps) * advantages)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of D_KL[pi_theta || pi_ref], the second term of Eq. 2 (estimator of [21]).

    Any equal shapes. Never negative, and 0 exactly where the policies agree. The log-ratio is held
    within +-20, where exp would take over the whole gradient.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - log_ratio - 1


def completion_means(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Mean over the tokens of each completion; 0.0 for an empty one. (B, C), (B, C) -> (B,)."""
    return (values * completion_mask).sum(1) / completion_mask.sum(1).clamp(min=1)


def grpo_objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float = 0.2,
    kl_coef: float = 0.04,
    ratio: str = "token",
) -> dict[str, Tensor]:
    """What each output adds to the GRPO objective (Eq. 2), before the mean over outputs.

    logprobs, old_logprobs, ref_logprobs, completion_mask: (B, C); without ref_logprobs no KL term.
    advantages: (B,). Returns (B,) tensors: "objective" (to be maximised, carries the gradient), and
    for the log "kl" and "clip_fraction", the share of tokens where the clip took the gradient.
    """
    s_1 = policy_ratio(logprobs, old_logprobs, completion_mask, ratio)
    surrogate = clipped_surrogate(s_1, advantages, clip_eps)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else kl_estimate(logprobs, ref_logprobs)
    clipped = surrogate < s_1 * advantages[:, None]
    return {
        "objective": completion_means(surrogate - kl_coef * kl, completion_mask),
        "kl": completion_means(kl.detach(), completion_mask),
        "clip_fraction": completion_means(clipped.to(logprobs.dtype), completion_mask),
    }


# The packed row: each prompt once, its completions behind it


@dataclass(frozen=True)
class Prompt:
    """One image and its question, as the model reads them (CPU tensors)."""

    prompt_ids: Tensor  # (S,) long, one image placeholder for each image token
    pixel_values: Tensor  # (patches, patch size) float
    image_grid_thw: Tensor  # (1, 3) long, patches in time, height, width


def _has_flash(x: Tensor) -> bool:
    """Whether PyTorch's flash attention over rows of unequal lengths takes this tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GroupLayout:
    """Who sees whom in a packed row: lengths of the prompts and of the completions behind each."""

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]
    device: torch.device = torch.device("cpu")

    @torch.compiler.disable  # lengths change with every row, and each would be compiled anew
    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention over the row. q: (1, H, L, D); k, v: (1, K, L, D). Returns (1, H, L, D).

        No mask over (L, L): a call for each prompt and each completion, or on a GPU one flash
        attention of everything, which took 0.84 of the time of two calls a group.
        """
        if _has_flash(q):
            keys, *ends = self.sequences
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            k, v = k.index_select(0, keys), v.index_select(0, keys)
            causal = {"window_size": (-1, 0), "scale": scaling, **GROUPED}
            return varlen_attn(q, k, v, *ends, **causal).transpose(0, 1)[None]
        sizes = [s + sum(c) for s, c in zip(self.prompt_lengths, self.completion_lengths)]
        groups = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        lengths = zip(self.prompt_lengths, self.completion_lengths)
        return torch.cat([_attend_group(*g, *n, scaling) for g, n in zip(groups, lengths)], dim=2)

    @cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
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
        ends = lengths.cumsum(1).int().to(self.device)
        return torch.cat(keys).to(self.device), *ends, *lengths.amax(1).tolist()


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
    if _has_flash(query):  # with 16 images 0.3 of the time of the way below
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

    Its vision tower embeds patches by a product from then on, equal up to rounding.
    """
    model.config.text_config._attn_implementation = GROUP_ATTENTION
    # set here: asked for when a model is loaded, a name with "flash" is looked for on the hub
    model.config.vision_config._attn_implementation = WINDOW_ATTENTION
    patches = model.model.visual.patch_embed
    patches.forward = partial(_embed_patches, patches.proj)
    return model


def _embed_patches(proj: nn.Conv3d, pixels: Tensor) -> Tensor:
    """The vision tower's convolution as a product, which it is: a patch is as large as its kernel.

    pixels: (patches, patch size). On a CPU it takes a ninth of the convolution's time.
    """
    return F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1))


@dataclass(frozen=True)
class PackedBatch:
    """Prompts and their completions as one flat row on the model's device."""

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


def pack(model: nn.Module, prompts: list[Prompt], completions: list[list[Tensor]]) -> PackedBatch:
    """Lay P prompts, each with its completions (1-D id tensors), in one flat row.

    Every completion's positions restart at max(prompt position) + 1, as if it alone followed.
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
    flat = [completion for group in completions for completion in group]
    lengths = tuple(tuple(len(completion) for completion in group) for group in completions)
    device = model.device
    return PackedBatch(
        input_ids=torch.cat(ids)[None].to(device),
        position_ids=torch.cat(positions, dim=1)[:, None].to(device),
        pixel_values=_on_device([prompt.pixel_values for prompt in prompts], device),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]).to(device),
        layout=GroupLayout(tuple(len(p.prompt_ids) for p in prompts), lengths, device),
        predicted_from=torch.cat([empty, *sources]).to(device),
        completion_ids=torch.cat([empty, *flat]).to(device),
        completion_mask=mask_from_lengths(torch.tensor(sum(lengths, ()))).to(device),
    )


def _on_device(rows: list[Tensor], device: torch.device) -> Tensor:
    """Rows joined on the device; a GPU copies them from pinned memory while Python goes on."""
    joined = torch.cat(rows)
    if device.type == "cuda":
        return joined.pin_memory().to(device, non_blocking=True)
    return joined.to(device)


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
    hidden = _hidden_states(model, batch, None)[batch.predicted_from]
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
    if len(ids) <= HEAD_CHUNK:
        return _chunk_logprobs(head, hidden, ids, temperature, banned)
    chunks = zip(hidden.split(HEAD_CHUNK), ids.split(HEAD_CHUNK))
    options = (temperature, banned)
    return torch.cat(
        [checkpoint(_chunk_logprobs, head, *c, *options, use_reentrant=False) for c in chunks]
    )


def _chunk_logprobs(head, hidden, ids, temperature, banned):
    logits = head(hidden).float()
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, ids[:, None])[:, 0]


def _hidden_states(model, batch, cache):
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


# The sampler


@dataclass(frozen=True)
class Rollout:
    """B sampled completions in the order of their prompts, G rows a prompt (CPU tensors)."""

    completion_ids: list[Tensor]  # B of (length,), the closing end-of-turn token included
    logprobs: list[Tensor]  # B of (length,) fp32, of what was sampled, at its temperature
    finished: Tensor  # (B,) bool: ended by itself, not cut at max_new_tokens


class GroupCache:
    """Keys and values of `slots` groups: each prompt's once, and each of its G rows' own.

    A list over layers each, of (slots * K, S, D) for prompts and (slots * K * G, C, D) for rows.
    """

    def __init__(self, model, slots: int, group_size: int, prompt_room: int, completion_room: int):
        config = model.config.text_config
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads

        def buffers(*shape):
            options = {"dtype": model.dtype, "device": model.device}
            return [torch.zeros(*shape, size, **options) for _ in range(config.num_hidden_layers)]

        self.heads, self.served = heads, config.num_attention_heads // heads
        self.prompt_keys = buffers(slots * heads, prompt_room)
        self.prompt_values = buffers(slots * heads, prompt_room)
        self.own_keys = buffers(slots * heads * group_size, completion_room)
        self.own_values = buffers(slots * heads * group_size, completion_room)


class _Prefill:
    """Collects the keys and values of a packed row of prompts into slots of a GroupCache."""

    def __init__(self, cache: GroupCache, slots: list[int], lengths: tuple[int, ...]):
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def update(self, key, value, layer):
        for buffer, new in ((self.cache.prompt_keys, key), (self.cache.prompt_values, value)):
            slots = buffer[layer].unflatten(0, (-1, self.cache.heads))
            for slot, row in zip(self.slots, new[0].split(self.lengths, dim=1)):
                slots[slot, :, : row.shape[1]] = row
        return key, value


class _Step:
    """One new token in each row of the first slots: `update` and `attend` of every layer.

    prompt_lengths: (slots,). own_lengths: (slots, G), tokens that the row has in the cache. room:
    places that the longest row needs, its new token included.
    """

    def __init__(self, cache: GroupCache, prompt_lengths, own_lengths, room: int):
        self.cache, self.room, (self.slots, self.group_size) = cache, room, own_lengths.shape
        # as the buffers' first axis has them: (slots * K,) and (slots * K * G,)
        self.prompt_lengths = prompt_lengths.repeat_interleave(cache.heads)
        self.own_lengths = own_lengths[:, None].expand(-1, cache.heads, -1).flatten()
        self.rows = torch.arange(len(self.own_lengths), device=own_lengths.device)
        if _has_flash(cache.own_keys[0]):
            prompt_room, own_room = (x[0].shape[1] for x in (cache.prompt_keys, cache.own_keys))
            queries = self.group_size * cache.served
            self.prompt_pieces = _Pieces(self.prompt_lengths, prompt_room, queries)
            self.own_pieces = _Pieces(self.own_lengths + 1, own_room, cache.served)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The library's call in each layer: write the new token's (1, K, B, D) to its row."""
        for buffer, new in ((self.cache.own_keys, key), (self.cache.own_values, value)):
            new = new[0].unflatten(1, (self.slots, -1)).transpose(0, 1).flatten(0, 2)
            buffer[layer][self.rows, self.own_lengths] = new.to(buffer[layer].dtype)
        return key, value

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention of one new token a row, one softmax over prompt and own tokens.

        q: (1, H, B, D). Returns (1, H, B, D). A prompt's keys are read once for its G rows.
        """
        cache, layer, groups = self.cache, module.layer_idx, len(self.prompt_lengths)
        prompt = cache.prompt_keys[layer][:groups], cache.prompt_values[layer][:groups]
        own = (x[layer][: len(self.rows)] for x in (cache.own_keys, cache.own_values))
        # (slots, K, G, heads that a key-value head serves, D)
        shape = (cache.heads, -1, self.slots, self.group_size, q.shape[3])
        q = q[0].view(shape).permute(2, 0, 3, 1, 4)
        attend = self._attend_pieces if _has_flash(q) else self._attend_whole
        output = attend(q, *prompt, *own, scaling)
        return output.to(v.dtype).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[None]

    def _attend_whole(self, q, prompt_keys, prompt_values, own_keys, own_values, scaling):
        """With scores in memory, in fp32. Returns the shape of q, fp32."""
        own_keys, own_values = own_keys[:, : self.room].float(), own_values[:, : self.room].float()
        groups, rows = q.reshape(len(prompt_keys), -1, q.shape[4]).float(), q.flatten(0, 2).float()
        on_prompt = (groups @ prompt_keys.float().mT).view(*q.shape[:4], -1) * scaling
        on_own = (rows @ own_keys.mT).view(*q.shape[:4], -1) * scaling
        places = torch.arange(prompt_keys.shape[1], device=q.device)
        hidden = places >= self.prompt_lengths.view(*q.shape[:2], 1, 1, 1)
        on_prompt = on_prompt.masked_fill(hidden, -torch.inf)
        places = torch.arange(self.room, device=q.device)
        hidden = places > self.own_lengths.view(*q.shape[:3], 1, 1)
        on_own = on_own.masked_fill(hidden, -torch.inf)
        highest = torch.maximum(on_prompt.amax(-1, True), on_own.amax(-1, True))
        on_prompt, on_own = (on_prompt - highest).exp(), (on_own - highest).exp()
        total = on_prompt.sum(-1, True) + on_own.sum(-1, True)
        output = on_prompt.view(len(prompt_keys), -1, on_prompt.shape[4]) @ prompt_values.float()
        output = output.view(q.shape) + (on_own.flatten(0, 2) @ own_values).view(q.shape)
        return output / total

    def _attend_pieces(self, q, prompt_keys, prompt_values, own_keys, own_values, scaling):
        """With flash attention over pieces of the keys, which a GPU reads side by side.

        A softmax over the pieces' log-sum-exps puts them together. Returns the shape of q, fp32.
        """
        groups = q.reshape(len(prompt_keys), -1, q.shape[4])
        outputs, lse = self.prompt_pieces.attend(groups, prompt_keys, prompt_values, scaling)
        shape = (*q.shape[:2], -1, *q.shape[2:])  # (slots, K, pieces, G, heads, D)
        outputs, lse = outputs.view(shape), lse.view(shape[:-1])
        own, own_lse = self.own_pieces.attend(q.flatten(0, 2), own_keys, own_values, scaling)
        shape = (*q.shape[:3], -1, *q.shape[3:])
        own, own_lse = own.view(shape).transpose(2, 3), own_lse.view(shape[:-1]).transpose(2, 3)
        weights = torch.softmax(torch.cat([lse, own_lse], dim=2), dim=2)
        return (torch.cat([outputs, own], dim=2).float() * weights[..., None]).sum(2)


class _Pieces:
    """Flash attention of all queries of a row on each piece of its keys, as far as they are filled.

    Behind the pieces of a row comes what is not filled, as a sequence without queries.
    """

    def __init__(self, lengths: Tensor, room: int, queries: int):
        """lengths: (rows,), filled of each row's `room` keys. queries: of a row."""
        rows, self.queries = len(lengths), queries
        self.count = -(-room // PIECE)
        row = torch.arange(rows, device=lengths.device)[:, None]
        number = torch.arange(self.count + 1, device=lengths.device)
        starts = torch.minimum(number * PIECE, lengths[:, None])
        self.ends = F.pad((row * room + starts).flatten(), (0, 1), value=rows * room).int()
        starts_q = (row * self.count + number) * queries
        self.ends_q = F.pad(starts_q.flatten(), (0, 1), value=rows * self.count * queries).int()
        self.empty = (starts[:, 1:] == starts[:, :-1])[..., None]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float):
        """q: (rows, queries, D). keys, values: (rows, room, D).

        Returns (rows, pieces, queries, D) and log-sum-exps (rows, pieces, queries) fp32, -inf for
        an empty piece.
        """
        q = q[:, None].expand(-1, self.count, -1, -1)
        outputs, lse = varlen_attn(
            *(x.reshape(-1, 1, x.shape[-1]) for x in (q, keys, values)),
            *(self.ends_q, self.ends, self.queries, PIECE),
            return_aux=AuxRequest(lse=True),
            scale=scaling,
        )
        # an empty piece weighs nothing, but nothing times NaN would be NaN
        outputs = outputs.view(q.shape).masked_fill(self.empty[..., None], 0)
        lse = lse.reshape(q.shape[:-1]).float().masked_fill(self.empty, -torch.inf)
        return outputs, lse


class _Shared:
    """Linear layers that are called one after the other on the same input, as one product.

    With few rows a product is a matter of launches: keys, values and queries together take a GPU
    less than apart. The layers' parameters become views of the whole: what is copied into them
    reaches it, but they get no gradient, and a copy of the model would part from the whole.
    """

    def __init__(self, *layers: nn.Linear):
        self.last, sizes = len(layers) - 1, [layer.out_features for layer in layers]
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in layers]
            whole = None if parts[0] is None else torch.cat(parts).detach()
            setattr(self, name, whole)
            for part, view in zip(parts, () if whole is None else whole.split(sizes)):
                part.data = view
        self.sizes, self.parts = sizes, None
        for number, layer in enumerate(layers):
            layer.forward = partial(self.forward, number)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """The product for all layers at the first, and then each one's part of it."""
        if number == 0:
            self.parts = F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        part = self.parts[number]
        if number == self.last:
            self.parts = None
        return part


@torch.no_grad()
def prepare_for_decoding(model: nn.Module) -> None:
    """Make a model's step on a GPU one of fewer and larger kernels. Done twice, it does nothing.

    Changes the model: from then on it is for inference, where it is, though its parameters may be
    written to. Layers that are not plain, as in a quantised model, are left alone.
    """
    if getattr(model, "prepared_for_decoding", False):
        return
    model.prepared_for_decoding = True
    model.model.language_model.rotary_emb.register_forward_hook(_hold_angles)
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        queries_keys_values = (attention.q_proj, attention.k_proj, attention.v_proj)
        for layers in (queries_keys_values, (mlp.gate_proj, mlp.up_proj)):
            if all(type(layer) is nn.Linear for layer in layers):
                _Shared(*layers)


@torch.library.custom_op("hoi_r1::hold", mutates_args=())
def _hold(x: Tensor) -> Tensor:
    return x.clone()


@_hold.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _hold_angles(module, arguments, angles):
    """A compiler does not look into `_hold`, or it would compute sines anew in every layer."""
    return tuple(_hold(x) for x in angles)


def draw_tokens(
    logits: Tensor, *, temperature: float, uniforms: Tensor | None, banned: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature), exactly; temperature 0 is greedy.

    logits: (B, V). uniforms: (B,) in [0, 1), the only randomness (None when greedy). banned: (V,)
    bool. Returns ids (B,) and their fp32 log-probs (B,) at this temperature (greedy: at 1).
    """
    logits = logits.float() if banned is None else logits.float().masked_fill(banned, -torch.inf)
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    ids = logits.argmax(-1) if temperature == 0 else _invert_cdf(logprobs, uniforms)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def _invert_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token of each row at which the distribution function passes u. (B, V), (B,) -> (B,)

    First the block of tokens, then the token in it: one running sum over V is slow on a GPU, which
    adds up blocks side by side. In fp64, where 152,000 small terms add up without bias. A banned
    token adds nothing, so it is never the first to pass.
    """
    missing = -logprobs.shape[1] % DRAW_BLOCK
    blocks = F.pad(logprobs, (0, missing), value=-torch.inf).unflatten(1, (-1, DRAW_BLOCK))
    cdf = blocks.double().exp().sum(-1).cumsum(-1)
    target = uniforms.double()[:, None] * cdf[:, -1:]
    block = (cdf <= target).sum(-1, keepdim=True)
    target = target - F.pad(cdf, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]]
    inside = inside.double().exp().cumsum(-1)
    # by rounding the target may lie on the block's end, behind which there is no token
    target = torch.minimum(target, inside[:, -1:] * (1 - 2**-52))
    return block[:, 0] * DRAW_BLOCK + (inside <= target).sum(-1)


class Sampler:
    """Samples G completions of every prompt of a stream, in slots that do not wait for each other.

    A slot holds a prompt and its G rows, each row with a length of its own; when all of them are
    done, the slot goes to the next prompt. A step is one function of tensors that stay where they
    are, and nothing of it is read back: on a GPU it is compiled and replayed as a CUDA graph.

    model: in eval mode; on a GPU `prepare_for_decoding` changes it. slots: groups held at a time.
    prompt_room: tokens of the longest prompt. A completion ends with end_id or at max_new_tokens.
    temperature 0 is greedy decoding. banned: (V,) bool, ids that are never drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int,
        group_size: int,
        prompt_room: int,
        max_new_tokens: int,
        end_id: int,
        temperature: float = 1.0,
        banned: Tensor | None = None,
    ):
        def state(*shape, dtype=torch.long):
            return torch.zeros(slots, *shape, dtype=dtype, device=model.device)

        self.model, self.group_size, self.end_id = model, group_size, end_id
        self.max_new_tokens, self.temperature, self.banned = max_new_tokens, temperature, banned
        self.cache = GroupCache(model, slots, group_size, prompt_room, max_new_tokens)
        self.prompt_lengths, self.first_positions = state(), state()
        self.ids = state(group_size, max_new_tokens)
        self.logprobs = state(group_size, max_new_tokens, dtype=torch.float32)
        self.uniforms = state(group_size, max_new_tokens, dtype=torch.float32)
        self.counts = state(group_size)  # tokens drawn; all but the last are in the cache
        self.done = state(group_size, dtype=torch.bool).fill_(True)
        self.owners: list[int | None] = [None] * slots  # the prompt in each slot, by its number
        self.active = slots  # a step computes so many slots, from the first
        self.graph: torch.cuda.CUDAGraph | None = None  # of a step, made when first needed

    @torch.no_grad()
    def run(
        self, prompts: Iterable[tuple[Prompt, list[int] | None]]
    ) -> Iterator[tuple[int, Rollout]]:
        """Yield each prompt's number and its G completions, in the order in which groups end.

        prompts: each with the seeds of its G completions, None when greedy. They are taken as slots
        come free. Raises ValueError if a prompt is too long, or its seeds do not fit.
        """
        arriving, more, self.active = enumerate(prompts), True, len(self.owners)
        self.owners = [None] * self.active  # nothing stays of a run that was broken off
        while True:
            free = self.slots(busy=False)
            if more and len(free) * 4 >= len(self.owners):  # prefill several prompts at a time
                room = min(len(free), PREFILL_PROMPTS)
                taken = list(islice(arriving, room))
                more = len(taken) == room
                if taken:
                    self.admit(free[: len(taken)], *zip(*taken))
            elif len(free) == len(self.owners):
                return
            else:
                self.advance(compact=not more)
            yield from self.leave()

    def slots(self, busy: bool) -> list[int]:
        """The slots that hold a prompt, or those that are free."""
        return [slot for slot, owner in enumerate(self.owners) if (owner is not None) == busy]

    def admit(self, slots: list[int], numbers, arrived) -> None:
        """Prefill prompts into free slots and draw the first token of each of their rows."""
        prompts, seeds = zip(*arrived)
        needed = self.group_size if self.temperature else 0
        if any(len(group or ()) != needed for group in seeds):
            raise ValueError(f"a prompt's {self.group_size} rows need {needed} seeds")
        batch = pack(self.model, list(prompts), [[]] * len(prompts))
        lengths, room = batch.layout.prompt_lengths, self.cache.prompt_keys[0].shape[1]
        if max(lengths) > room:
            raise ValueError(f"a prompt of {max(lengths)} tokens, where prompt_room is {room}")
        hidden = _hidden_states(self.model, batch, _Prefill(self.cache, slots, lengths))
        at = torch.tensor(slots, device=hidden.device)
        self.prompt_lengths[at] = torch.tensor(lengths, device=at.device)
        last = [positions.max() for positions in batch.position_ids.split(lengths, dim=2)]
        self.first_positions[at] = torch.stack(last) + 1
        if self.temperature:
            self.uniforms[at] = self.random_numbers(seeds).to(at.device)
        self.counts[at], self.done[at] = 0, False
        for slot, number in zip(slots, numbers):
            self.owners[slot] = number
        ends = torch.tensor(lengths, device=at.device).cumsum(0) - 1
        self.draw(at, self.model.lm_head(hidden[ends]).repeat_interleave(self.group_size, 0))

    def random_numbers(self, seeds: tuple[list[int], ...]) -> Tensor:
        """(prompts, G, C) from each row's own seed, whatever its neighbours and slot. CPU."""
        rows = [torch.Generator().manual_seed(seed) for group in seeds for seed in group]
        draws = [torch.rand(self.max_new_tokens, generator=generator) for generator in rows]
        return torch.stack(draws).view(len(seeds), self.group_size, -1)

    def step(self, room: int) -> None:
        """Feed the last token of every row and draw the next; done rows run along, unheard.

        room: tokens that the longest row has then.
        """
        slots = torch.arange(self.active, device=self.counts.device)
        own_lengths = (self.counts[slots] - 1).clamp(min=0)
        step = _Step(self.cache, self.prompt_lengths[slots], own_lengths, room)
        last = self.ids[slots].gather(2, own_lengths[..., None]).view(1, -1)
        positions = (self.first_positions[slots, None] + own_lengths).view(1, 1, -1)
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(last),
            position_ids=positions.expand(3, -1, -1),
            attention_mask={"full_attention": step},
            past_key_values=step,
            use_cache=True,
        ).last_hidden_state[0]
        self.draw(slots, self.model.lm_head(hidden))

    def draw(self, slots: Tensor, logits: Tensor) -> None:
        """Draw a token for each row of these slots and add it to those that are not done."""
        counts, done = self.counts[slots], self.done[slots]
        members = torch.arange(self.group_size, device=slots.device)
        at = (slots[:, None], members, counts.clamp(max=self.max_new_tokens - 1))
        ids, logprobs = draw_tokens(
            logits,
            temperature=self.temperature,
            uniforms=self.uniforms[at].flatten() if self.temperature else None,
            banned=self.banned,
        )
        ids, logprobs = ids.view_as(counts), logprobs.view_as(counts)
        self.ids[at] = torch.where(done, self.ids[at], ids)
        self.logprobs[at] = torch.where(done, self.logprobs[at], logprobs)
        counts = counts + ~done
        self.counts[slots] = counts
        self.done[slots] = done | (ids == self.end_id) | (counts == self.max_new_tokens)

    def advance(self, compact: bool) -> None:
        """A step for every row; on a GPU several, between two looks at which rows are done."""
        cuda = self.model.device.type == "cuda"
        if compact and not cuda and len(self.slots(busy=True)) * 2 <= self.active:
            self.compact()
        for _ in range(LOOK_EVERY if cuda else 1):
            if cuda:
                self.graph = self.graph or self.capture()
                self.graph.replay()
            else:
                self.step(int(self.counts[self.slots(busy=True)].max()))

    def compact(self) -> None:
        """Bring the busy slots to the front and compute no others: on a CPU rows cost time."""
        busy, cache = self.slots(busy=True), self.cache
        cached = [*cache.prompt_keys, *cache.prompt_values, *cache.own_keys, *cache.own_values]
        tensors = [buffer.unflatten(0, (len(self.owners), -1)) for buffer in cached]
        tensors += [self.prompt_lengths, self.first_positions, self.ids, self.logprobs]
        tensors += [self.uniforms, self.counts, self.done]
        for to, slot in enumerate(busy):
            for tensor in tensors if to != slot else ():
                tensor[to] = tensor[slot]
        free = [None] * (len(self.owners) - len(busy))
        self.owners = [self.owners[slot] for slot in busy] + free
        self.active = len(busy)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Compile a step and record its kernels.

        Trial steps change nothing: where all rows are done, none is written but in the cache, and
        there only the place that a row's next step writes again.
        """
        prepare_for_decoding(self.model)
        step, done = torch.compile(self.step, dynamic=False), self.done.clone()
        self.done.fill_(True)
        for _ in range(2):  # the first compiles, and the second may find a reason to do it again
            step(self.max_new_tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(self.max_new_tokens)
        self.done.copy_(done)
        return graph

    def leave(self) -> Iterator[tuple[int, Rollout]]:
        """Free the slots in which every row is done, and yield what they hold."""
        done = self.done.all(1).tolist()
        for slot in self.slots(busy=True):
            if done[slot]:
                number, self.owners[slot] = self.owners[slot], None
                yield number, self.rollout(slot)

    def rollout(self, slot: int) -> Rollout:
        """The G completions of a slot."""
        lengths = self.counts[slot].tolist()
        ids, logprobs = self.ids[slot].cpu(), self.logprobs[slot].cpu()
        ids = [row[:length].clone() for row, length in zip(ids, lengths)]
        logprobs = [row[:length].clone() for row, length in zip(logprobs, lengths)]
        return Rollout(ids, logprobs, torch.stack([row[-1] == self.end_id for row in ids]))

    def collect(self, prompts: list[Prompt], seeds: list[int] | None) -> Rollout:
        """The completions of all prompts, in their order. seeds: P * G, None when greedy."""
        size, rows = self.group_size, len(prompts) * self.group_size
        if (self.temperature == 0) != (seeds is None) or len(seeds or range(rows)) != rows:
            raise ValueError(f"sampling {rows} completions needs as many seeds, greedy none")
        groups = [seeds and seeds[i * size : (i + 1) * size] for i in range(len(prompts))]
        found = dict(self.run(zip(prompts, groups, strict=True)))
        parts = [found[number] for number in range(len(prompts))]
        return Rollout(
            [ids for part in parts for ids in part.completion_ids],
            [logprobs for part in parts for logprobs in part.logprobs],
            torch.cat([part.finished for part in parts]),
        )


def sample(
    model: nn.Module,
    prompts: list[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    end_id: int,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    seeds: list[int] | None = None,
    slots: int = 64,
) -> Rollout:
    """Sample G completions of every prompt from softmax(logits / temperature), not cut in any way.

    seeds: one for each of the P * G completions; None for greedy decoding, temperature 0. The rest
    is told by Sampler. Raises ValueError if seeds and temperature do not fit.
    """
    sampler = Sampler(
        model,
        slots=min(slots, len(prompts)),
        group_size=group_size,
        prompt_room=max(len(prompt.prompt_ids) for prompt in prompts),
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        temperature=temperature,
        banned=banned,
    )
    return sampler.collect(prompts, seeds)
