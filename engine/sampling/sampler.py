"""The sampler: G completions of every prompt of a stream, in slots that do not wait for each other.

Axes as in engine/model/attention.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from engine.model.families import CACHE
from engine.model.packing import Prompt, hidden_states, pack
from engine.sampling.decode_step import DecodeStep, GroupCache, Prefill, prepare_for_decoding
from engine.sampling.draw import penalise, sample_tokens
from hicodet import InputError

PREFILL_PROMPTS = 16  # most prompts per prefill; its activations stay below the update's
LOOK_EVERY = 16  # on a GPU, number of steps before the next check for finished rows


@dataclass(frozen=True)
class Rollout:
    """The G completions of one prompt (CPU tensors)."""

    completion_ids: list[Tensor]  # G of (length,), the closing end-of-turn token included
    logprobs: list[Tensor]  # G of (length,) fp32, of the sampled tokens, at the temperature
    finished: Tensor  # (G,) bool: ended by itself, not cut at max_new_tokens
    entropies: list[Tensor]  # G of (length,) fp32, nats, of each token's distribution


class Sampler:
    """Samples G completions of every prompt of a stream.

    A slot holds a prompt and its G rows, which may differ in length. When all rows of a slot are
    done, the next prompt takes the slot. A step is one function of tensors with fixed addresses and
    reads nothing back, so a GPU compiles it and replays it as a CUDA graph.

    model: in eval mode; on a GPU `prepare_for_decoding` changes it. slots: groups held at a time.
    prompt_room: tokens of the longest prompt. A completion ends with end_id or at max_new_tokens.
    temperature 0 is greedy decoding. banned: (V,) bool, ids that are never sampled.
    repetition_penalty: see `penalise`; 1 is none. Prompt tokens count as written.
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
        repetition_penalty: float = 1.0,
    ):
        def state(*shape, dtype=torch.long):
            return torch.zeros(slots, *shape, dtype=dtype, device=model.device)

        self.model, self.group_size, self.end_id = model, group_size, end_id
        self.prompt_room, self.prefill_prompts = prompt_room, PREFILL_PROMPTS
        self.max_new_tokens, self.temperature, self.banned = max_new_tokens, temperature, banned
        self.cache = GroupCache(model, slots, group_size, prompt_room, max_new_tokens)
        self.prompt_lengths, self.first_positions = state(), state()
        self.ids = state(group_size, max_new_tokens)
        self.logprobs = state(group_size, max_new_tokens, dtype=torch.float32)
        self.entropies = torch.zeros_like(self.logprobs)
        self.uniforms = state(group_size, max_new_tokens, dtype=torch.float32)
        self.counts = state(group_size)  # sampled tokens; all but the last are in the cache
        self.done = state(group_size, dtype=torch.bool).fill_(True)
        self.repetition_penalty, self.written = repetition_penalty, None
        if repetition_penalty != 1:  # which ids occur in a row's prompt and completion
            vocabulary = model.config.text_config.vocab_size
            self.written = state(group_size, vocabulary, dtype=torch.bool)
        self.owners: list[int | None] = [None] * slots  # the prompt in each slot, by its number
        self.active = slots  # number of slots that a step computes, from the first
        self.graph: torch.cuda.CUDAGraph | None = None  # of a step, captured when first needed

    @torch.no_grad()
    def run(
        self, prompts: Iterable[tuple[Prompt, list[int] | None]]
    ) -> Iterator[tuple[int, Rollout]]:
        """Yield each prompt's number and its G completions, in the order in which groups finish.

        prompts: each with the seeds of its G completions, None when greedy; read as slots become
        free. Raises ValueError if a prompt is too long, or has another number of seeds.
        """
        arriving, more, self.active = enumerate(prompts), True, len(self.owners)
        self.owners = [None] * self.active  # an earlier run may have been interrupted
        while True:
            free = self.slots(busy=False)
            if more and len(free) * 4 >= len(self.owners):  # prefill several prompts at a time
                room = min(len(free), PREFILL_PROMPTS)
                taken = list(islice(arriving, room))
                more = len(taken) == room
                self.prefill_all(free, taken)
            elif len(free) == len(self.owners):
                return
            else:
                self.decode(compact=not more)
            yield from self.finish()

    def slots(self, busy: bool) -> list[int]:
        """The slots that hold a prompt, or the free ones."""
        return [slot for slot, owner in enumerate(self.owners) if (owner is not None) == busy]

    def prefill_all(self, slots: list[int], taken: list[tuple]) -> None:
        """Prefill numbered prompts into free slots; fewer at a time if memory runs out."""
        while taken:
            count = min(len(taken), self.prefill_prompts)
            try:
                self.prefill(slots[:count], *zip(*taken[:count]))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise InputError("memory runs out at one prompt: lower --slots") from None
                self.prefill_prompts = count // 2
                continue
            slots, taken = slots[count:], taken[count:]

    def prefill(self, slots: list[int], numbers, arrived) -> None:
        """Prefill prompts into free slots and sample the first token of each of their rows."""
        prompts, seeds = zip(*arrived)
        needed = self.group_size if self.temperature else 0
        if any(len(group or ()) != needed for group in seeds):
            raise ValueError(f"a prompt's {self.group_size} rows need {needed} seeds")
        batch = pack(self.model, list(prompts), [[]] * len(prompts))
        prefix, own = batch.layout.prefix, batch.layout.prompt_lengths
        lengths = tuple(prefix + length for length in own)
        if max(lengths) > self.prompt_room:
            raise ValueError(f"prompt of {max(lengths)} tokens; prompt_room is {self.prompt_room}")
        hidden = hidden_states(self.model, batch, Prefill(self.cache, slots, batch.layout))
        at = torch.tensor(slots, device=hidden.device)
        self.prompt_lengths[at] = torch.tensor(lengths, device=at.device)
        positions = batch.position_ids[:, :, prefix:].split(own, dim=2)
        self.first_positions[at] = torch.stack([of_one.max() for of_one in positions]) + 1
        if self.temperature:  # each row has its own seed, so its slot does not matter
            rows = [torch.Generator().manual_seed(seed) for group in seeds for seed in group]
            uniforms = [torch.rand(self.max_new_tokens, generator=row) for row in rows]
            uniforms = torch.stack(uniforms).view(len(seeds), self.group_size, -1)
            self.uniforms[at] = uniforms.to(at.device)
        self.counts[at], self.done[at] = 0, False
        if self.written is not None:
            self.written[at] = False
            for slot, prompt in zip(slots, prompts):
                self.written[slot, :, prompt.prompt_ids.to(at.device)] = True
        for slot, number in zip(slots, numbers):
            self.owners[slot] = number
        ends = prefix + torch.tensor(own, device=at.device).cumsum(0) - 1
        self.sample_next(at, self.model.lm_head(hidden[ends]).repeat_interleave(self.group_size, 0))

    def step(self, room: int) -> None:
        """Feed the last token of every row and sample the next; rows that are done are discarded.

        room: tokens of the longest row after this step.
        """
        slots = torch.arange(self.active, device=self.counts.device)
        own_lengths = (self.counts[slots] - 1).clamp(min=0)
        step = DecodeStep(self.cache, self.prompt_lengths[slots], own_lengths, room)
        last = self.ids[slots].gather(2, own_lengths[..., None]).view(1, -1)
        positions = (self.first_positions[slots, None] + own_lengths).view(1, 1, -1)
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(last),
            position_ids=positions.expand(3, -1, -1),
            layout=step,
            use_cache=True,
            **{CACHE: step},
        ).last_hidden_state[0]
        self.sample_next(slots, self.model.lm_head(hidden))

    def sample_next(self, slots: Tensor, logits: Tensor) -> None:
        """Sample a token for each row of these slots, and add it to rows that are not done."""
        counts, done = self.counts[slots], self.done[slots]
        members = torch.arange(self.group_size, device=slots.device)
        at = (slots[:, None], members, counts.clamp(max=self.max_new_tokens - 1))
        if self.written is not None:
            written = self.written[slots].flatten(0, 1)
            logits = penalise(logits.float(), written, self.repetition_penalty)
        ids, logprobs, entropies = sample_tokens(
            logits,
            temperature=self.temperature,
            uniforms=self.uniforms[at].flatten() if self.temperature else None,
            banned=self.banned,
        )
        ids, logprobs = ids.view_as(counts), logprobs.view_as(counts)
        self.ids[at] = torch.where(done, self.ids[at], ids)
        self.logprobs[at] = torch.where(done, self.logprobs[at], logprobs)
        self.entropies[at] = torch.where(done, self.entropies[at], entropies.view_as(counts))
        if self.written is not None:
            self.written[slots[:, None], members, ids] |= ~done
        counts = counts + ~done
        self.counts[slots] = counts
        self.done[slots] = done | (ids == self.end_id) | (counts == self.max_new_tokens)

    def decode(self, compact: bool) -> None:
        """One step for every row; on a GPU LOOK_EVERY steps."""
        if self.model.device.type == "cuda":
            self.graph = self.graph or self.capture()
            for _ in range(LOOK_EVERY):
                self.graph.replay()
        else:
            if compact and len(self.slots(busy=True)) * 2 <= self.active:
                self.compact()
            self.step(int(self.counts[self.slots(busy=True)].max()))

    def compact(self) -> None:
        """Move the busy slots to the front and compute no others, as a CPU pays for each row."""
        busy, cache = self.slots(busy=True), self.cache
        cached = [*cache.prompt_keys, *cache.prompt_values, *cache.own_keys, *cache.own_values]
        tensors = [self.prompt_lengths, self.first_positions, self.ids, self.logprobs]
        tensors += [self.entropies, self.uniforms, self.counts, self.done]
        tensors += [] if self.written is None else [self.written]
        for to, slot in enumerate(busy):
            for tensor in (*cached, *tensors) if to != slot else ():
                tensor[to] = tensor[slot]
        free = [None] * (len(self.owners) - len(busy))
        self.owners = [self.owners[slot] for slot in busy] + free
        self.active = len(busy)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Compile a step and record its kernels.

        A later Sampler of the same shapes reuses the compiled code. Too many shapes raise an error;
        no step runs uncompiled. Every row is marked done during warm-up, and the next step
        overwrites what warm-up wrote to the cache.
        """
        prepare_for_decoding(self.model)
        step, done = torch.compile(self.step, dynamic=False, fullgraph=True), self.done.clone()
        self.done.fill_(True)
        for _ in range(2):  # the second call may compile once more
            step(self.max_new_tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(self.max_new_tokens)
        self.done.copy_(done)
        return graph

    def finish(self) -> Iterator[tuple[int, Rollout]]:
        """Free the slots in which every row is done, and yield their completions."""
        done = self.done.all(1).tolist()
        for slot in self.slots(busy=True):
            if done[slot]:
                number, self.owners[slot] = self.owners[slot], None
                lengths = self.counts[slot].tolist()
                ids, logprobs, entropies = (
                    [row[:length].clone() for row, length in zip(rows[slot].cpu(), lengths)]
                    for rows in (self.ids, self.logprobs, self.entropies)
                )
                finished = torch.stack([row[-1] == self.end_id for row in ids])
                yield number, Rollout(ids, logprobs, finished, entropies)

    def collect(self, prompts: list[Prompt], seeds: list[list[int]] | None = None) -> list[Rollout]:
        """The G completions of each prompt, in order. seeds: G per prompt; None when greedy."""
        seeds = [None] * len(prompts) if seeds is None else seeds
        found = dict(self.run(zip(prompts, seeds, strict=True)))
        return [found[number] for number in range(len(prompts))]
