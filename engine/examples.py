"""Samples as the model reads them: prompt, patches, frames; read ahead by worker processes."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil

import hicodet
import rewards
from engine.attention import Prompt
from engine.files import from_model
from engine.pictures import draw_hois
from engine.policy import Ranks

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Example:
    """One image with its question and its ground truth, in the frame of the model."""

    sample: hicodet.Sample
    prompt: Prompt
    model_size: tuple[int, int]  # (width, height) of the image after the processor's resize
    hois: tuple[hicodet.HOI, ...]  # boxes in that frame
    target_ids: Tensor | None  # (C,) what SFT supervises: trace, answer and the end of the turn


class Examples(torch.utils.data.Dataset):
    """Samples turned into Examples, each when it is asked for.

    thinks: None, or for SFT the trace of each file name; an image without one is asked for the
    answer alone.
    """

    def __init__(
        self,
        model: str,
        samples: list[hicodet.Sample],
        thinks: dict[str, str] | None = None,
        *,
        thinking: bool = True,
        task_description: bool = True,
    ):
        self.samples, self.thinks, self.thinking = samples, thinks, thinking
        config = from_model(AutoConfig.from_pretrained, model, "configuration")
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"--model {model}: a {config.model_type}, which is no Qwen2.5-VL")
        self.tokenizer = from_model(AutoTokenizer.from_pretrained, model, "tokenizer")
        # by name: AutoImageProcessor may ask for torchvision, and takes its resize where it is
        self.processor = from_model(
            Qwen2VLImageProcessorPil.from_pretrained, model, "image processor"
        )
        self.image_id = config.image_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        if END_OF_TURN not in self.tokenizer.get_vocab() or not self.tokenizer.chat_template:
            raise ValueError(f"--model {model}: no tokenizer with {END_OF_TURN} and chat template")
        self.questions = {think: self.question(think, task_description) for think in (True, False)}

    def question(self, thinking: bool, task_description: bool) -> Tensor:
        """Ids of Fig. 4 behind one image placeholder, in the model's chat template."""
        text = hicodet.prompt_text(thinking=thinking, task_description=task_description)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        text = self.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False
        )
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"][0]
        if (images := int((ids == self.image_id).sum())) != 1:
            model = self.tokenizer.name_or_path
            raise ValueError(f"--model {model}: its chat template makes {images} placeholders")
        return ids

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> str:
        """How many images these are, and a hash of names, ground truth and traces in this order."""
        digest, thinks = hashlib.sha256(), self.thinks or {}
        for s in self.samples:
            row = (s.file_name, s.width, s.height, s.hois, thinks.get(s.file_name))
            digest.update(repr(row).encode())
        return f"{len(self.samples)} images, {digest.hexdigest()[:16]}"

    def __getitem__(self, index: int) -> Example:
        sample = self.samples[index]
        think = self.thinks.get(sample.file_name) if self.thinks is not None else None
        thinking = self.thinking and (self.thinks is None or think is not None)
        prompt = self.prompt(sample, thinking)
        patches, side = prompt.image_grid_thw[0].tolist(), self.processor.patch_size
        model_size = (patches[2] * side, patches[1] * side)
        hois = tuple(in_model_frame(hoi, sample, model_size) for hoi in sample.hois)
        target = None if self.thinks is None else self.target_ids(hois, think)
        return Example(sample, prompt, model_size, hois, target)

    def prompt(self, sample: hicodet.Sample, thinking: bool) -> Prompt:
        """Image and question, as ids with a placeholder for each image token, and patches."""
        pixels = self.processor(images=read_image(sample), return_tensors="pt")
        grid = pixels["image_grid_thw"]
        ids = self.questions[thinking]
        place = int((ids == self.image_id).nonzero())
        image = torch.full((int(grid.prod()) // self.processor.merge_size**2,), self.image_id)
        ids = torch.cat([ids[:place], image, ids[place + 1 :]])
        return Prompt(ids, pixels["pixel_values"], grid)

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, from the sizes of the images, before any is read."""
        patches = self.processor.get_number_of_image_patches
        most = max(patches(height=s.height, width=s.width) for s in self.samples)
        text = max(len(ids) - 1 for ids in self.questions.values())  # less the placeholder
        return text + most // self.processor.merge_size**2

    def target_ids(self, hois: tuple[hicodet.HOI, ...], think: str | None) -> Tensor:
        """What SFT supervises (Sec. 3.2): `<think>` to the closing end of the turn."""
        text = hicodet.format_completion(hois, think) + END_OF_TURN
        return self.tokenizer(text, return_tensors="pt")["input_ids"][0]

    def decode(self, ids: Tensor) -> str:
        """A completion as text, without the end of the turn."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def banned(self, vocabulary: int) -> Tensor:
        """(V,) bool: special tokens but the end of the turn, and ids that the tokenizer lacks.

        A sampled image token would be read as an image that is not there.
        """
        banned = torch.arange(vocabulary) >= len(self.tokenizer)
        special = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        banned[special] = True
        banned[self.end_id] = False
        return banned


def in_model_frame(hoi: hicodet.HOI, sample: hicodet.Sample, model_size) -> hicodet.HOI:
    """An HOI of the sample with its boxes in the frame that the model sees."""
    sizes = (sample.width, sample.height), model_size
    human, obj = (hicodet.to_model_frame(box, *sizes) for box in (hoi.human, hoi.object))
    return dataclasses.replace(hoi, human=human, object=obj)


def read_image(sample: hicodet.Sample) -> Image.Image:
    """The image as RGB. Raises ValueError naming the file if it is cut or of another size."""
    try:
        with Image.open(sample.path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise ValueError(f"{sample.path}: not a readable image ({error}); fetch it again") from None
    if image.size != (sample.width, sample.height):
        raise ValueError(
            f"{sample.path} is {image.width} x {image.height}, annotated as {sample.width} x "
            f"{sample.height}: images and anno_bbox.mat belong to different data"
        )
    return image


def batch_order(count: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The samples of every step; an epoch takes each sample once, its last batch may be short."""
    order: list[list[int]] = []
    for epoch in range(math.ceil(steps * batch_size / count) + 1):
        samples = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        order += [samples[i : i + batch_size] for i in range(0, count, batch_size)]
    return order[:steps]


class Attempts(torch.utils.data.Dataset):
    """Examples, with the error in the place of one that cannot be read.

    What a worker process raises comes out of a DataLoader wrapped in its traceback.
    """

    def __init__(self, examples: Examples):
        self.examples = examples

    def __getitem__(self, index: int) -> Example | ValueError:
        try:
            return self.examples[index]
        except ValueError as error:
            return error


def read_ahead(examples: Examples, indices: list[int], workers: int) -> Iterator[Example]:
    """The examples in this order, read and resized by worker processes before they are needed."""
    options = {"num_workers": workers, "multiprocessing_context": "fork", "prefetch_factor": 16}
    loader = DataLoader(
        Attempts(examples), sampler=indices, batch_size=None, **(options if workers else {})
    )
    for example in loader:
        if isinstance(example, ValueError):
            raise example
        # copies: what a worker sends holds shared memory and an open file as long as it lives
        prompt = Prompt(*(part.clone() for part in vars(example.prompt).values()))
        yield dataclasses.replace(example, prompt=prompt)


def batches(
    examples: Examples, config, ranks: Ranks, *, done: int, steps: int
) -> Iterator[tuple[int, list[Example], list[float], float]]:
    """This rank's part of the batch of each step from `done` on.

    Yields the step, the part, its weights, and the seconds that were waited for its images.
    """
    order = batch_order(len(examples), config.batch_size, steps, config.seed)
    shares = [ranks.share(batch) for batch in order[done:]]
    stream = read_ahead(examples, [i for share, _ in shares for i in share], config.workers)
    for step, (share, weights) in enumerate(shares, start=done):
        started = time.perf_counter()
        batch = [next(stream) for _ in share]
        yield step, batch, weights, time.perf_counter() - started


def picture(example: Example) -> Image.Image:
    """The image as large as the model sees it, with the boxes that text and rewards speak of."""
    image = read_image(example.sample).resize(example.model_size, Image.Resampling.BICUBIC)
    width, height = example.model_size
    caption = f"{example.sample.file_name}, seen as {width} x {height}"
    return draw_hois(image, example.hois, caption=caption)


def describe(example: Example, examples: Examples, options: dict) -> str:
    """What --dry-run prints: the first prompt, its answer, token counts, and what is supervised.

    options: of the rewards.
    """
    ids, tokenizer = example.prompt.prompt_ids, examples.tokenizer
    images = int((ids == examples.image_id).sum())
    pad = tokenizer.decode([examples.image_id])
    lines = [
        f"--- {example.sample.path}, {example.sample.width} x {example.sample.height} pixels, seen "
        f"by the model as {example.model_size[0]} x {example.model_size[1]}",
        f"--- prompt: {len(ids)} tokens, {images} of them image",
        tokenizer.decode(ids).replace(pad * images, f"{pad} x {images}"),
    ]
    if example.target_ids is None:
        answer = hicodet.format_completion(example.hois, "...")
        completion = hicodet.parse_completion(answer)
        reward = rewards.total_reward(completion, example.hois, **options)
        lines += ["--- a perfect completion and its reward", answer, json.dumps(reward)]
    else:
        tokens = [tokenizer.decode([i]) for i in example.target_ids.tolist()]
        lines += [
            f"--- supervised: these {len(tokens)} tokens, and none of the prompt",
            " | ".join(tokens),
        ]
    return "\n".join(lines)
