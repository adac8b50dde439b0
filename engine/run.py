"""HOI-R1: supervised fine-tuning, GRPO with HOI rewards, prediction (Secs. 3.2, 3.3, 4.2).

    torchrun --nproc_per_node 8 hoi_r1.py sft --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --data hico_20160224_det --traces traces.jsonl --out runs/sft
    torchrun --nproc_per_node 8 hoi_r1.py grpo --model runs/sft/model --data ... --out runs/grpo
    torchrun --nproc_per_node 8 hoi_r1.py predict --model runs/grpo/model --data ... --out runs/test
    python evaluate.py runs/test/predictions.jsonl --data hico_20160224_det
    python hoi_r1.py demo            # all of it on a drawn data set, on a laptop

Plain `python` runs one process. Three policies: pi_theta in fp32, sharded over the ranks by FSDP2
and computing in bf16 on a GPU; pi_old, a replica on every rank in the dtype of computation, which
samples and is refreshed after each batch; pi_ref, frozen, only where --kl-coef is above 0.

Data order and sampling seeds are pure functions of (seed, step, place in the batch), and losses are
divided by counts over all ranks and micro-batches: world size and `--resume` do not change the run.
"""

import argparse
import codecs
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import evaluate
import hicodet
import rewards
import teacher


def option(default, text: str, least: float | None = None, below: float = math.inf):
    """A field of a Config, which checks the bounds; `add_options` turns it into a flag."""
    return field(default=default, metadata={"help": text, "least": least, "below": below})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of a stage, each within its bounds."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            least, value = f.metadata.get("least"), getattr(self, f.name)
            if least is None:
                continue
            flag, below = f"--{f.name.replace('_', '-')} {value}", f.metadata["below"]
            if not value >= least:
                raise ValueError(f"{flag}: must be at least {least}")
            if not value < below:
                raise ValueError(f"{flag}: must be below {below}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """What every stage is told."""

    model: str = field(metadata={"help": "folder or hub name of a Qwen2.5-VL model (safetensors)"})
    data: str = field(metadata={"help": "folder of hico_20160224_det: anno_bbox.mat, images/"})
    out: str = field(metadata={"help": "folder for all that the run writes"})
    seed: int = option(0, "of data order and sampling", least=0)
    thinking: bool = option(True, "prompt with the Thinking Process (Table 2)")
    task_description: bool = option(True, "prompt with the valid classes (Table 2)")
    workers: int = option(2, "processes of a rank that read images; 0: the rank itself", least=0)
    dry_run: bool = option(False, "print the first sample as the model would see it, and stop")
    resume: bool = option(False, "go on with the run in --out, from its last checkpoint or image")

    def prompt_switches(self) -> dict[str, bool]:
        """The ablations of Table 2."""
        return {"thinking": self.thinking, "task_description": self.task_description}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What both trainings are told; defaults are Sec. 4.2, or the README's table of readings."""

    learning_rate: float = option(1e-6, "of AdamW, at its highest", least=0)
    warmup_steps: int = option(0, "steps over which the learning rate rises", least=0)
    adam_beta2: float = option(0.999, "decay of AdamW's second moment", least=0, below=1)
    weight_decay: float = option(0.0, "of AdamW", least=0)
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm", least=1e-6)
    epochs: int = option(1, "passes over the training images, where --max-steps is 0", least=1)
    tokens_per_microbatch: int = option(16384, "of a forward; fewer need less memory", least=1)
    gradient_checkpointing: bool = option(True, "slower, takes far less memory")
    save_every: int = option(100, "steps between checkpoints; 0: only the final model", least=0)
    eval_every: int = option(0, "steps between evaluations on test images; 0: none", least=0)
    eval_images: int = option(200, "test images, from the first, that an evaluation takes", least=1)
    eval_max_new_tokens: int = option(2048, "longest completion in an evaluation", least=1)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Thinking distillation and answer supervision (Sec. 3.2)."""

    traces: str = option("", "traces.jsonl of the teacher")
    untraced: typing.Literal["skip", "answer"] = option(
        "skip", "images without a trace: leave out, or train on the answer alone"
    )
    batch_size: int = option(8, "images of one optimizer step, over all ranks", least=1)
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs have", least=0)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainConfig):
    """Reinforcement learning (Sec. 3.3)."""

    batch_size: int = option(16, "images of a batch on all ranks, each with G completions", least=1)
    max_steps: int = option(40, "batches; 0: as many as the epochs have", least=0)
    save_every: int = option(10, "steps between checkpoints; 0: only the final model", least=0)
    group_size: int = option(4, "completions of an image, G", least=2)
    updates_per_batch: int = option(1, "optimizer steps on the same completions", least=1)
    kl_coef: float = option(0.04, "weight of the KL divergence from pi_ref, beta; 0: none", least=0)
    clip_eps: float = option(0.2, "clip range of the ratio, epsilon", least=0)
    ratio: typing.Literal["token", "sequence"] = option("token", "Eqs. 3-4 on tokens or outputs")
    temperature: float = option(1.0, "of sampling and of the policies' log-probs", least=0.01)
    max_new_tokens: int = option(1024, "longest completion", least=1)
    slots: int = option(64, "groups that are sampled at a time on a rank", least=1)
    duplicate_rule: typing.Literal["printed", "pair"] = option("printed", "duplicates in Eq. 7")
    without: tuple[typing.Literal["label", "iou"], ...] = option((), "rewards left out (Table 3)")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RunConfig):
    """Greedy prediction for a split."""

    split: typing.Literal["train", "test"] = option("test", "images to predict")
    limit: int = option(0, "only the first so many images, also in evaluate.py; 0: all", least=0)
    max_new_tokens: int = option(2048, "longest completion", least=1)
    slots: int = option(64, "images that are decoded at a time on a rank", least=1)
    scores: typing.Literal["ones", "likelihood"] = option(
        "ones", "of an instance: 1.0, or the probability the model gave to its tokens"
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """SFT, GRPO, predictions and mAP on a drawn data set with a tiny model."""

    out: str = option("runs/demo", "folder for all that the demo writes")
    seed: int = option(0, "of the drawings, the first weights, data order and sampling", least=0)
    train_images: int = option(10000, "drawn training images", least=1)
    test_images: int = option(1000, "drawn held-out images", least=1)
    sft_steps: int = option(500, "steps of SFT", least=1)
    grpo_steps: int = option(150, "steps of GRPO", least=1)


STAGES = {"sft": SFTConfig, "grpo": GRPOConfig, "predict": PredictConfig, "demo": DemoConfig}


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One flag for each field of a config dataclass."""
    types_of = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        kind, options = types_of[f.name], {"help": f.metadata["help"]}
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            options["nargs"] = "*"
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
        if f.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = f.default
            options["help"] += " (default: %(default)s)" if kind is not bool else ""
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def parse_config(argv: list[str] | None = None):
    """The config of the stage that the command line names. Exits on --help and on a typo."""
    summary, usage = __doc__.split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, config_class in STAGES.items():
        stage = stages.add_parser(name, help=config_class.__doc__, description=config_class.__doc__)
        add_options(stage, config_class)
    values = vars(parser.parse_args(argv))
    config_class = STAGES[values.pop("stage")]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    CONFIG = parse_config()  # answers --help and typos before the seconds that torch takes to load

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.fsdp import (  # noqa: E402
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.data import DataLoader  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402
from transformers.utils import logging  # noqa: E402

import grpo  # noqa: E402

logging.disable_progress_bar()  # of the library's loading and saving

END_OF_TURN = "<|im_end|>"
# what does not change the weights a run comes to, beyond the rounding of sums
FREE_ON_RESUME = {
    *("resume", "out", "data", "traces", "workers", "dry_run", "save_every", "slots"),
    *("tokens_per_microbatch", "gradient_checkpointing"),
    *("eval_every", "eval_images", "eval_max_new_tokens"),
}
# what a run has in its folder before its first result
BEFORE_RESULTS = {"config.json", "run.lock", "first_sample.png"}
MAX_BAD_STEPS = 10  # steps in a row with a non-finite loss or gradient before a run stops


# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device

    def share(self, batch: list) -> tuple[list, list[float]]:
        """This rank's part of a batch, and weights of 1.

        A rank without a part takes the first item with weight 0: every rank takes part in every
        collective call.
        """
        mine = batch[self.rank :: self.world]
        return (mine, [1.0] * len(mine)) if mine else (batch[:1], [0.0])

    def gather(self, rows: list) -> list:
        """The rows of all ranks, rank after rank, on every rank."""
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, in rank order."""
        return sum(self.gather([value]))

    def print(self, *values) -> None:
        """print on the first rank."""
        if self.rank == 0:
            print(*values, flush=True)


def start_ranks() -> Ranks:
    """Join torchrun's process group, or open one of a single process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


# Samples as the model reads them


@dataclass(frozen=True)
class Example:
    """One image with its question and its ground truth, in the frame of the model."""

    sample: hicodet.Sample
    prompt: grpo.Prompt
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

    def prompt(self, sample: hicodet.Sample, thinking: bool) -> grpo.Prompt:
        """Image and question, as ids with a placeholder for each image token, and patches."""
        pixels = self.processor(images=read_image(sample), return_tensors="pt")
        grid = pixels["image_grid_thw"]
        ids = self.questions[thinking]
        place = int((ids == self.image_id).nonzero())
        image = torch.full((int(grid.prod()) // self.processor.merge_size**2,), self.image_id)
        ids = torch.cat([ids[:place], image, ids[place + 1 :]])
        return grpo.Prompt(ids, pixels["pixel_values"], grid)

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
        prompt = grpo.Prompt(*(part.clone() for part in vars(example.prompt).values()))
        yield dataclasses.replace(example, prompt=prompt)


# The three policies


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward and backward compute in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def from_model(read: Callable, path: str, what: str):
    """What the library reads from --model. Raises ValueError naming the folder if it cannot."""
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        inside = Path(path) / "model"
        hint = f"; is {inside} meant?" if inside.is_dir() else ""
        raise ValueError(f"--model {path}: no {what} that can be read ({error}){hint}") from None


def load_model(path: str, device: torch.device, dtype: torch.dtype | None = None):
    """A Qwen2.5-VL with group attention, in eval mode; from safetensors only.

    Raises ValueError if there are no weights, or not all.
    """
    options = {"dtype": dtype or compute_dtype(device), "use_safetensors": True}
    read = partial(
        Qwen2_5_VLForConditionalGeneration.from_pretrained, **options, output_loading_info=True
    )
    model, found = from_model(read, path, "weights in safetensors")
    if found["missing_keys"]:  # the library would draw them
        missing = sorted(found["missing_keys"])
        raise ValueError(f"--model {path}: {len(missing)} weights are missing, as {missing[0]}")
    return grpo.use_group_attention(model).to(device).eval()


def load_reference(config: GRPOConfig, device: torch.device):
    """pi_ref, the policy that RL starts from; None without a KL term."""
    if not config.kl_coef:
        return None
    reference = load_model(config.model, device)
    compile_layers(reference, device)
    return reference


def checkpoint_activations(model) -> None:
    """Recompute activations in backward; under this name from transformers 5.23 on."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_layers(model, device: torch.device) -> None:
    """Let a GPU fuse what lies between a layer's matrix products: an eighth of an update's time."""
    if device.type == "cuda":
        for layer in model.model.language_model.layers:
            layer.compile()


def load_policy(path: str, device: torch.device, *, gradient_checkpointing: bool = True):
    """pi_theta: fp32 parameters sharded over all ranks, computing in compute_dtype.

    At lr 1e-6 a step moves a weight by less than half a bf16 ulp: bf16 parameters would stay put.
    """
    policy = load_model(path, torch.device("cpu"), torch.float32)
    return shard_policy(policy, device, gradient_checkpointing=gradient_checkpointing)


def shard_policy(policy, device: torch.device, *, gradient_checkpointing: bool):
    """pi_theta from a model in fp32, which it changes: sharded, on the device, in train mode."""
    if gradient_checkpointing:
        checkpoint_activations(policy)
    else:  # under checkpointing what is compiled may have no break, as there is at our attention
        compile_layers(policy, device)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    # inputs stay as they are: cast, the vision tower's rotary angles would be coarser than pi_old's
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # the vision tower whole: gathered block by block, its small layers would wait for the gathering
    for part in [policy.model.visual, *policy.model.language_model.layers, policy]:
        fully_shard(part, mesh=mesh, mp_policy=precision)
    # as a method of the root, so that FSDP gathers the root's parameters as it does for forward
    policy.token_logprobs = types.MethodType(grpo.token_logprobs, policy)
    register_fsdp_forward_method(policy, "token_logprobs")
    return policy.to(device).train()


@torch.no_grad()
def refresh(replica, policy) -> None:
    """Copy pi_theta's weights into a replica, in place and parameter by parameter."""
    for copy, parameter in zip(replica.parameters(), policy.parameters(), strict=True):
        copy.copy_(parameter.to(copy.dtype).full_tensor())  # half the traffic where that is bf16


class Stepper:
    """AdamW with clipping, which changes nothing when the loss or the gradient is not finite."""

    def __init__(self, policy, *, beta2: float, weight_decay: float, max_grad_norm: float):
        self.max_grad_norm, self.bad_in_a_row = max_grad_norm, 0
        self.parameters = list(policy.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            betas=(0.9, beta2),
            weight_decay=weight_decay,
            fused=True,  # no temporary copy of the parameters
        )
        for parameter in self.parameters:
            # before the first save, which would make them by a step of its own and count that
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def step(self, lr: float, loss: float) -> float:
        """Apply the accumulated gradient at this rate. Returns its norm before clipping.

        loss: of the global batch, so that all ranks decide alike. Raises RuntimeError after
        MAX_BAD_STEPS steps in a row that had to be left out.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = float(norm.full_tensor())
        if math.isfinite(norm) and math.isfinite(loss):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
        self.optimizer.zero_grad()
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise RuntimeError(
                f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite: lower "
                "--learning-rate, and look at the last lines of metrics.jsonl"
            )
        return norm


def learning_rate(step: int, steps: int, highest: float, warmup: int, schedule: str) -> float:
    """Warm-up, then "cosine" or "linear" down to 0 (Sec. 4.2). step counts from 0."""
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return highest * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def micro_batches(
    lengths: list[int], weights: list[float], budget: int, ranks: Ranks
) -> list[tuple[list[int], list[float]]]:
    """Split items into parts of at most `budget` tokens: the indices and the weights of each.

    The longest come first, so that memory runs out at once if it does; an item over the budget
    stands alone. Every rank gets the same number of parts, a missing one as item 0 with weight 0.
    """
    parts: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or lengths[index] > room:
            parts.append([])
            room = budget
        parts[-1].append(index)
        room -= lengths[index]
    missing = max(ranks.gather([len(parts)])) - len(parts)
    return [(part, [weights[i] for i in part]) for part in parts] + [([0], [0.0])] * missing


# SFT


def sft_loss(logprobs: Tensor, weights: Tensor, num_tokens: float) -> Tensor:
    """Negative log-likelihood of trace and answer (Eq. 1), per supervised token of the batch.

    logprobs: (B, C), zeros behind each target's end. weights: (B,), 0 for a row not to count.
    num_tokens: supervised tokens of the global batch, so that a sum over parts and ranks is the
    loss. No token of the prompt or the image is among the log-probs.
    """
    return -(logprobs.sum(1) * weights).sum() / num_tokens


def sft_update(
    policy, stepper: Stepper, batch: list[Example], weights: list[float], *, lr, budget, ranks
) -> dict:
    """One optimizer step on this rank's share of a batch. Returns what is logged.

    budget: tokens of a micro-batch.
    """
    started = time.perf_counter()
    num_tokens = ranks.sum(sum(w * len(e.target_ids) for e, w in zip(batch, weights)))
    lengths = [len(e.prompt.prompt_ids) + len(e.target_ids) for e in batch]
    loss_sum = 0.0
    for part, kept in micro_batches(lengths, weights, budget, ranks):
        targets = [[batch[i].target_ids] for i in part]
        packed = grpo.pack(policy, [batch[i].prompt for i in part], targets)
        kept = torch.tensor(kept, device=ranks.device)
        loss = sft_loss(policy.token_logprobs(packed), kept, num_tokens)
        (loss * ranks.world).backward()  # FSDP takes the mean over ranks, the loss is a sum
        loss_sum += loss.detach()
    loss = ranks.sum(float(loss_sum))  # read here: in the loop Python would wait for the GPU
    norm = stepper.step(lr, loss)
    seconds = time.perf_counter() - started
    tokens = ranks.sum(sum(w * n for w, n in zip(weights, lengths)))
    rate = {"seconds_update": seconds, "tokens_per_second": tokens / seconds}
    return {"loss": loss, "grad_norm": norm, "supervised_tokens": num_tokens} | rate


# GRPO


def sample_seeds(seed: int, step: int, places: list[int], group_size: int) -> list[int]:
    """One seed for each completion of the prompts at these places of the global batch."""
    keys = [[seed, step, place, g] for place in places for g in range(group_size)]
    return [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys]


@dataclass(frozen=True)
class Part:
    """A micro-batch of whole groups, B = prompts of the part x G."""

    packed: grpo.PackedBatch
    advantages: Tensor  # (B,)
    weights: Tensor  # (B,)
    ref_logprobs: Tensor | None  # (B, C)
    sampled_logprobs: Tensor  # (N,) what the sampler reported


class GRPOTrainer:
    """One batch of GRPO at a time: sample, reward, update, refresh (Sec. 3.3)."""

    def __init__(
        self, policy, stepper, replica, reference, examples: Examples, config: GRPOConfig, ranks
    ):
        self.policy, self.stepper, self.replica = policy, stepper, replica
        self.reference = reference  # pi_ref, or None where there is no KL term
        self.examples, self.config, self.ranks = examples, config, ranks
        banned = examples.banned(policy.config.text_config.vocab_size).to(ranks.device)
        self.distribution = {"temperature": config.temperature, "banned": banned}
        self.sampler = grpo.Sampler(  # one for all steps: a GPU compiles its step once
            replica,
            slots=min(config.slots, math.ceil(config.batch_size / ranks.world)),
            group_size=config.group_size,
            prompt_room=examples.longest_prompt(),
            max_new_tokens=config.max_new_tokens,
            end_id=examples.end_id,
            **self.distribution,
        )
        refresh(replica, policy)

    def update(
        self, step: int, batch: list[Example], weights: list[float], lr: float
    ) -> tuple[dict, dict]:
        """One batch. Returns what is logged, and the completions of its first image to be read."""
        times = [time.perf_counter()]
        rollout = self.sample(step, batch)
        times.append(time.perf_counter())
        scored = [self.score(example.hois, ids) for example, ids in self.rows(batch, rollout)]
        totals = torch.tensor([row["total"] for row in scored]).view(-1, self.config.group_size)
        advantages = grpo.group_advantages(totals)
        times.append(time.perf_counter())
        logged = self.optimize(self.parts(batch, weights, rollout, advantages), sum(weights), lr)
        refresh(self.replica, self.policy)
        times.append(time.perf_counter())
        rows = [
            {"rewards": scored[i], "ids": tuple(ids.tolist()), "finished": bool(done)}
            for i, (ids, done) in enumerate(zip(rollout.completion_ids, rollout.finished))
        ]
        rows = self.ranks.gather(rows if weights[0] else [])
        seconds = dict(zip(("sample", "reward", "update"), np.diff(times).tolist()))
        size = self.config.group_size
        first = zip(rollout.completion_ids[:size], scored)
        texts = [{"text": self.examples.decode(ids), **reward} for ids, reward in first]
        shown = {"file_name": batch[0].sample.file_name, "completions": texts}
        return logged | rollout_metrics(rows, size, seconds), shown

    def rows(self, batch: list[Example], rollout: grpo.Rollout):
        """(example, ids) of each completion."""
        groups = [example for example in batch for _ in range(self.config.group_size)]
        return zip(groups, rollout.completion_ids, strict=True)

    def sample(self, step: int, batch: list[Example]) -> grpo.Rollout:
        """G completions of each prompt from pi_old."""
        places = [self.ranks.rank + i * self.ranks.world for i in range(len(batch))]
        seeds = sample_seeds(self.config.seed, step, places, self.config.group_size)
        return self.sampler.collect([example.prompt for example in batch], seeds)

    def score(self, hois: tuple[hicodet.HOI, ...], ids: Tensor) -> dict[str, float]:
        """The rewards of one completion (Eqs. 6-23)."""
        completion = hicodet.parse_completion(self.examples.decode(ids))
        return rewards.total_reward(completion, hois, **reward_options(self.config))

    def parts(self, batch, weights, rollout, advantages) -> list[Part]:
        """The batch in micro-batches, with pi_ref's log-probs."""
        size, device = self.config.group_size, self.ranks.device
        groups = [rollout.completion_ids[i * size : (i + 1) * size] for i in range(len(batch))]
        sampled = [rollout.logprobs[i * size : (i + 1) * size] for i in range(len(batch))]
        lengths = [len(e.prompt.prompt_ids) + sum(map(len, g)) for e, g in zip(batch, groups)]
        budget, parts = self.config.tokens_per_microbatch, []
        for part, kept in micro_batches(lengths, weights, budget, self.ranks):
            prompts = [batch[i].prompt for i in part]
            packed = grpo.pack(self.policy, prompts, [groups[i] for i in part])
            with torch.no_grad():
                reference = self.reference and grpo.token_logprobs(
                    self.reference, packed, **self.distribution
                )
            parts.append(
                Part(
                    packed,
                    advantages[part].flatten().to(device),
                    torch.tensor(kept, device=device).repeat_interleave(size),
                    reference,
                    torch.cat([row for i in part for row in sampled[i]]).to(device),
                )
            )
        return parts

    def optimize(self, parts: list[Part], prompts: float, lr: float) -> dict:
        """`updates_per_batch` optimizer steps on one batch of completions. Returns their means."""
        count = self.ranks.sum(prompts) * self.config.group_size
        old_logprobs, logged = None, []  # before the first step pi_old is pi_theta
        for _ in range(self.config.updates_per_batch):
            logprobs, values = self.optimizer_step(parts, old_logprobs, count, lr)
            old_logprobs = old_logprobs or logprobs
            logged.append(values)
        gaps = [
            (logprobs[part.packed.completion_mask] - part.sampled_logprobs).abs().max().item()
            for part, logprobs in zip(parts, old_logprobs)
        ]
        means = {name: float(np.mean([values[name] for values in logged])) for name in logged[0]}
        return means | {"logprob_gap": max(self.ranks.gather(gaps))}

    def optimizer_step(self, parts, old_logprobs, count: float, lr: float) -> tuple[list, dict]:
        """One step on the objective (Eqs. 2-5), a mean over the `count` outputs of all ranks.

        old_logprobs: (B, C) of each part, or None where they are pi_theta's own. Returns
        pi_theta's log-probs of each part, detached, and what is logged.
        """
        config, ranks = self.config, self.ranks
        options = {name: getattr(config, name) for name in ("clip_eps", "kl_coef", "ratio")}
        found: list[Tensor] = []
        sums = {"objective": 0.0, "kl": 0.0, "clip_fraction": 0.0}
        for k, part in enumerate(parts):
            logprobs = self.policy.token_logprobs(part.packed, **self.distribution)
            found.append(logprobs.detach())
            old, mask = (old_logprobs or found)[k], part.packed.completion_mask
            terms = grpo.grpo_objective(
                logprobs, old, part.ref_logprobs, part.advantages, mask, **options
            )
            terms = {name: (term * part.weights).sum() / count for name, term in terms.items()}
            (-terms["objective"] * ranks.world).backward()  # FSDP takes the mean over ranks
            sums = {name: sums[name] + term.detach() for name, term in terms.items()}
        # read here, not in the loop, where Python would wait for the GPU after each part
        sums = {name: ranks.sum(float(value)) for name, value in sums.items()}
        loss = -sums.pop("objective")
        return found, {"loss": loss, **sums, "grad_norm": self.stepper.step(lr, loss)}


def reward_options(config: GRPOConfig) -> dict:
    """The reading and the ablation of the rewards."""
    return {"duplicate_rule": config.duplicate_rule, "without": config.without}


def rollout_metrics(rows: list[dict], group_size: int, seconds: dict[str, float]) -> dict:
    """Means over the completions of all ranks, G rows a group: "rewards", "ids", "finished"."""
    groups = [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
    logged = {f"seconds_{name}": value for name, value in seconds.items()}
    for name in rows[0]["rewards"]:
        values = np.array([[row["rewards"][name] for row in group] for group in groups])
        within = values.std(1, ddof=1)  # between images it would hide that groups are all alike
        logged[f"reward_{name}"], logged[f"reward_{name}_std"] = values.mean(), within.mean()
        if name == "total":
            logged["zero_variance_groups"] = np.mean(within < 1e-3)
    # a sampler that is all but greedy shows here first
    distinct = [len({row["ids"] for row in group}) for group in groups]
    logged["distinct_completions"] = np.mean(distinct) / group_size
    lengths = [len(row["ids"]) for row in rows]
    logged["completion_length"] = np.mean(lengths)
    logged["truncated"] = np.mean([not row["finished"] for row in rows])
    for name in ("sample", "update"):
        logged[f"{name}_tokens_per_second"] = sum(lengths) / seconds[name]
    return {name: float(value) for name, value in logged.items()}


# Both trainings


def claim_folder(config: RunConfig, examples: Examples, ranks: Ranks) -> tuple[Path, TextIO | None]:
    """Make --out the folder of this run, and lock it until the returned file is closed.

    Raises ValueError if another process writes to it, if it holds anything that is not of a run,
    or a run, unless it is this one and to be resumed.
    """
    folder, lock, refusal = Path(config.out), None, ""
    if ranks.rank == 0:
        try:
            lock = _lock_folder(folder)
            _write_config(config, examples, folder)
        except (ValueError, OSError) as error:
            refusal = f"--out {folder}: {error}"
    if refusal := ranks.gather([refusal])[0]:
        if ranks.rank:
            sys.exit(1)  # the first rank says why
        raise ValueError(refusal)
    return folder, lock


def _lock_folder(folder: Path) -> TextIO:
    """Make the folder and lock it for this process. Raises ValueError if it is in use."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    if not path.exists() and any(folder.iterdir()):
        raise ValueError("holds files that are not of a run; choose another folder")
    lock = open(path, "w")
    teacher.lock(lock)
    return lock


def _write_config(config: RunConfig, examples: Examples, folder: Path) -> None:
    """Write config.json. Raises ValueError if the folder holds a run, or to resume another one."""
    path, mine = folder / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    mine["examples"] = examples.fingerprint()
    if Path(config.model).is_dir():
        mine["model"] = os.path.realpath(config.model)
    if any(found.name not in BEFORE_RESULTS for found in folder.iterdir()):
        if not config.resume:
            raise ValueError("holds a run: --resume it, or choose another folder")
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"config.json is damaged ({error}); choose another folder") from None
        for name in mine.keys() - FREE_ON_RESUME:
            if stored.get(name) != mine[name]:
                raise ValueError(
                    f"the run has {name} = {stored.get(name)!r}, not {mine[name]!r}; --resume may "
                    f"change only {', '.join(sorted(FREE_ON_RESUME))}"
                )
    write_json(path, mine)


class Run:
    """The folder of a training: config.json, metrics.jsonl, checkpoints and the final model."""

    def __init__(self, config: TrainConfig, examples: Examples, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.folder, self.lock = claim_folder(config, examples, ranks)
        if ranks.rank == 0:
            picture(examples[0]).save(self.folder / "first_sample.png")

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("checkpoint-*") if p.suffix != ".tmp")

    def load(self, policy, optimizer) -> int:
        """Restore the last checkpoint, if there is one. Returns the number of steps done."""
        done = 0
        for path in self.folder.glob("*.tmp") if self.ranks.rank == 0 else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # what a crash cut short
        if self.checkpoints():
            latest = self.checkpoints()[-1]
            model, moments = get_state_dict(policy, optimizer)
            try:
                dcp.load({"model": model, "optimizer": moments}, checkpoint_id=latest)
            except (CheckpointException, OSError) as error:
                cause = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"{latest} cannot be read ({cause}): remove it to start from the first step"
                ) from None
            set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)
            done = int(latest.name.split("-")[1])
        elif self.config.resume:
            self.ranks.print(f"{self.folder}: no checkpoint yet, starting from the first step")
        for path in self.folder.glob("*.jsonl") if self.ranks.rank == 0 else ():
            # without steps that will be run again
            kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= done]
            write_aside(path, "".join(kept))
        return done

    def save(self, policy, optimizer, done: int) -> None:
        """Write a checkpoint aside, rename it when it is whole, then drop those before it."""
        old, folder = self.checkpoints(), self.folder / f"checkpoint-{done:06d}"
        aside = folder.with_suffix(".tmp")
        model, moments = get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=aside)
        if self.ranks.rank == 0:
            aside.rename(folder)
            for path in old:
                shutil.rmtree(path)
        dist.barrier()

    def log(self, name: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl or rollouts.jsonl; what is not finite is null there."""
        values = {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in values.items()}
        if self.ranks.rank == 0:
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def export(self, policy, examples: Examples) -> None:
        """Write model/ for `from_pretrained`, weights in fp32; whole or absent.

        In bf16 most of what a short run at 1e-6 has moved would be rounded away.
        """
        state = {}
        for name, parameter in policy.named_parameters():
            full = parameter.full_tensor()  # from all ranks, so all of them pass here
            if self.ranks.rank == 0:
                state[name] = full.detach().cpu()
        if self.ranks.rank == 0:
            folder, aside = self.folder / "model", self.folder / "model.tmp"
            policy.save_pretrained(aside, state_dict=state)
            for part in (examples.tokenizer, examples.processor):
                part.save_pretrained(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        dist.barrier()


def write_aside(path: Path, text: str) -> None:
    """Replace a file at one stroke."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def write_json(path: Path, value: dict) -> None:
    """Replace a JSON file at one stroke."""
    write_aside(path, json.dumps(value, indent=2) + "\n")


def training_examples(config: TrainConfig, ranks: Ranks) -> Examples:
    """The annotated training images; for SFT with their traces."""
    samples = [sample for sample in hicodet.load_split(config.data, "train") if sample.hois]
    thinks = None
    if isinstance(config, SFTConfig):
        thinks = {}
        if config.traces and not config.thinking:
            raise ValueError("--no-thinking takes no --traces: there is no reasoning to train on")
        if config.thinking:
            if not config.traces:
                raise ValueError("--traces: give the file of teacher.py, or --no-thinking")
            if not Path(config.traces).is_file():
                raise ValueError(f"--traces {config.traces}: no such file; teacher.py writes it")
            thinks = teacher.read_traces(config.traces)
            traced = [sample for sample in samples if sample.file_name in thinks]
            kept = len(traced) if config.untraced == "skip" else len(samples)
            ranks.print(f"{len(traced)} of {len(samples)} images have a trace; training on {kept}")
            samples = traced if config.untraced == "skip" else samples
    if not samples:
        raise ValueError(f"no image of {config.data} to train on (annotated, with a trace)")
    hicodet.require_images(samples)
    return Examples(config.model, samples, thinks, **config.prompt_switches())


def batches(
    examples: Examples, config: TrainConfig, ranks: Ranks, *, done: int, steps: int
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


def train(config: SFTConfig | GRPOConfig) -> None:
    """SFT or GRPO."""
    ranks, is_sft = start_ranks(), isinstance(config, SFTConfig)
    examples = training_examples(config, ranks)
    judge = Judge(config, ranks) if config.eval_every else None
    if config.dry_run:
        options = {} if is_sft else reward_options(config)
        return ranks.print(describe(examples[0], examples, options))
    run = Run(config, examples, ranks)
    checkpointing = config.gradient_checkpointing
    policy = load_policy(config.model, ranks.device, gradient_checkpointing=checkpointing)
    replica = load_model(config.model, ranks.device) if judge or not is_sft else None
    stepper = Stepper(
        policy,
        beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    done = run.load(policy, stepper.optimizer)
    if not is_sft:
        reference = load_reference(config, ranks.device)
        trainer = GRPOTrainer(policy, stepper, replica, reference, examples, config, ranks)
    steps = config.max_steps or config.epochs * math.ceil(len(examples) / config.batch_size)
    name, schedule = ("sft", "cosine") if is_sft else ("grpo", "linear")
    stream = batches(examples, config, ranks, done=done, steps=steps)
    with tqdm(total=steps, initial=done, disable=ranks.rank > 0, desc=name, unit="step") as bar:
        for step, batch, weights, waited in stream:
            started = time.perf_counter() - waited
            lr = learning_rate(step, steps, config.learning_rate, config.warmup_steps, schedule)
            if is_sft:
                options = {"lr": lr, "budget": config.tokens_per_microbatch, "ranks": ranks}
                values = sft_update(policy, stepper, batch, weights, **options)
            else:
                values, rollout = trainer.update(step, batch, weights, lr)
                run.log("rollouts", step + 1, rollout)
            seconds = time.perf_counter() - started
            values |= {"seconds": seconds, "seconds_waiting": waited}
            values |= {"share_waiting": waited / seconds}  # for images: more --workers if large
            values |= {"learning_rate": lr, "skipped": stepper.bad_in_a_row > 0}
            if judge and (step + 1) % config.eval_every == 0:
                refresh(replica, policy)
                values |= judge(replica)
            run.log("metrics", step + 1, values)
            shown = ("loss", "reward_total", "reward_iou", "kl", "completion_length", "eval_map")
            bar.set_postfix({name: f"{values[name]:.3g}" for name in shown if name in values})
            bar.update()
            if config.save_every and (step + 1) % config.save_every == 0:
                run.save(policy, stepper.optimizer, step + 1)
    run.export(policy, examples)
    ranks.print(f"model: {run.folder / 'model'}")


def picture(example: Example) -> Image.Image:
    """The image as large as the model sees it, with the boxes that text and rewards speak of."""
    image = read_image(example.sample).resize(example.model_size, Image.Resampling.BICUBIC)
    width, height = example.model_size
    caption = f"{example.sample.file_name}, seen as {width} x {height}"
    return hicodet.draw_hois(image, example.hois, caption=caption)


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


# Prediction

PREDICTION = ("max_new_tokens", "slots", "workers", "scores")  # what predict_rows takes of a config


def predict_rows(
    model,
    examples: Examples,
    indices: list[int],
    ranks: Ranks,
    *,
    max_new_tokens: int,
    slots: int = 64,
    workers: int = 0,
    scores: str = "ones",
) -> Iterator[dict]:
    """Greedy predictions of this rank's share of the images, in the order in which they end.

    A row holds the image's index, its line of predictions.jsonl, its rewards (None without ground
    truth), its length in tokens and whether it ended by itself.
    """
    mine, under_way = indices[ranks.rank :: ranks.world], {}
    sampler = grpo.Sampler(
        model,
        slots=min(slots, max(len(mine), 1)),
        group_size=1,
        prompt_room=examples.longest_prompt(),
        max_new_tokens=max_new_tokens,
        end_id=examples.end_id,
        temperature=0,
        banned=examples.banned(model.config.text_config.vocab_size).to(model.device),
    )

    def arriving():
        for number, example in enumerate(read_ahead(examples, mine, workers)):
            under_way[number] = example
            yield example.prompt, None

    with tqdm(total=len(mine), desc="predict", unit="image", disable=ranks.rank > 0) as bar:
        for number, rollout in sampler.run(arriving()):
            ids, finished = rollout.completion_ids[0], bool(rollout.finished[0])
            likelihood = rollout.logprobs[0] if scores == "likelihood" else None
            row = prediction(examples, under_way.pop(number), ids, likelihood)
            yield {"index": mine[number], "length": len(ids), "finished": finished, **row}
            bar.update()


def prediction(examples, example: Example, ids: Tensor, logprobs: Tensor | None) -> dict:
    """The line of predictions.jsonl and the rewards of one completion."""
    text = examples.decode(ids)
    completion = hicodet.parse_completion(text)
    scores = None
    if logprobs is not None:
        scores = instance_scores(examples.tokenizer, text, completion, ids, logprobs)
    size = (example.sample.width, example.sample.height)
    instances = hicodet.predicted_instances(completion, size, example.model_size, scores)
    line = {"file_name": example.sample.file_name, "text": text, "instances": instances}
    reward = rewards.total_reward(completion, example.hois) if example.hois else None
    return {"line": line, "reward": reward}


def instance_scores(tokenizer, text: str, completion, ids: Tensor, logprobs: Tensor) -> list[float]:
    """The probability that the model gave to the tokens of each instance.

    A byte-level token has a symbol for each byte, so its place in the text is known without
    encoding the text anew, which might cut it otherwise than the model wrote it. The bytes are
    decoded as the tokenizer does: those that are no UTF-8 become a character too.
    """
    special, symbols = set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(ids)
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    decoder, ends = codecs.getincrementaldecoder("utf-8")(errors="replace"), [0]
    for i, token in zip(ids.tolist(), symbols):
        written = b"" if i in special else bytes(byte_of[symbol] for symbol in token)
        ends.append(ends[-1] + len(decoder.decode(written)))
    starts, ends = np.array(ends[:-1]), np.array(ends[1:])
    spans = [instance.span for instance in completion.instances]
    inside = [torch.from_numpy((ends > start) & (starts < stop)) for start, stop in spans]
    return [math.exp(logprobs[tokens].sum().item()) for tokens in inside]


def summarise(rows: list[dict]) -> dict:
    """Means over predicted images; rewards over those that have ground truth."""
    scored = [row["reward"] for row in rows if row["reward"]]
    names = scored[0] if scored else ()
    return {
        "images": len(rows),
        "reward": {name: float(np.mean([reward[name] for reward in scored])) for name in names},
        "completion_length": float(np.mean([row["length"] for row in rows])),
        "truncated": 1 - float(np.mean([row["finished"] for row in rows])),
    }


class Judge:
    """Held-out images for --eval-every: mean greedy reward, and mAP over the classes they show."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        samples = hicodet.load_split(config.data, "test")[: config.eval_images]
        hicodet.require_images(samples)
        self.examples = Examples(config.model, samples, **config.prompt_switches())
        self.ranks, self.max_new_tokens = ranks, config.eval_max_new_tokens
        self.counts = hicodet.training_counts(config.data)

    def __call__(self, model) -> dict[str, float]:
        samples = self.examples.samples
        indices, limit = list(range(len(samples))), self.max_new_tokens
        options = {"max_new_tokens": limit, "slots": 32}  # in the memory that training leaves
        mine = predict_rows(model, self.examples, indices, self.ranks, **options)
        rows = sorted(self.ranks.gather(list(mine)), key=lambda row: row["index"])
        lines, summary = [row["line"] for row in rows], summarise(rows)
        result = evaluate.evaluate(lines, samples, self.counts, classes="present")
        return {
            "eval_reward": summary["reward"].get("total", 0.0),
            "eval_map": 100 * (result["default"]["full"] or 0.0),
            "eval_length": summary["completion_length"],
        }


def predict(config: PredictConfig) -> None:
    """Write predictions.jsonl and summary.json for a split."""
    ranks = start_ranks()
    samples = hicodet.load_split(config.data, config.split)[: config.limit or None]
    hicodet.require_images(samples)
    examples = Examples(config.model, samples, **config.prompt_switches())
    if config.dry_run:
        return ranks.print(describe(examples[0], examples, {}))
    folder, lock = claim_folder(config, examples, ranks)  # locked until this function ends
    parts = sorted(folder.glob("part-*.jsonl"))
    stored = {row["index"]: row for part in parts for row in read_rows(part)}
    ranks.print(f"{len(stored)} of {len(samples)} images are predicted already")
    # behind the last: a crash may have come before each rank had begun its part
    number = max((int(part.stem.split("-")[1]) + 1 for part in parts), default=0) + ranks.rank
    dist.barrier()  # every rank has listed the parts before one is added
    todo = [index for index in range(len(samples)) if index not in stored]
    model, started = load_model(config.model, ranks.device), time.perf_counter()
    mine: list[dict] = []
    with open(folder / f"part-{number:04d}.jsonl", "x") as part:
        options = {name: getattr(config, name) for name in PREDICTION}
        for row in predict_rows(model, examples, todo, ranks, **options):
            part.write(json.dumps(row) + "\n")
            part.flush()
            mine.append(row)
    stored |= {row["index"]: row for row in ranks.gather(mine)}
    rows, seconds = [stored[index] for index in range(len(samples))], time.perf_counter() - started
    summary = summarise(rows)
    if todo:
        tokens = sum(stored[index]["length"] for index in todo)
        summary |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
    if ranks.rank == 0 and (todo or not (folder / "predictions.jsonl").exists()):
        write_json(folder / "summary.json", summary)
        lines = "".join(json.dumps(row["line"]) + "\n" for row in rows)
        write_aside(folder / "predictions.jsonl", lines)
    ranks.print(json.dumps(summary, indent=2))


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a JSON lines file of a run; a crash may have cut the last one."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        try:
            rows += [json.loads(line)] if line.endswith("\n") else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; remove the line") from None
    return rows


def demo(config: DemoConfig) -> None:
    """SFT, GRPO, predictions and mAP on the toy, all as commands of their own."""
    from demo.run import run_demo  # only here: no other stage needs the toy

    run_demo(**dataclasses.asdict(config))


def main(config) -> None:
    """Run one stage. What this project refuses is one line; any other error keeps its traceback."""
    stages = {SFTConfig: train, GRPOConfig: train, PredictConfig: predict, DemoConfig: demo}
    try:
        stages[type(config)](config)
    except (ValueError, OSError) as error:
        origin, root = traceback.extract_tb(error.__traceback__)[-1].filename, Path(__file__).parent
        if Path(origin).parent not in (root, root / "demo"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        failed = sys.exc_info()[0] is not None
        if dist.is_initialized() and not (failed and dist.get_world_size() > 1):
            dist.destroy_process_group()  # would wait for the others if this rank alone failed


if __name__ == "__main__":
    main(CONFIG)
