"""Samples as the model reads them: prompt, patches, boxes in the text's frame; read ahead.

Axes: S prompt length, C completion length, V vocabulary.
"""

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

import hicodet
from engine.files import read_from_model, read_image, read_object
from engine.model.attention import Prompt
from engine.model.model_files import read_config
from engine.model.policy import Ranks
from engine.report import drawing
from hicodet import InputError

END_OF_TURN = "<|im_end|>"
FRAME_FILE = "box_frame.json"  # in an exported folder
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
LAST_SECONDS = 10  # of an image worker after SIGTERM, which torchrun sends to it too


@dataclass(frozen=True)
class Example:
    """One image with its question and its ground truth."""

    sample: hicodet.Sample
    prompt: Prompt
    model_size: tuple[int, int]  # (width, height) of the image after the processor's resize
    text_size: tuple[int, int]  # of the image whose pixels the text counts, by --box-frame
    text_hois: tuple[hicodet.HOI, ...]  # boxes in pixels of that image
    target_ids: Tensor | None  # (C,) what SFT supervises


class Examples(Dataset):
    """Samples turned into Examples, each when it is asked for.

    thinking: whether the prompt asks for reasoning. thinks: for SFT the trace of each file name; an
    image without one is asked for the answer alone. prompt_text(thinking=) is the text of the user
    turn, target_text(hois, think) what SFT supervises (None: no targets). box_frame: "model" or
    "original", None for that of the model's folder. upright: turn images as their EXIF data says,
    which holds for photographs and not for HICO-DET, whose boxes are in stored pixels. bad: why an
    image, by file name, cannot be used; `left_out` are the indices of these.
    """

    def __init__(
        self,
        model: str,
        samples: list[hicodet.Sample],
        *,
        thinking: bool = True,
        thinks: dict[str, str] | None = None,
        prompt_text: Callable[..., str] = hicodet.prompt_text,
        target_text: Callable[[tuple, str | None], str] | None = None,
        box_frame: str | None = None,
        upright: bool = False,
        bad: dict[str, str] | None = None,
    ):
        self.samples, self.thinking, self.thinks = samples, thinking, thinks
        self.bad = bad or {}
        self.left_out = {i for i, s in enumerate(samples) if s.file_name in self.bad}
        self.upright = upright
        self.target_text, self.box_frame = target_text, box_frame_of(model, box_frame)
        self.config = config = read_config(model)
        if config.model_type != "qwen2_5_vl":
            raise InputError(f"--model {model}: a {config.model_type}, which is no Qwen2.5-VL")
        self.tokenizer = read_from_model(AutoTokenizer.from_pretrained, model, "tokenizer")
        # by name: AutoImageProcessor may ask for torchvision, and takes its resize where it is
        self.processor = read_from_model(
            Qwen2VLImageProcessorPil.from_pretrained, model, "image processor"
        )
        self.image_id = config.image_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        if END_OF_TURN not in self.tokenizer.get_vocab() or not self.tokenizer.chat_template:
            raise InputError(f"--model {model}: no tokenizer with {END_OF_TURN} and chat template")
        self.require_sizes(model)

        def questions(_) -> dict[bool, Tensor]:
            return {think: self.question(prompt_text(thinking=think)) for think in (True, False)}

        self.questions = read_from_model(questions, model, "chat template")

    def require_sizes(self, model: str) -> None:
        """Raise InputError if the image processor fails or cuts other patches than the model, or if
        the tokenizer has more tokens."""
        vision, ours = self.config.vision_config, self.processor
        for name, takes in {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }.items():
            if (has := getattr(ours, name)) != takes or type(has) is not int or has < 1:
                raise InputError(
                    f"--model {model}: {name} is {has!r} in preprocessor_config.json, and "
                    f"{takes!r} in config.json"
                )
        if len(self.tokenizer) > (room := self.config.text_config.vocab_size):
            raise InputError(
                f"--model {model}: the tokenizer has {len(self.tokenizer)} tokens, and vocab_size "
                f"is {room} in config.json: they belong to different models"
            )
        grey = Image.new("RGB", (64, 64))
        read_from_model(lambda _: ours(images=grey, return_tensors="pt"), model, "image processor")

    def question(self, text: str) -> Tensor:
        """Ids of the user turn behind one image placeholder, in the model's chat template."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        text = self.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False
        )
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"][0]
        if (images := int((ids == self.image_id).sum())) != 1:
            model = self.tokenizer.name_or_path
            raise InputError(
                f"--model {model}: its chat template makes {images} placeholders "
                f"of image_token_id {self.image_id}"
            )
        return ids

    def __len__(self) -> int:
        return len(self.samples)

    def first(self) -> Example:
        """The first example that is not left out."""
        return self[next(i for i in range(len(self)) if i not in self.left_out)]

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
        size = model_size if self.box_frame == "model" else (sample.width, sample.height)
        hois = tuple(hicodet.in_text_frame(hoi, sample, size) for hoi in sample.hois)
        target = self.token_ids(self.target_text(hois, think)) if self.target_text else None
        return Example(sample, prompt, model_size, size, hois, target)

    def prompt(self, sample: hicodet.Sample, thinking: bool) -> Prompt:
        """Image and question, as ids with a placeholder for each image token, and patches."""
        pixels = self.processor(images=read_image(sample, self.upright), return_tensors="pt")
        grid = pixels["image_grid_thw"]
        ids = self.questions[thinking]
        place = int((ids == self.image_id).nonzero())
        image = torch.full((int(grid.prod()) // self.processor.merge_size**2,), self.image_id)
        ids = torch.cat([ids[:place], image, ids[place + 1 :]])
        return Prompt(ids, pixels["pixel_values"], grid)

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, from the sizes of the images, before any is read."""
        text = max(len(ids) - 1 for ids in self.questions.values())  # less the placeholder
        return text + self.most_patches() // self.processor.merge_size**2

    def most_patches(self) -> int:
        """Patches of the largest image, likewise."""
        patches = self.processor.get_number_of_image_patches
        return max(patches(height=s.height, width=s.width) for s in self.samples)

    def token_ids(self, text: str) -> Tensor:
        """(C,) ids of a text."""
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


def box_frame_of(model: str, asked: str | None) -> str:
    """The frame of boxes in text: what is asked for, else what the model's folder was trained in.

    Raises InputError if the two contradict each other.
    """
    path = Path(model) / FRAME_FILE
    if not path.is_file():
        return asked or "model"
    trained = read_object(path).get("box_frame")
    if trained not in ("model", "original"):
        raise InputError(f'{path} is damaged: box_frame is {trained!r}, not "model" or "original"')
    if asked and asked != trained:
        raise InputError(f"--box-frame {asked}: {model} was trained with {trained}; leave it out")
    return trained


def batch_order(
    count: int, batch_size: int, steps: int, seed: int, left_out: Collection[int] = ()
) -> list[list[int]]:
    """The samples of every step; an epoch takes each sample once, its last batch may be short.

    left_out: samples that are taken out of the order, which the others keep.
    """
    order: list[list[int]] = []
    kept = count - len(left_out)
    for epoch in range(math.ceil(steps * batch_size / kept) + 1):
        samples = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        samples = [sample for sample in samples if sample not in left_out]
        order += [samples[i : i + batch_size] for i in range(0, kept, batch_size)]
    return order[:steps]


def _example_or_error(examples: Examples, index: int) -> Example | InputError:
    """DataLoader puts a worker's traceback into the message of what it raises; returned, it is
    one line."""
    try:
        return examples[index]
    except InputError as error:
        return error


def _start_worker(parent: int, worker: int) -> None:
    """Let the parent finish its step at a signal, but end with it: a worker holds its lock too.

    Left alone it would wait for ever to hand over its images. On other systems than Linux it may.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)


def read_ahead(
    examples: Examples, indices: list[int], workers: int
) -> Iterator[Example | InputError]:
    """The examples in this order, read and resized by worker processes before they are needed.

    In the place of one whose image cannot be used comes the error that says why.
    """
    options = {"num_workers": workers, "multiprocessing_context": "fork", "prefetch_factor": 16}
    options["worker_init_fn"] = partial(_start_worker, os.getpid())
    loader = DataLoader(
        indices,
        batch_size=None,
        collate_fn=partial(_example_or_error, examples),
        **(options if workers else {}),
    )
    for example in loader:
        if isinstance(example, Example):
            # copies: what a worker sends holds shared memory and an open file as long as it lives
            prompt = Prompt(*(part.clone() for part in vars(example.prompt).values()))
            example = dataclasses.replace(example, prompt=prompt)
        yield example


def usable(example: Example | InputError) -> Example:
    """The example. Raises the error that came in its place."""
    if isinstance(example, InputError):
        raise example
    return example


def batches(
    examples: Examples,
    ranks: Ranks,
    *,
    batch_size: int,
    steps: int,
    done: int,
    seed: int,
    workers: int,
) -> Iterator[tuple[int, list[Example], list[float], float]]:
    """This rank's share of the batch of each step from `done` on.

    Yields the step, the share, its weights, and the seconds that were waited for its images.
    Raises InputError naming an image that cannot be used.
    """
    order = batch_order(len(examples), batch_size, steps, seed, examples.left_out)
    shares = [ranks.share(batch) for batch in order[done:]]
    stream = read_ahead(examples, [i for share, _ in shares for i in share], workers)
    for step, (share, weights) in enumerate(shares, start=done):
        started = time.perf_counter()
        batch = [usable(next(stream)) for _ in share]
        yield step, batch, weights, time.perf_counter() - started


def picture(example: Example) -> Image.Image:
    """The image in the frame of the text, with the boxes that text and rewards speak of.

    Narrow ones are enlarged to 640 pixels, where labels can be read.
    """
    image = read_image(example.sample).resize(example.text_size, Image.Resampling.BICUBIC)
    hois, (width, height) = example.text_hois, example.model_size
    caption = f"{example.sample.file_name}, seen as {width} x {height}"
    wide = max(image.width, 640)
    return drawing.draw_pairs(image, hois, range(len(hois)), width=wide, caption=caption)


def describe(examples: Examples, reward: Callable[[str, tuple], dict] | None = None) -> str:
    """What --dry-run prints: the first prompt, its answer, token counts, and what is supervised.

    reward(text, hois): of a completion; None where there is no ground truth.
    """
    example, tokenizer = examples.first(), examples.tokenizer
    ids = example.prompt.prompt_ids
    images = int((ids == examples.image_id).sum())
    pad, (width, height) = tokenizer.decode([examples.image_id]), example.model_size
    lines = [
        f"--- {example.sample.path}, {example.sample.width} x {example.sample.height} pixels, "
        f"seen by the model as {width} x {height}",
        f"--- prompt: {len(ids)} tokens, {images} of them image",
        tokenizer.decode(ids).replace(pad * images, f"{pad} x {images}"),
    ]
    if example.target_ids is not None:
        tokens = [tokenizer.decode([i]) for i in example.target_ids.tolist()]
        head = f"--- supervised: these {len(tokens)} tokens, and none of the prompt"
        return "\n".join([*lines, head, " | ".join(tokens)])
    if reward is None:
        return "\n".join(lines)
    answer = hicodet.format_completion(example.text_hois, "...")
    lines += ["--- a perfect completion and its reward", answer]
    return "\n".join([*lines, json.dumps(reward(answer, example.text_hois))])
