"""Tiny models and random prompts, and slow references: plain forwards, the library's decoding."""

import json
from dataclasses import replace

import torch
from transformers import AutoConfig

import engine.model.attention
import engine.model.packing
import engine.sampling.sampler
from demo import toy
from engine.model.families import FAMILIES
from tests.bench_models import library_inputs

VISION = {"depth": 4, "num_heads": 2, "initializer_range": 0.08}
FAMILY_SIZES = {  # by model type: fields of the language model and of the vision tower
    "qwen2_vl": (
        {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    ),
    "qwen3_vl": (  # wide heads, DeepStack, learned positions, patches of 16
        {"head_dim": 32, "rope_parameters": {
            "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        {"hidden_size": 32, "intermediate_size": 48, "patch_size": 16, "out_hidden_size": 64,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
    ),
}  # fmt: skip


def family_config(family):
    """The configuration of a tiny model of a family, with the toy's token ids."""
    known = toy.model_config(toy.toy_tokenizer(), toy.TINY_SIZES)
    if family == "qwen2_5_vl":
        return known
    names = {*toy.TINY_SIZES["text"], "vocab_size", "max_position_embeddings", "initializer_range"}
    names |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    text = {name: getattr(known.text_config, name) for name in names} | {"num_hidden_layers": 4}
    more, vision = FAMILY_SIZES[family]
    rope = {"rope_type": "default", **more["rope_parameters"]}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return AutoConfig.for_model(
        family, text_config=text | more | {"rope_parameters": rope}, vision_config=VISION | vision,
        tie_word_embeddings=True, **{name: getattr(known, name) for name in ids},
    )  # fmt: skip


def family_model(family, seed):
    """A tiny random model of a family. Its biases are not 0, and its norms are not 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = FAMILIES[family].model(family_config(family)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write_family(folder, family):
    """A folder with a tiny model of a family, the toy's tokenizer and an image processor."""
    model = family_model(family, seed=0)
    model.save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    processor = toy.IMAGE_PROCESSOR | {"patch_size": model.config.vision_config.patch_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def text_ids(model, length, generator):
    """Random ids of ordinary tokens; special tokens come last in the vocabulary."""
    special = min(model.config.image_token_id, model.config.vision_start_token_id, 300)
    return torch.randint(special, (length,), generator=generator)


def make_prompt(model, rows, columns, before, after, generator):
    """A prompt with an image of rows x columns merged patches and random text around it."""
    image = torch.full((rows * columns,), model.config.image_token_id)
    ids = torch.cat(
        [text_ids(model, before, generator), image, text_ids(model, after, generator)]
    )
    side = model.config.vision_config.patch_size
    pixels = torch.randn(rows * columns * 4, 3 * 2 * side * side, generator=generator)
    return engine.model.packing.Prompt(ids, pixels, torch.tensor([[1, rows * 2, columns * 2]]))


def plain_logprobs(reference, prompt, completion, *options, **named):
    """Log-probs of one completion. options: temperature and banned of `plain_distributions`."""
    logprobs = plain_distributions(reference, prompt, completion, *options, **named)
    return logprobs[torch.arange(len(completion)), completion]


def plain_distributions(reference, prompt, completion, temperature=1.0, banned=None):
    """(C, V) log-probs of all ids by one ordinary forward over prompt + completion."""
    row = replace(prompt, prompt_ids=torch.cat([prompt.prompt_ids, completion]))
    logits = reference(**library_inputs(reference, [row], copies=1)).logits
    logits = logits[0, len(prompt.prompt_ids) - 1 : -1]
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    return torch.log_softmax(logits.float() / temperature, -1)


def generate(reference, prompt, max_new_tokens, end_id, **options):
    """The library's own greedy decoding of one prompt. options: of its generate()."""
    options |= {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": end_id}
    inputs = library_inputs(reference, [prompt], copies=1)
    output = reference.generate(**inputs, pad_token_id=0, **options)
    return output[0, len(prompt.prompt_ids) :]


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
    """As `collect`, with a new sampler."""
    room = max(len(prompt.prompt_ids) for prompt in prompts)
    slots = min(slots, len(prompts))
    sampler = engine.sampling.sampler.Sampler(model, slots=slots, prompt_room=room, **options)
    return collect(sampler, prompts, seeds)
