"""The slow and obvious way: prompts of random tokens, plain forwards, the library's decoding."""

import torch

import engine.model.attention
import engine.model.packing
import engine.sampling.sampler


def text_ids(model, length, generator):
    """Random ids of ordinary tokens: special ones come last in the vocabulary."""
    special = min(model.config.image_token_id, model.config.vision_start_token_id, 300)
    return torch.randint(special, (length,), generator=generator)


def make_prompt(model, rows, columns, before, after, generator):
    """A prompt with an image of rows x columns merged patches and random text around it."""
    image = torch.full((rows * columns,), model.config.image_token_id)
    ids = torch.cat(
        [text_ids(model, before, generator), image, text_ids(model, after, generator)]
    )
    pixels = torch.randn(rows * columns * 4, 3 * 2 * 14 * 14, generator=generator)
    return engine.model.packing.Prompt(ids, pixels, torch.tensor([[1, rows * 2, columns * 2]]))


def plain_logprobs(reference, prompt, completion, *options, **named):
    """log-probs of one completion. options: temperature and banned of `plain_distributions`."""
    logprobs = plain_distributions(reference, prompt, completion, *options, **named)
    return logprobs[torch.arange(len(completion)), completion]


def plain_distributions(reference, prompt, completion, temperature=1.0, banned=None):
    """(C, V) log-probs of all ids by one ordinary forward over prompt + completion."""
    ids = torch.cat([prompt.prompt_ids, completion])[None]
    logits = reference(
        input_ids=ids,
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == reference.config.image_token_id).int(),
        attention_mask=torch.ones_like(ids),
    ).logits[0, len(prompt.prompt_ids) - 1 : -1]
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    return torch.log_softmax(logits.float() / temperature, -1)


def generate(reference, prompt, max_new_tokens, end_id, **options):
    """The library's own greedy decoding of one prompt. options: of its generate()."""
    ids = prompt.prompt_ids[None]
    output = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(ids == reference.config.image_token_id).int(),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_id,
        pad_token_id=0,
        **options,
    )
    return output[0, ids.shape[1] :]


def collect(sampler, prompts, seeds=None):
    """The completions of all prompts in one Rollout, prompt after prompt. seeds: one each."""
    size = sampler.group_size
    groups = seeds and [seeds[i : i + size] for i in range(0, len(seeds), size)]
    found = sampler.collect(prompts, groups)
    return engine.sampling.sampler.Rollout(
        [ids for group in found for ids in group.completion_ids],
        [logprobs for group in found for logprobs in group.logprobs],
        torch.cat([group.finished for group in found]),
        [entropies for group in found for entropies in group.entropies],
    )


def sample(model, prompts, *, seeds=None, slots=64, **options):
    """As `collect`, with a sampler of its own."""
    room = max(len(prompt.prompt_ids) for prompt in prompts)
    slots = min(slots, len(prompts))
    sampler = engine.sampling.sampler.Sampler(model, slots=slots, prompt_room=room, **options)
    return collect(sampler, prompts, seeds)
