"""Samples as model inputs: prompt, patches, boxes in the text's frame.

Axes: S prompt length, C completion length, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

import hicodet
from engine.data.images import read_image, too_long
from engine.files import read_object
from engine.model.families import FAMILIES
from engine.model.model_files import read_from_model, read_model_config
from engine.model.packing import Prompt
from engine.options import flag_of
from hicodet import InputError

END_OF_TURN = "<|im_end|>"
PROMPT_FILE = "prompt.json"  # of an exported folder: the prompt options of its training
BOX_FRAMES = ("model", "original", "thousand")


@dataclass(frozen=True)
class PromptOptions:
    """Prompt options, recorded in the folders that trainings export."""

    thinking: bool = True  # off: an ablation of Table 2, as for the next field
    task_description: bool = True
    box_frame: str = "model"  # units of boxes in text; one of BOX_FRAMES
    text_first: bool = False  # the image after the text, unlike the authors' prompt


def prompt_options(model: str, adapter: str, **asked) -> PromptOptions:
    """The prompt options: those in `asked`, else those of the model's training, or its family's.

    adapter: folder of a LoRA adapter, or ""; its prompt.json is used before the model's. asked:
    fields of PromptOptions, None if not given. Raises InputError if one contradicts the training.
    """
    trained, files = {}, [Path(folder) / PROMPT_FILE for folder in (adapter, model) if folder]
    if path := next(filter(Path.is_file, files), None):
        trained = read_object(path)
        unknown = trained.keys() - vars(PromptOptions()).keys()
        if unknown or trained.get("box_frame", "model") not in BOX_FRAMES:
            raise InputError(f"{path}: not the prompt options of this project")
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if trained.get(name, value) != value:
            switch = flag_of(name) if value else flag_of(f"no_{name}")
            said = f"{flag_of(name)} {value}" if name == "box_frame" else switch
            raise InputError(f"{said}: {path.parent} was not trained with it; leave the option out")
    taught = {"box_frame": FAMILIES[read_model_config(model).model_type].box_frame}
    return PromptOptions(**taught | trained | given)


@dataclass(frozen=True)
class Example:
    """One image with its prompt and its ground truth."""

    sample: hicodet.Sample
    prompt: Prompt
    model_size: tuple[int, int]  # (width, height) of the image after the processor's resize
    text_size: tuple[int, int]  # (width, height) in the text's frame (--box-frame)
    text_hois: tuple[hicodet.HOI, ...]  # boxes in the text's frame
    target_ids: Tensor | None  # (C,) supervised by SFT


class Examples(Dataset):
    """Samples as Examples, each made when it is needed.

    model: folder or hub name, for its tokenizer and image processor. thinks: for SFT the trace of
    each file name; the prompt of an image without one asks for the answer alone.
    target_text(hois, think): the text that SFT supervises; None: no target. upright: rotate images
    by their EXIF data, which is right for photographs and wrong for HICO-DET, whose boxes are in
    stored pixels.
    """

    def __init__(
        self,
        model: str,
        samples: list[hicodet.Sample],
        options: PromptOptions = PromptOptions(),
        *,
        thinks: dict[str, str] | None = None,
        target_text: Callable[[tuple, str | None], str] | None = None,
        upright: bool = False,
    ):
        self.samples, self.options, self.thinks = samples, options, thinks
        self.target_text, self.upright = target_text, upright
        self.config = read_model_config(model)
        self.tokenizer = read_tokenizer(model)
        # not AutoImageProcessor, which needs torchvision and lets it resize
        self.processor = read_from_model(
            Qwen2VLImageProcessorPil.from_pretrained, model, "image processor"
        )
        require_one_model(model, self.config, self.tokenizer, self.processor)
        self.image_id = self.config.image_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        switch = {"task_description": options.task_description}
        self.questions = {
            thinking: self.question(hicodet.prompt_text(thinking=thinking, **switch), model)
            for thinking in (True, False)
        }

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> str:
        """The number of images, and a hash of their names, ground truth and traces."""
        digest, thinks = hashlib.sha256(), self.thinks or {}
        for s in self.samples:
            row = (s.file_name, s.width, s.height, s.hois, thinks.get(s.file_name))
            digest.update(repr(row).encode())
        return f"{len(self.samples)} images, {digest.hexdigest()[:16]}"

    def __getitem__(self, index: int) -> Example:
        sample = self.samples[index]
        think = self.thinks.get(sample.file_name) if self.thinks is not None else None
        thinking = self.options.thinking and (self.thinks is None or think is not None)
        prompt = self.prompt(sample, thinking)
        patches, side = prompt.image_grid_thw[0].tolist(), self.processor.patch_size
        model_size = (patches[2] * side, patches[1] * side)
        original = (sample.width, sample.height)
        sizes = {"model": model_size, "original": original, "thousand": (1000, 1000)}
        size = sizes[self.options.box_frame]
        hois = tuple(hicodet.in_frame(hoi, original, size) for hoi in sample.hois)
        target = self.token_ids(self.target_text(hois, think)) if self.target_text else None
        return Example(sample, prompt, model_size, size, hois, target)

    def prompt(self, sample: hicodet.Sample, thinking: bool) -> Prompt:
        """The prompt of an image, with a placeholder for each image token, and its patches."""
        pixels = self.processor(images=read_image(sample, self.upright), return_tensors="pt")
        grid, ids = pixels["image_grid_thw"], self.questions[thinking]
        place = int((ids == self.image_id).nonzero())
        image = torch.full((int(grid.prod()) // self.processor.merge_size**2,), self.image_id)
        ids = torch.cat([ids[:place], image, ids[place + 1 :]])
        return Prompt(ids, pixels["pixel_values"], grid)

    def question(self, text: str, model: str) -> Tensor:
        """(S',) ids of the user turn, with one image placeholder before or after the text.

        Raises InputError if the chat template makes another number of placeholders, or opens
        <think>.
        """
        content = [{"type": "image"}, {"type": "text", "text": text}]
        content = content[::-1] if self.options.text_first else content
        message, apply = {"role": "user", "content": content}, self.tokenizer.apply_chat_template
        options = {"add_generation_prompt": True, "tokenize": False}
        text = read_from_model(lambda _: apply([message], **options), model, "chat template")
        if text.rstrip().endswith("<think>"):
            raise InputError(
                f"--model {model}: its chat template opens <think> itself, as Thinking weights do; "
                "take the Instruct weights of this model"
            )
        ids = self.token_ids(text)
        if (images := int((ids == self.image_id).sum())) != 1:
            raise InputError(
                f"--model {model}: its chat template makes {images} placeholders of image_token_id "
                f"{self.image_id}"
            )
        return ids

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, from the annotated sizes of the images."""
        text = max(len(ids) - 1 for ids in self.questions.values())  # less the placeholder
        patches = self.processor.get_number_of_image_patches
        usable = [s for s in self.samples if not too_long(s.width, s.height)]
        most = max((patches(height=s.height, width=s.width) for s in usable), default=0)
        return text + most // self.processor.merge_size**2

    def token_ids(self, text: str) -> Tensor:
        """(C,) ids of a text."""
        return self.tokenizer(text, return_tensors="pt")["input_ids"][0]

    def decode(self, ids: Tensor) -> str:
        """A completion's text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def banned(self, vocabulary: int) -> Tensor:
        """(V,) bool: special tokens except the end of the turn, and ids without a token.

        The model would look for the image of a sampled image token.
        """
        banned = torch.arange(vocabulary) >= len(self.tokenizer)
        special = [i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        banned[special] = True
        banned[self.end_id] = False
        return banned


def read_tokenizer(model: str):
    """A model's tokenizer with its chat template, which older folders keep in a separate file.

    Raises InputError naming what is missing.
    """
    tokenizer = read_from_model(AutoTokenizer.from_pretrained, model, "tokenizer")
    apart = Path(model) / "chat_template.json"
    if not tokenizer.chat_template and apart.is_file():
        tokenizer.chat_template = read_object(apart).get("chat_template")
    if END_OF_TURN not in tokenizer.get_vocab() or not tokenizer.chat_template:
        raise InputError(f"--model {model}: no tokenizer with {END_OF_TURN} and chat template")
    return tokenizer


def require_one_model(model: str, config, tokenizer, processor) -> None:
    """Raise InputError if a model's parts do not belong together."""
    vision, room = config.vision_config, config.text_config.vocab_size
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    for name, takes in sizes.items():
        if (has := getattr(processor, name)) != takes:
            raise InputError(
                f"--model {model}: {name} is {has} in preprocessor_config.json, and {takes} in "
                "config.json"
            )
    if len(tokenizer) > room:
        raise InputError(
            f"--model {model}: the tokenizer has {len(tokenizer)} tokens, and vocab_size is {room} "
            "in config.json: they belong to different models"
        )
