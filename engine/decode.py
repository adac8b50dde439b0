"""One decoding step: the keys and values of the slots, attention of one new token, drawing it.

Axes as in engine/attention.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from engine.attention import has_flash

DRAW_BLOCK = 512  # tokens of the vocabulary that are looked through at a time
KEY_BLOCK = 128  # keys that a GPU reads or skips together
STAGES = 2  # of the decoding kernel's pipeline; 3 have not been measured


class GroupCache:
    """Keys and values of `slots` groups: each prompt's once, and each of its G rows' own.

    Lists over layers: prompts' (slots, K, S, D), and rows' own (slots, K, G * C, D). On a GPU both
    are the same tensors, (slots, K, S + G * C, D), in which own tokens start behind the prompt's,
    with S and C rounded up to whole blocks; a CPU's products are faster on tensors of their own.
    """

    def __init__(self, model, slots: int, group_size: int, prompt_room: int, completion_room: int):
        config = model.config.text_config
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        options = {"dtype": model.dtype, "device": model.device}
        self.as_blocks = has_flash(torch.empty(0, **options))
        if self.as_blocks:
            prompt_room, completion_room = map(whole_blocks, (prompt_room, completion_room))

        def buffers(room):
            shape = slots, heads, room, size
            return [torch.zeros(shape, **options) for _ in range(config.num_hidden_layers)]

        self.heads, self.served = heads, config.num_attention_heads // heads
        self.prompt_room, self.own_room = prompt_room, completion_room
        self.start = prompt_room if self.as_blocks else 0  # of what is a row's own
        room = self.start + group_size * completion_room
        self.own_keys, self.own_values = buffers(room), buffers(room)
        self.prompt_keys, self.prompt_values = self.own_keys, self.own_values
        if not self.as_blocks:
            self.prompt_keys, self.prompt_values = buffers(prompt_room), buffers(prompt_room)


def whole_blocks(room: int) -> int:
    """Room for so many keys, as whole blocks."""
    return -(-room // KEY_BLOCK) * KEY_BLOCK


def kernel_options(queries: int) -> dict[str, int]:
    """Warps and stages of the decoding kernel for this many queries per slot and key-value head.

    On an H200 PyTorch's own choice, 2 warps and 1 stage, spills registers: 176 bytes a thread at
    32 queries, 38,246 at 72. These do not spill from sm_80 to sm_90, and need at most 98,304 bytes
    of shared memory.
    """
    return {"num_warps": 4 if queries <= 64 else 8, "num_stages": STAGES}


class Prefill:
    """Collects the keys and values of a packed row of prompts into slots of a GroupCache."""

    def __init__(self, cache: GroupCache, slots: list[int], lengths: tuple[int, ...]):
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def update(self, key, value, layer):
        for buffer, new in ((self.cache.prompt_keys, key), (self.cache.prompt_values, value)):
            for slot, row in zip(self.slots, new[0].split(self.lengths, dim=1)):
                buffer[layer][slot, :, : row.shape[1]] = row
        return key, value


class DecodeStep:
    """One new token in each row of the first slots: `update` and `attend` of every layer.

    prompt_lengths: (slots,). own_lengths: (slots, G), tokens that the row has in the cache. room:
    places that the longest row needs, its new token included.
    """

    def __init__(self, cache: GroupCache, prompt_lengths, own_lengths, room: int):
        self.cache, self.room, (self.slots, self.group_size) = cache, room, own_lengths.shape
        self.prompt_lengths, self.own_lengths = prompt_lengths, own_lengths
        slots, heads, members = (
            torch.arange(n, device=own_lengths.device)
            for n in (self.slots, cache.heads, self.group_size)
        )
        # where new keys go, as (slots, K, G) indices of (slots, K, S + G * C, D): a write to a view
        # of these buffers would be compiled to two copies of all of it
        places = cache.start + members * cache.own_room + own_lengths
        self.places = slots[:, None, None], heads[:, None], places[:, None]
        self.mask = self._block_mask() if cache.as_blocks else None

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The library's call in each layer: write the new token's (1, K, B, D) to its row."""
        for buffer, new in ((self.cache.own_keys, key), (self.cache.own_values, value)):
            new = new[0].unflatten(1, (self.slots, -1)).transpose(0, 1)
            buffer[layer][self.places] = new.to(buffer[layer].dtype)
        return key, value

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention of one new token a row, one softmax over prompt and own tokens.

        q: (1, H, B, D). Returns (1, H, B, D). A prompt's keys are read once for its G rows.
        """
        # (slots, K, G, heads that a key-value head serves, D)
        shape = (self.cache.heads, -1, self.slots, self.group_size, q.shape[3])
        q = q[0].view(shape).permute(2, 0, 3, 1, 4)
        attend = self._attend_whole if self.mask is None else self._attend_blocks
        output = attend(q, module.layer_idx, scaling)
        return output.to(v.dtype).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[None]

    def _attend_whole(self, q: Tensor, layer: int, scaling: float) -> Tensor:
        """With scores in memory, in fp32. q and what is returned: (slots, K, G, heads, D)."""
        cache, slots, shape = self.cache, self.slots, q.shape[:4]
        prompt_keys, prompt_values = (
            x[layer][:slots, :, : cache.prompt_room].flatten(0, 1).float()
            for x in (cache.prompt_keys, cache.prompt_values)
        )
        own_keys, own_values = (
            x[layer][:slots, :, cache.start :].reshape(-1, cache.own_room, x[layer].shape[3])
            for x in (cache.own_keys, cache.own_values)
        )
        own_keys, own_values = (x[:, : self.room].float() for x in (own_keys, own_values))
        on_prompt = q.reshape(len(prompt_keys), -1, q.shape[4]).float() @ prompt_keys.mT
        on_prompt = on_prompt.view(*shape, -1) * scaling  # (slots, K, G, heads, prompt room)
        places = torch.arange(on_prompt.shape[4], device=q.device)
        hidden = places >= self.prompt_lengths.view(-1, 1, 1, 1, 1)
        on_prompt = on_prompt.masked_fill(hidden, -torch.inf)
        on_own = q.flatten(0, 2).float() @ own_keys.mT
        on_own = on_own.view(*shape, -1) * scaling  # (slots, K, G, heads, room)
        places = torch.arange(self.room, device=q.device)
        hidden = places > self.own_lengths[:, None, :, None, None]
        on_own = on_own.masked_fill(hidden, -torch.inf)
        # one softmax over both, (slots, K, G, heads, 1)
        highest = torch.maximum(on_prompt.amax(-1, True), on_own.amax(-1, True))
        on_prompt, on_own = (on_prompt - highest).exp(), (on_own - highest).exp()
        total = on_prompt.sum(-1, True) + on_own.sum(-1, True)
        from_prompt = on_prompt.view(len(prompt_keys), -1, on_prompt.shape[4]) @ prompt_values
        from_own = on_own.flatten(0, 2) @ own_values
        return (from_prompt.view(q.shape) + from_own.view(q.shape)) / total

    def _attend_blocks(self, q: Tensor, layer: int, scaling: float) -> Tensor:
        """With flex attention over a slot's filled blocks. Shapes as in `_attend_whole`."""
        keys, values = self.cache.own_keys[layer], self.cache.own_values[layer]
        keys, values = keys[: self.slots], values[: self.slots]
        output = flex_attention(
            q.flatten(2, 3),
            keys,
            values,
            block_mask=self.mask,
            scale=scaling,
            kernel_options=kernel_options(self.group_size * self.cache.served),
        )
        return output.view(q.shape)

    def _block_mask(self) -> BlockMask:
        """Which keys of a slot its rows' queries see, and the blocks in which there are any."""
        cache, device = self.cache, self.own_lengths.device
        prompt_room, own_room = cache.prompt_room, cache.own_room
        of_prompt = torch.arange(prompt_room, device=device) < self.prompt_lengths[:, None]
        own = torch.arange(own_room, device=device) <= self.own_lengths[..., None]
        # (slots, S + G * C), held: Inductor fuses a cat into the kernel, which cannot read it there
        filled = _hold(torch.cat([of_prompt, own.flatten(1)], dim=1))
        # (slots, 1, 1, blocks) before, not behind, what is computed: axes put into its result have
        # stride 0 in a compiled step, by which the kernel for 128 queries goes from slot to slot
        blocks = filled.unflatten(1, (-1, KEY_BLOCK)).any(2)[:, None, None]
        order = blocks.int().argsort(dim=3, descending=True, stable=True).int()
        counts = blocks.sum(3).int()
        queries = self.group_size * cache.served

        def sees(slot, head, query, key):
            is_own = (key - prompt_room) // own_room == query // cache.served
            return filled[slot, key] & ((key < prompt_room) | is_own)

        return BlockMask.from_kv_blocks(
            counts,
            order,
            BLOCK_SIZE=(whole_blocks(queries), KEY_BLOCK),
            mask_mod=sees,
            seq_lengths=(queries, filled.shape[1]),
            compute_q_blocks=False,
        )


class _Shared:
    """Linear layers that are called one after the other on the same input, as one matmul.

    Fuse layers that share an input: small batches are launch-bound. The layers' parameters become
    views of the whole, so copying into them updates it; they get no gradient, and the model must
    not be deepcopied afterwards.
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
        """The matmul for all layers at the first call, and then each one's part of it."""
        if number == 0:
            self.parts = F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        part = self.parts[number]
        if number == self.last:
            self.parts = None
        return part


@torch.no_grad()
def prepare_for_decoding(model: nn.Module) -> None:
    """Make a model's step on a GPU one of fewer and larger kernels. Done twice, it does nothing.

    The model is for inference from then on, though its parameters may be written to. Layers other
    than nn.Linear, as in a quantised model, are left alone.
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
    """A copy that the compiler cannot look into: of what it can, it computes x in every layer."""
    return x.clone()


@_hold.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _hold_angles(module, arguments, angles):
    """Without `_hold` sines are computed in every layer."""
    return tuple(_hold(x) for x in angles)


def penalise(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Logits with those of ids already written made less likely, as the library does.

    logits: (B, V). written: (B, V) bool. A positive logit is divided, a negative one multiplied.
    """
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(written, lower, logits)


def draw_tokens(
    logits: Tensor, *, temperature: float, uniforms: Tensor | None, banned: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature); temperature 0 is greedy.

    logits: (B, V). uniforms: (B,) in [0, 1), the only randomness (None when greedy). banned: (V,)
    bool. Returns ids (B,), their fp32 log-probs (B,) and the entropy of the distribution (B,), in
    nats, both at this temperature (greedy: at 1). Nothing is left out of the distribution; the sum
    over a block of DRAW_BLOCK tokens is rounded to fp32, so that a block's share may be off by a
    millionth of itself.
    """
    logits = logits.float() / (temperature or 1.0)
    logits = logits if banned is None else logits.masked_fill(banned, -torch.inf)
    missing = -logits.shape[1] % DRAW_BLOCK
    blocks = F.pad(logits, (0, missing), value=-torch.inf).unflatten(1, (-1, DRAW_BLOCK))
    masses = blocks.logsumexp(-1).double()  # (B, blocks)
    ids = logits.argmax(-1) if temperature == 0 else _invert_cdf(blocks, masses, uniforms)
    total = masses.logsumexp(-1)
    logprobs = (logits.gather(1, ids[:, None])[:, 0] - total).float()
    # clamped, as a banned token's 0 times -inf would be NaN
    surprise = (total.float()[:, None] - logits).clamp(max=1e9)
    return ids, logprobs, ((-surprise).exp() * surprise).sum(-1)


def _invert_cdf(blocks: Tensor, masses: Tensor, uniforms: Tensor) -> Tensor:
    """The first token of each row at which the distribution function passes u.

    blocks: (B, blocks, DRAW_BLOCK) logits. masses: (B, blocks), the log-sum-exp of each, fp64.
    uniforms: (B,). Returns (B,).

    First the block of tokens, then the token in it: one running sum over V is slow on a GPU, which
    adds up blocks side by side. A banned token adds nothing, so it is never the first to pass.
    """
    cdf = (masses - masses.amax(-1, keepdim=True)).exp().cumsum(-1)
    target = uniforms.double()[:, None] * cdf[:, -1:]
    block = (cdf <= target).sum(-1, keepdim=True)
    before = F.pad(cdf, (1, 0)).gather(1, block)
    share = (target - before) / (cdf.gather(1, block) - before)  # of the block, before the token
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double()
    inside = (inside - masses.gather(1, block)).exp().cumsum(-1)
    # by rounding the share may be 1, at the block's end, behind which there is no token
    target = inside[:, -1:] * share.clamp(max=1 - 2**-52)
    return block[:, 0] * DRAW_BLOCK + (inside <= target).sum(-1)
