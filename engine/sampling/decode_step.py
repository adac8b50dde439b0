"""One decoding step: cached keys and values of the slots, and attention of one token per row.

Axes as in engine/model/attention.py.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from engine.model.attention import GroupLayout, has_flash
from engine.model.families import head_size

KEY_BLOCK = 128  # keys that a GPU reads or skips together
STAGES = 2  # of the decoding kernel's pipeline; 3 were not measured


class GroupCache:
    """Keys and values of `slots` groups: each prompt's once, and each of its G rows' own.

    Lists over layers: prompts' (slots, K, S, D), and rows' own (slots, K, G * C, D). On a GPU both
    are the same tensors, (slots, K, S + G * C, D): the prompt's tokens, then own tokens, with S and
    C rounded up to whole blocks. A CPU is faster with separate tensors.
    """

    def __init__(self, model, slots: int, group_size: int, prompt_room: int, completion_room: int):
        config = model.config.text_config
        heads, size = config.num_key_value_heads, head_size(config)
        options = {"dtype": model.dtype, "device": model.device}
        self.as_blocks = has_flash(torch.empty(0, **options))
        if self.as_blocks:
            prompt_room, completion_room = map(whole_blocks, (prompt_room, completion_room))

        def buffers(room):
            shape = slots, heads, room, size
            return [torch.zeros(shape, **options) for _ in range(config.num_hidden_layers)]

        self.heads, self.served = heads, config.num_attention_heads // heads
        self.prompt_room, self.own_room = prompt_room, completion_room
        self.start = prompt_room if self.as_blocks else 0  # of the rows' own tokens
        room = self.start + group_size * completion_room
        self.own_keys, self.own_values = buffers(room), buffers(room)
        self.prompt_keys, self.prompt_values = self.own_keys, self.own_values
        if not self.as_blocks:
            self.prompt_keys, self.prompt_values = buffers(prompt_room), buffers(prompt_room)


def whole_blocks(room: int) -> int:
    """The number of keys rounded up to whole blocks."""
    return -(-room // KEY_BLOCK) * KEY_BLOCK


def kernel_options(queries: int) -> dict[str, int]:
    """Warps and stages of the decoding kernel for this many queries per slot and key-value head.

    On an H200 PyTorch's default, 2 warps and 1 stage, spills registers: 176 bytes per thread at 32
    queries, 38,246 at 72. These values do not spill on sm_80 to sm_90, and need at most 98,304
    bytes of shared memory.
    """
    return {"num_warps": 4 if queries <= 64 else 8, "num_stages": STAGES}


class Prefill:
    """Copies the keys and values of a packed row of prompts into slots of a GroupCache."""

    def __init__(self, cache: GroupCache, slots: list[int], layout: GroupLayout):
        self.cache, self.slots = cache, slots
        self.lengths = (layout.prefix, *layout.prompt_lengths)

    def update(self, key, value, layer, kwargs=None):
        """Called by the library in each layer. kwargs: from transformers 5.24 on, not used."""
        for buffer, new in ((self.cache.prompt_keys, key), (self.cache.prompt_values, value)):
            prefix, *rows = new[0].split(self.lengths, dim=1)
            for slot, row in zip(self.slots, rows):
                start = prefix.shape[1]
                buffer[layer][slot, :, :start] = prefix
                buffer[layer][slot, :, start : start + row.shape[1]] = row
        return key, value


class DecodeStep:
    """One new token in each row of the first slots: `update` and `attend` of every layer.

    prompt_lengths: (slots,). own_lengths: (slots, G), cached tokens of each row. room: cached
    tokens of the longest row, with its new token.
    """

    def __init__(self, cache: GroupCache, prompt_lengths, own_lengths, room: int):
        self.cache, self.room, (self.slots, self.group_size) = cache, room, own_lengths.shape
        self.prompt_lengths, self.own_lengths = prompt_lengths, own_lengths
        slots, heads, members = (
            torch.arange(n, device=own_lengths.device)
            for n in (self.slots, cache.heads, self.group_size)
        )
        # where new keys go, as (slots, K, G) indices of (slots, K, S + G * C, D); a compiler turns
        # a write to a view of these buffers into two copies of all of it
        places = cache.start + members * cache.own_room + own_lengths
        self.places = slots[:, None, None], heads[:, None], places[:, None]
        self.mask = self._block_mask() if cache.as_blocks else None

    def update(self, key, value, layer, kwargs=None):
        """Called as `Prefill.update`: write the new tokens' keys and values, (1, K, B, D)."""
        for buffer, new in ((self.cache.own_keys, key), (self.cache.own_values, value)):
            new = new[0].unflatten(1, (self.slots, -1)).transpose(0, 1)
            buffer[layer][self.places] = new.to(buffer[layer].dtype)
        return key, value

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Group attention of one new token per row, one softmax over prompt and own tokens.

        q: (1, H, B, D). Returns (1, H, B, D). A prompt's keys are read once for its G rows.
        """
        # (slots, K, G, heads that a key-value head serves, D)
        shape = (self.cache.heads, -1, self.slots, self.group_size, q.shape[3])
        q = q[0].view(shape).permute(2, 0, 3, 1, 4)
        attend = self._attend_whole if self.mask is None else self._attend_blocks
        output = attend(q, module.layer_idx, scaling)
        return output.to(v.dtype).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[None]

    def _attend_whole(self, q: Tensor, layer: int, scaling: float) -> Tensor:
        """Attention with fp32 scores in memory. q and result: (slots, K, G, heads, D)."""
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
        """Flex attention over a slot's filled blocks. Shapes as in `_attend_whole`."""
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
        """Which keys of a slot its rows' queries see, and which blocks hold such keys."""
        cache, device = self.cache, self.own_lengths.device
        prompt_room, own_room = cache.prompt_room, cache.own_room
        of_prompt = torch.arange(prompt_room, device=device) < self.prompt_lengths[:, None]
        own = torch.arange(own_room, device=device) <= self.own_lengths[..., None]
        # (slots, S + G * C); `_hold`, as Inductor fails on a cat inside of flex attention
        filled = _hold(torch.cat([of_prompt, own.flatten(1)], dim=1))
        # (slots, 1, 1, blocks): the axes come before argsort and sum, or they have stride 0 in a
        # compiled step, and the kernel for 128 queries reads the wrong slot
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


class _Fused:
    """Linear layers that are called one after the other on the same input, as one matmul.

    Small batches are launch-bound, so fewer and larger products are faster. With LoRA, each layer's
    y = W x + B (s A x) becomes [W B] [x, s A x]: two matmuls for all layers, and one rounding. A
    separate product for B would lose most of a small update in bf16. The layers' parameters become
    views of the fused weight, so copying into them updates it. They get no gradient, and the model
    must not be deepcopied afterwards.
    """

    def __init__(self, *layers: nn.Module):
        self.last, self.sizes = len(layers) - 1, [layer.out_features for layer in layers]
        self.parts, self.bias, self.low = None, None, None
        if layers[0].bias is not None:
            self.bias = torch.cat([layer.bias for layer in layers]).detach()
            _become_views([layer.bias for layer in layers], self.bias.split(self.sizes))
        width, adapters = layers[0].in_features, [m for m in layers if "lora_A" in m._modules]
        ranks = [layer.lora_A.out_features for layer in adapters]
        weight = layers[0].weight
        self.weight = weight.new_zeros(sum(self.sizes), width + sum(ranks)).detach()
        rows = self.weight.split(self.sizes)
        _become_views([layer.weight for layer in layers], [row[:, :width] for row in rows])
        if adapters:
            self.scale = adapters[0].lora_scale
            self.low = weight.new_zeros(sum(ranks), width).detach()
            _become_views([m.lora_A.weight for m in adapters], self.low.split(ranks))
            rows = [rows[number] for number, layer in enumerate(layers) if layer in adapters]
            columns = [row[:, width:].split(ranks, dim=1)[i] for i, row in enumerate(rows)]
            _become_views([m.lora_B.weight for m in adapters], columns)
        for number, layer in enumerate(layers):
            layer._forward_hooks.clear()  # the adapter's, from lora.py
            layer.forward = partial(self.forward, number)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """Layer 0 computes the matmul of all layers; each layer returns its part."""
        if number == 0:
            if self.low is not None:
                x = torch.cat([x, F.linear(x, self.low) * self.scale], dim=-1)
            self.parts = F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        part = self.parts[number]
        if number == self.last:
            self.parts = None
        return part


def _become_views(parameters: list[Tensor], views: Sequence[Tensor]) -> None:
    """Copy each parameter into its view, and replace it by the view."""
    for parameter, view in zip(parameters, views, strict=True):
        view.copy_(parameter)
        parameter.data = view


@torch.no_grad()
def prepare_for_decoding(model: nn.Module) -> None:
    """Fuse projections: fewer kernel launches per step. Idempotent.

    Afterwards the model is for inference only; its parameters may still be written to. Layers other
    than nn.Linear, as in a quantised model, stay as they are.
    """
    if getattr(model, "prepared_for_decoding", False):
        return
    model.prepared_for_decoding = True
    model.model.language_model.rotary_emb.register_forward_hook(_hold_angles)
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        together = [(attention.q_proj, attention.k_proj, attention.v_proj)]
        together += [(mlp.gate_proj, mlp.up_proj), (attention.o_proj,), (mlp.down_proj,)]
        for layers in together:
            plain = all(type(layer) is nn.Linear for layer in layers)
            if plain and (len(layers) > 1 or "lora_A" in layers[0]._modules):
                _Fused(*layers)


@torch.library.custom_op("hoi_r1::hold", mutates_args=())
def _hold(x: Tensor) -> Tensor:
    """Opaque copy; otherwise the compiler recomputes x in every layer."""
    return x.clone()


@_hold.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _hold_angles(module, arguments, angles):
    """Hold the rotary angles, or a compiled step computes sines in every layer."""
    return tuple(_hold(x) for x in angles)
