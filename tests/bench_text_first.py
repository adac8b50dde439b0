"""What `--text-first` saves in an update, a prefill and a prediction.

    python -m tests.bench text-first --model-size tiny-long

Both sides do the same work; only the order of text and image differs.
"""

from dataclasses import replace

import torch

from engine.model.packing import Prompt, pack, token_logprobs
from engine.model.policy import compute_dtype
from engine.sampling.sampler import Sampler
from tests.bench_measure import Result, Runs, measure, result
from tests.bench_models import ORDINARY, Size, random_completions, random_model, random_prompts

AFTER = 6  # tokens of text after the image, as in the chat template
BUDGET = 16384  # --tokens-per-microbatch
IMAGES = 32  # of a prediction; a prefill has half of them


def text_first(model, prompts: list[Prompt]) -> list[Prompt]:
    """The same prompts with the image before the last tokens of their text."""
    ids = prompts[0].prompt_ids
    inside = (ids == model.config.image_token_id) | (ids == model.config.vision_start_token_id)
    text, image = ids[~inside], ids[inside]
    ids = torch.cat([text[:-AFTER], image, text[-AFTER:]])
    return [replace(prompt, prompt_ids=ids) for prompt in prompts]


def groups_of_a_row(size: Size) -> dict[str, int]:
    """How many prompts with their completions fit into BUDGET, for each order."""
    own, shared = size.group_size * size.trained, size.text_tokens - AFTER
    rest = size.prompt_length - shared + own
    return {"text_first": (BUDGET - shared) // rest, "image_first": BUDGET // (rest + shared)}


def bench_text_first(size: Size, device: torch.device, runs: Runs) -> Result:
    """The update of a batch, the prefill of 16 prompts and the prediction of 32 images."""
    model = random_model(size, device, compute_dtype(device))
    completions = random_completions(size.prompts, size.group_size, size.trained)
    banned = (torch.arange(model.config.text_config.vocab_size) >= ORDINARY).to(device)
    options = {"prompt_room": size.prompt_length, "end_id": -1, "banned": banned}
    options |= {"group_size": 1, "temperature": 0}
    prefill = Sampler(model, slots=IMAGES // 2, max_new_tokens=1, **options)
    predict = Sampler(model, slots=IMAGES // 4, max_new_tokens=size.sampled, **options)
    prompts, groups = {"image_first": random_prompts(model, size, IMAGES)}, groups_of_a_row(size)
    prompts["text_first"] = text_first(model, prompts["image_first"])

    def update(order: str) -> None:
        model.train().zero_grad()
        for first in range(0, size.prompts, groups[order]):
            some = slice(first, min(first + groups[order], size.prompts))
            row = pack(model, prompts[order][some], completions[some])
            token_logprobs(model, row).mean().backward()
        model.eval()

    work = {}
    for order in groups:
        work[f"prefill_{order}"] = lambda o=order: prefill.collect(prompts[o][: IMAGES // 2])
        work[f"predict_{order}"] = lambda o=order: predict.collect(prompts[o])
    measured = measure(
        device, runs, **work, ours=lambda: update("text_first"),
        baseline=lambda: update("image_first"),
    )  # fmt: skip
    details = {
        f"{what}_ratio": measured[f"{what}_image_first"][0] / measured[f"{what}_text_first"][0]
        for what in ("prefill", "predict")
    }
    return result(device, measured, "update, text first / image first", **details)
