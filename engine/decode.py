"""One decoding step: the keys and values of the slots, attention of one new token, drawing it.

Axes as in engine/attention.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from engine.attention import has_flash

DRAW_BLOCK = 512  # tokens of the vocabulary that are looked through at a time
PIECE = 256  # keys that a GPU's multiprocessor reads in a decoding step


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


class Prefill:
    """Collects the keys and values of a packed row of prompts into slots of a GroupCache."""

    def __init__(self, cache: GroupCache, slots: list[int], lengths: tuple[int, ...]):
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def update(self, key, value, layer):
        for buffer, new in ((self.cache.prompt_keys, key), (self.cache.prompt_values, value)):
            slots = buffer[layer].unflatten(0, (-1, self.cache.heads))
            for slot, row in zip(self.slots, new[0].split(self.lengths, dim=1)):
                slots[slot, :, : row.shape[1]] = row
        return key, value


class DecodeStep:
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
        if has_flash(cache.own_keys[0]):
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
        attend = self._attend_pieces if has_flash(q) else self._attend_whole
        output = attend(q, *prompt, *own, scaling)
        return output.to(v.dtype).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[None]

    def _attend_whole(self, q, prompt_keys, prompt_values, own_keys, own_values, scaling):
        """With scores in memory, in fp32. q and what is returned: (slots, K, G, heads, D)."""
        shape, groups = q.shape[:4], len(prompt_keys)  # groups: slots * K
        own_keys, own_values = (x[:, : self.room].float() for x in (own_keys, own_values))
        on_prompt = q.reshape(groups, -1, q.shape[4]).float() @ prompt_keys.float().mT
        on_prompt = on_prompt.view(*shape, -1) * scaling  # (slots, K, G, heads, prompt room)
        places = torch.arange(on_prompt.shape[4], device=q.device)
        hidden = places >= self.prompt_lengths.view(*shape[:2], 1, 1, 1)
        on_prompt = on_prompt.masked_fill(hidden, -torch.inf)
        on_own = q.flatten(0, 2).float() @ own_keys.mT
        on_own = on_own.view(*shape, -1) * scaling  # (slots, K, G, heads, room)
        places = torch.arange(self.room, device=q.device)
        hidden = places > self.own_lengths.view(*shape[:3], 1, 1)
        on_own = on_own.masked_fill(hidden, -torch.inf)
        # one softmax over both, (slots, K, G, heads, 1)
        highest = torch.maximum(on_prompt.amax(-1, True), on_own.amax(-1, True))
        on_prompt, on_own = (on_prompt - highest).exp(), (on_own - highest).exp()
        total = on_prompt.sum(-1, True) + on_own.sum(-1, True)
        from_prompt = on_prompt.view(groups, -1, on_prompt.shape[4]) @ prompt_values.float()
        from_own = on_own.flatten(0, 2) @ own_values
        return (from_prompt.view(q.shape) + from_own.view(q.shape)) / total

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
        ends = F.pad((row * room + starts).flatten(), (0, 1), value=rows * room).int()
        starts_q = (row * self.count + number) * queries
        ends_q = F.pad(starts_q.flatten(), (0, 1), value=rows * self.count * queries).int()
        empty = (starts[:, 1:] == starts[:, :-1])[..., None]
        self.ends, self.ends_q, self.empty = (_hold(x) for x in (ends, ends_q, empty))

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
