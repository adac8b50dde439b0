"""What a stage shows of its first example: the text of --dry-run, and first_sample.png."""

import json
from collections.abc import Callable

from PIL import Image

import hicodet
from engine.data.examples import Example, Examples
from engine.data.images import read_image
from engine.report import drawing

LEAST_WIDTH = 640  # pixels; labels on a narrower picture cannot be read


def picture(example: Example) -> Image.Image:
    """The image at the size that the model sees, with the boxes of the text."""
    size = example.model_size
    image = read_image(example.sample).resize(size, Image.Resampling.BICUBIC)
    hois = [hicodet.in_frame(hoi, example.text_size, size) for hoi in example.text_hois]
    caption = f"{example.sample.file_name}, seen as {size[0]} x {size[1]}"
    wide = max(image.width, LEAST_WIDTH)
    return drawing.draw_pairs(image, hois, range(len(hois)), width=wide, caption=caption)


def describe(
    examples: Examples, example: Example, reward: Callable[[str, tuple], dict] | None = None
) -> str:
    """The text of --dry-run: the prompt, its token counts, and what is supervised or rewarded.

    reward(text, hois): the rewards of a completion; None if there is no ground truth.
    """
    decode, ids, sample = examples.tokenizer.decode, example.prompt.prompt_ids, example.sample
    images, pad = int((ids == examples.image_id).sum()), decode([examples.image_id])
    width, height = example.model_size
    lines = [
        f"--- {sample.path}, {sample.width} x {sample.height} pixels, "
        f"seen by the model as {width} x {height}",
        f"--- prompt: {len(ids)} tokens, {images} of them image",
        decode(ids).replace(pad * images, f"{pad} x {images}"),
    ]
    if example.target_ids is not None:
        tokens = [decode([i]) for i in example.target_ids.tolist()]
        lines.append(f"--- supervised: these {len(tokens)} tokens, and none of the prompt")
        lines.append(" | ".join(tokens))
    elif reward:
        answer = hicodet.format_completion(example.text_hois, "...")
        lines += ["--- a perfect completion and its reward", answer]
        lines.append(json.dumps(reward(answer, example.text_hois)))
    return "\n".join(lines)
