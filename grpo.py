"""Group Relative Policy Optimization for Qwen2.5-VL: Sec. 3.3, Eqs. 2-5 and their tensors.

Axes: P prompts, G completions per prompt, B = P * G completions, S prompt length, C completion
length, L length of a packed row, N completion tokens in it, V vocabulary; H heads, K key-value
heads, D head size.

The G completions of a group share their prompt, and causal attention makes the prompt's hidden
states independent of what follows. One idea serves sampling and update alike, *group attention*: a
completion attends to its group's prompt and to itself.

- Update: one flat row `[prompt_1 | o_11 .. o_1G | prompt_2 | ...]`, no padding (`token_logprobs`).
- Sampling: a prompt is prefilled once, its keys and values are kept once (`sample`).

Both reach the library's Qwen2.5-VL through one attention function registered as GROUP_ATTENTION;
load the model with attn_implementation={"text_config": GROUP_ATTENTION, "vision_config": "sdpa"}.

Departures from the paper, or readings of it:

1. Eqs. 2-4 use a ratio per token, averaged over the completion and then over the group, as GRPO
   [21] does; `ratio="sequence"` is the ratio of whole outputs, as printed.
2. Eq. 5 divides by the sample standard deviation plus 1e-4.
3. The KL divergence is the estimator of [21]: ref/theta - log(ref/theta) - 1, per token.
4. At the first update on a batch pi_old's log-probs are pi_theta's own, detached; what the sampler
   reported is logged against them and never used in the loss.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

GROUP_ATTENTION = "group_attention"
HEAD_CHUNK = 1024  # completion tokens whose logits exist at a time: 0.6 GB with V = 151,936
PREFILL_PROMPTS = 16  # prompts of one prefill, which keeps its activations below the update's


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
    kind="sequence" the ratio of whole outputs, repeated along the row. Padding has ratio 1.
    """
    log_ratio = (logprobs - old_logprobs) * completion_mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio) * completion_mask
    elif kind != "token":
        raise ValueError(f'ratio {kind!r}: choose "token" or "sequence"')
    return log_ratio.exp()


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
    log_ratio = (ref_logprobs - logprobs).clamp(-20, 20)
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


@dataclass(frozen=True)
class GroupLayout:
    """Who sees whom in a packed row: lengths of the prompts and of the completions behind each."""

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[tuple[int, ...], ...]

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention over the row. q: (1, H, L, D); k, v: (1, K, L, D). Returns (1, H, L, D).

        Two calls a group, and no mask over (L, L).
        """
        sizes = [s + sum(c) for s, c in zip(self.prompt_lengths, self.completion_lengths)]
        groups = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        lengths = zip(self.prompt_lengths, self.completion_lengths)
        return torch.cat([_attend_group(*g, *n, scaling) for g, n in zip(groups, lengths)], dim=2)


def _attend_group(q, k, v, prompt_length, completion_lengths, scaling):
    """One group, (1, heads, S + C_1 + .. + C_G, D): the prompt causal, completions over both."""

    def attend(q, k, v, **mask):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=gqa, **mask)

    if len(completion_lengths) <= 1:  # with one completion or none the group is an ordinary row
        return attend(q, k, v, is_causal=True)
    lengths = [prompt_length, *completion_lengths]
    (q_prompt, *q), (k_prompt, *k), (v_prompt, *v) = (x[0].split(lengths, dim=1) for x in (q, k, v))
    prompt = attend(q_prompt[None], k_prompt[None], v_prompt[None], is_causal=True)[0]
    q, k, v = _stack_padded(q), _stack_padded(k), _stack_padded(v)  # (G, heads, C, D)
    k = torch.cat([k_prompt.expand(len(k), -1, -1, -1), k], dim=2)
    v = torch.cat([v_prompt.expand(len(v), -1, -1, -1), v], dim=2)
    # token i of a completion sees the first S + i + 1 keys, so the padding behind them stays unseen
    own = attend(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
    return torch.cat([prompt, *(o[:, :n] for o, n in zip(own, completion_lengths))], dim=1)[None]


def _stack_padded(rows: list[Tensor]) -> Tensor:
    """(heads, C_i, D) each -> (rows, heads, longest C, D), zeros behind the shorter ones."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])


def _group_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The library's attention call; `attention_mask` is the layout that the model was given.

    kwargs: the library passes every attention function further names; none concerns this one.
    """
    return attention_mask.attend(module, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(GROUP_ATTENTION, _group_attention)


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
    ids, positions, sources = [], [], [torch.zeros(0, dtype=torch.long)]
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
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]).to(device),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]).to(device),
        layout=GroupLayout(tuple(len(prompt.prompt_ids) for prompt in prompts), lengths),
        predicted_from=torch.cat(sources).to(device),
        completion_ids=torch.cat([sources[0], *flat]).to(device),
        completion_mask=mask_from_lengths(torch.tensor(sum(lengths, ()))).to(device),
    )


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
    chunks = [
        # checkpointed: backward computes these logits again instead of keeping (N, V) in fp32
        checkpoint(_chunk_logprobs, model.lm_head, h, ids, temperature, banned, use_reentrant=False)
        for h, ids in zip(hidden.split(HEAD_CHUNK), batch.completion_ids.split(HEAD_CHUNK))
    ]
    padded = torch.zeros(batch.completion_mask.shape, device=hidden.device)
    return padded.masked_scatter(batch.completion_mask, torch.cat(chunks))


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

    A slot holds a prompt and its G rows. Rows have lengths of their own, so a slot whose rows have
    all finished can take the next prompt while the others go on.
    """

    def __init__(self, model, slots: int, group_size: int, prompt_room: int, completion_room: int):
        config = model.config.text_config
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads

        def buffers(*shape):
            options = {"dtype": model.dtype, "device": model.device}
            return [torch.zeros(*shape, size, **options) for _ in range(config.num_hidden_layers)]

        self.group_size = group_size
        self.prompt_keys = buffers(slots, heads, prompt_room)
        self.prompt_values = buffers(slots, heads, prompt_room)
        self.own_keys = buffers(slots, group_size, heads, completion_room)
        self.own_values = buffers(slots, group_size, heads, completion_room)
        self.prompt_lengths = torch.zeros(slots, dtype=torch.long, device=model.device)
        self.next_positions = torch.zeros(slots, dtype=torch.long, device=model.device)
        self.own_lengths = torch.zeros(slots, group_size, dtype=torch.long, device=model.device)

    def keep(self, slots: list[int]) -> None:
        """Drop all other slots: rows that will never be used again cost time at every step."""
        for name in ("prompt_keys", "prompt_values", "own_keys", "own_values"):
            setattr(self, name, [buffer[slots] for buffer in getattr(self, name)])
        for name in ("prompt_lengths", "next_positions", "own_lengths"):
            setattr(self, name, getattr(self, name)[slots])

    def begin_step(self) -> None:
        """Room for one more token a row, and which places a row must not see, for all layers."""
        self.room = int(self.own_lengths.max()) + 1
        places = torch.arange(self.room, device=self.own_lengths.device)
        self.own_hidden = (places > self.own_lengths[..., None])[:, None, :, None]
        places = torch.arange(self.prompt_keys[0].shape[2], device=places.device)
        self.prompt_hidden = (places >= self.prompt_lengths[:, None])[:, None, None, None]

    def end_step(self) -> None:
        """The token that was fed is part of every row now."""
        self.own_lengths = (self.own_lengths + 1).clamp(max=self.own_keys[0].shape[3] - 1)

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The library's call in each layer: write the new token's (1, K, B, D) to its row."""
        place = self.own_lengths[..., None, None, None]
        for buffer, new in ((self.own_keys, key), (self.own_values, value)):
            new = new[0].transpose(0, 1).unflatten(0, (-1, self.group_size))[..., None, :]
            index = place.expand(-1, -1, new.shape[2], 1, new.shape[4])
            buffer[layer].scatter_(3, index, new.to(buffer[layer].dtype))
        return key, value

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention of one new token a row, one softmax over prompt and own tokens.

        q: (1, H, B, D). Returns (1, H, B, D). A prompt's keys are read once for its G rows.
        """
        layer, heads = module.layer_idx, self.prompt_keys[0].shape[1]
        # (slots, K, G, heads that a key-value head serves, D)
        q = (q[0] * scaling).view(heads, -1, len(self.own_lengths), self.group_size, q.shape[3])
        q = q.permute(2, 0, 3, 1, 4)
        own_keys = self.own_keys[layer][:, :, :, : self.room].transpose(1, 2)
        own_values = self.own_values[layer][:, :, :, : self.room].transpose(1, 2)
        on_prompt = (q.flatten(2, 3) @ self.prompt_keys[layer].mT).unflatten(2, q.shape[2:4])
        on_prompt = on_prompt.masked_fill(self.prompt_hidden, -torch.inf)
        on_own = (q @ own_keys.mT).masked_fill(self.own_hidden, -torch.inf)
        weights = torch.softmax(torch.cat([on_prompt, on_own], dim=-1).float(), dim=-1).to(q.dtype)
        on_prompt, on_own = weights.split([on_prompt.shape[-1], self.room], dim=-1)
        output = (on_prompt.flatten(2, 3) @ self.prompt_values[layer]).unflatten(2, q.shape[2:4])
        output = output + on_own @ own_values
        return output.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[None]


class _Prefill:
    """Collects the keys and values of a packed row of prompts into slots of a GroupCache."""

    def __init__(self, cache: GroupCache, slots: list[int], lengths: tuple[int, ...]):
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def update(self, key, value, layer):
        for buffer, new in ((self.cache.prompt_keys, key), (self.cache.prompt_values, value)):
            for slot, row in zip(self.slots, new[0].split(self.lengths, dim=1)):
                buffer[layer][slot, :, : row.shape[1]] = row
        return key, value


def draw_tokens(
    logits: Tensor, *, temperature: float, uniforms: Tensor | None, banned: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature), exactly; temperature 0 is greedy.

    logits: (B, V). uniforms: (B,) in [0, 1), the only randomness (None when greedy). banned: (V,)
    bool. Returns ids (B,) and their fp32 log-probs (B,) at this temperature (greedy: at 1).
    """
    logits = logits.float() if banned is None else logits.float().masked_fill(banned, -torch.inf)
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        # the first token at which the distribution function passes u; in fp64, where 152,000 small
        # terms add up without bias. A banned token adds nothing, so it is never the first to pass.
        cdf = logprobs.double().exp().cumsum(-1)
        ids = torch.searchsorted(cdf, uniforms.double()[:, None] * cdf[:, -1:], right=True)[:, 0]
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


class _Sampling:
    """The rows under way in the slots of a GroupCache, and what they have produced."""

    def __init__(self, model, prompts, group_size, max_new_tokens, end_id, slots, draw, seeds):
        self.model, self.prompts, self.group_size = model, prompts, group_size
        self.max_new_tokens, self.end_id = max_new_tokens, end_id
        self.draw, self.uniforms = draw, None
        if seeds is not None:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            draws = [torch.rand(max_new_tokens, generator=generator) for generator in generators]
            self.uniforms = torch.stack(draws)  # (rows, C), a row's numbers from its own seed
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        self.cache = GroupCache(model, slots, group_size, longest, max_new_tokens)
        self.owner: list[int | None] = [None] * slots  # the prompt in each slot
        rows = len(prompts) * group_size
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]

    def slots(self, busy: bool) -> list[int]:
        """The slots that hold a prompt, or those that are free."""
        return [slot for slot, owner in enumerate(self.owner) if (owner is not None) == busy]

    def rows(self, slot: int) -> range:
        """The completions of the prompt in a slot."""
        return range(self.owner[slot] * self.group_size, (self.owner[slot] + 1) * self.group_size)

    def finished(self, row: int) -> bool:
        """Whether a row has drawn the end token."""
        return self.ids[row][-1:] == [self.end_id]

    def done(self, row: int) -> bool:
        """Whether a row has ended or is full."""
        return self.finished(row) or len(self.ids[row]) == self.max_new_tokens

    def admit(self, slots: list[int], prompts: list[int]) -> None:
        """Prefill prompts into free slots and draw the first token of each of their rows."""
        for slot, prompt in zip(slots, prompts, strict=True):
            self.owner[slot] = prompt
        batch = pack(self.model, [self.prompts[p] for p in prompts], [[]] * len(prompts))
        cache, lengths = self.cache, batch.layout.prompt_lengths
        hidden = _hidden_states(self.model, batch, _Prefill(cache, slots, lengths))
        cache.prompt_lengths[slots] = torch.tensor(lengths, device=hidden.device)
        last = [positions.max() for positions in batch.position_ids.split(lengths, dim=2)]
        cache.next_positions[slots] = torch.stack(last) + 1
        cache.own_lengths[slots] = 0
        logits = self.model.lm_head(hidden[torch.tensor(lengths).cumsum(0) - 1])
        self.take(slots, logits.repeat_interleave(self.group_size, 0))

    def step(self) -> None:
        """Feed the last token of every row and draw the next one; free slots run along unread."""
        last = torch.zeros(len(self.owner), self.group_size, dtype=torch.long)
        for slot in self.slots(busy=True):
            last[slot] = torch.tensor([self.ids[row][-1] for row in self.rows(slot)])
        cache = self.cache
        cache.begin_step()
        positions = (cache.next_positions[:, None] + cache.own_lengths).view(1, 1, -1)
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(last.view(1, -1).to(self.model.device)),
            position_ids=positions.expand(3, -1, -1),
            attention_mask={"full_attention": cache},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0]
        cache.end_step()
        logits = self.model.lm_head(hidden).unflatten(0, (-1, self.group_size))
        self.take(self.slots(busy=True), logits[self.slots(busy=True)].flatten(0, 1))

    def take(self, slots: list[int], logits: Tensor) -> None:
        """Draw a token for each row of the slots and free the slots in which every row is done."""
        rows = [row for slot in slots for row in self.rows(slot)]
        uniforms = self.next_uniforms(rows) if self.uniforms is not None else None
        ids, logprobs = self.draw(logits, uniforms=uniforms)
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist()):
            if not self.done(row):
                self.ids[row].append(token)
                self.logprobs[row].append(logprob)
        for slot in slots:
            if all(self.done(row) for row in self.rows(slot)):
                self.owner[slot] = None
                self.cache.own_lengths[slot] = 0  # a long row that is gone must not cost room

    def next_uniforms(self, rows: list[int]) -> Tensor:
        """A row's random numbers come from its own seed, whatever its neighbours and slot."""
        places = [min(len(self.ids[row]), self.max_new_tokens - 1) for row in rows]
        return self.uniforms[rows, places].to(self.model.device)


@torch.no_grad()
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

    seeds: one for each of the P * G completions; None for greedy decoding, temperature 0. banned:
    (V,) bool, ids never drawn. slots: groups held at a time; when all rows of a group are done, its
    slot goes to the next prompt. A completion ends with end_id or at max_new_tokens. The model must
    be in eval mode. Raises ValueError if seeds and temperature do not fit.
    """
    rows = len(prompts) * group_size
    if (temperature == 0) != (seeds is None) or (seeds is not None and len(seeds) != rows):
        raise ValueError(f"sampling {rows} completions needs as many seeds, greedy decoding none")
    draw = partial(draw_tokens, temperature=temperature, banned=banned)
    slots = min(slots, len(prompts))
    state = _Sampling(model, prompts, group_size, max_new_tokens, end_id, slots, draw, seeds)
    waiting = deque(range(len(prompts)))
    while waiting or state.slots(busy=True):
        free, busy = state.slots(busy=False), state.slots(busy=True)
        if waiting and len(free) * 4 >= len(state.owner):  # prefill several prompts at a time
            count = min(len(free), len(waiting), PREFILL_PROMPTS)
            taken = [waiting.popleft() for _ in range(count)]
            state.admit(free[: len(taken)], taken)
            continue
        if not waiting and len(busy) * 2 <= len(state.owner):  # rows that are done leave the batch
            state.owner = [state.owner[slot] for slot in busy]
            state.cache.keep(busy)
        state.step()
    return Rollout(
        completion_ids=[torch.tensor(ids) for ids in state.ids],
        logprobs=[torch.tensor(logprobs) for logprobs in state.logprobs],
        finished=torch.tensor([state.finished(row) for row in range(len(state.ids))]),
    )
