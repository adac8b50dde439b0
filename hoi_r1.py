"""HOI-R1: supervised fine-tuning, GRPO with HOI rewards, prediction (Secs. 3.2, 3.3, 4.2).

    # all of it on a drawn data set, on a laptop
    python hoi_r1.py demo
    # the paper's model: traces of teacher.py, then SFT, GRPO, predictions, mAP
    torchrun --nproc_per_node 8 hoi_r1.py sft --data hico_20160224_det \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --traces traces.jsonl --out runs/sft
    torchrun --nproc_per_node 8 hoi_r1.py grpo --data hico_20160224_det \\
        --model runs/sft/model --out runs/grpo
    torchrun --nproc_per_node 8 hoi_r1.py predict --data hico_20160224_det \\
        --model runs/grpo/model --out runs/test
    python evaluate.py runs/test/predictions.jsonl --data hico_20160224_det
    # can every image be read?
    python hoi_r1.py check --data hico_20160224_det
    # look at it: a page of all runs, pictures of images with the most misses
    python hoi_r1.py report runs/sft runs/grpo runs/test
    python hoi_r1.py show --data hico_20160224_det --worst 20 \\
        --predictions runs/test/predictions.jsonl

Plain `python` runs one process. Three policies: pi_theta in fp32, sharded over the ranks by FSDP2
and computing in bf16 on a GPU; pi_old, a replica on every rank in the dtype of computation, which
samples and is refreshed after each batch; pi_ref, frozen and sharded like pi_theta, only where
--kl-coef is above 0.

Data order and sampling seeds are pure functions of (seed, step, place in the batch), and losses are
divided by counts over all ranks and micro-batches: world size and `--resume` do not change the run.
"""

import dataclasses
import os
import sys
import typing
from dataclasses import dataclass
from importlib.metadata import version

from engine.options import Config, option, parse_stage, required


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """What every stage is told."""

    model: str = required("folder or hub name of a Qwen2.5-VL model (safetensors)")
    data: str = required("folder of hico_20160224_det: anno_bbox.mat, images/")
    out: str = required("folder for all that the run writes")
    seed: int = option(0, "of data order and sampling", least=0)
    # of a switch that is on, the text is of its --no-...
    thinking: bool = option(True, "prompt without the Thinking Process (Table 2)")
    task_description: bool = option(True, "prompt without the role and the valid classes (Table 2)")
    box_frame: typing.Literal["model", "original"] | None = option(
        None,
        "pixels that boxes in text count: of the resized image that the model sees, or of the "
        "original; default: as the model in --model was trained here, else model",
    )
    workers: int = option(2, "processes of a rank that read images; 0: the rank itself", least=0)
    dry_run: bool = option(False, "print the first sample as the model would see it, and stop")
    resume: bool = option(False, "go on with the run in --out, from its last checkpoint or image")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What both trainings are told; defaults are Sec. 4.2, or the README's table of readings."""

    GROUPS = {
        "what to read and write": "model data traces untraced skip_bad_images out resume dry_run",
        "prompt and answer (Fig. 4)": "thinking task_description box_frame",
        "length and order of the run": "batch_size epochs max_steps seed",
        "sampling (Sec. 3.3)": "group_size temperature max_new_tokens",
        "objective (Eqs. 2-5)": "updates_per_batch clip_eps kl_coef ratio",
        "rewards (Eqs. 6-23)": "without label_reward duplicate_rule duplicates_earn",
        "optimizer": "learning_rate warmup_steps adam_beta2 weight_decay max_grad_norm",
        "checkpoints": "save_every keep export_every",
        "evaluation while training": "eval_every eval_images eval_max_new_tokens",
        "memory and speed": "tokens_per_microbatch gradient_checkpointing offload slots workers "
        "timeout",
    }

    learning_rate: float = option(1e-6, "peak learning rate of AdamW", least=0, paper="Sec. 4.2")
    warmup_steps: int = option(0, "steps over which the learning rate rises", least=0)
    adam_beta2: float = option(0.999, "decay of AdamW's second moment", least=0, below=1)
    weight_decay: float = option(0.0, "of AdamW", least=0)
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm", least=1e-6)
    epochs: int = option(
        1, "passes over the training images, where --max-steps is 0", least=1, paper="Sec. 4.2"
    )
    tokens_per_microbatch: int = option(16384, "of a forward pass; fewer need less memory", least=1)
    gradient_checkpointing: bool = option(True, "faster, but takes far more memory")
    offload: bool = option(
        False, "keep pi_theta, its gradient, AdamW's state and pi_ref in the host's memory; slower"
    )
    save_every: int = option(100, "steps between checkpoints; 0: only the final model", least=0)
    keep: int = option(2, "newest checkpoints that stay", least=1)
    export_every: int = option(
        0, "steps between models kept as model-000400/ and so on (Fig. 2); 0: none", least=0
    )
    skip_bad_images: bool = option(
        False, "read all images first, and leave out those that cannot be used"
    )
    timeout: float = option(10, "minutes a rank waits for the others, then ends", least=0.01)
    eval_every: int = option(0, "steps between evaluations on test images; 0: none", least=0)
    eval_images: int = option(200, "test images, from the first, that an evaluation takes", least=1)
    eval_max_new_tokens: int = option(2048, "longest completion in an evaluation", least=1)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Thinking distillation and answer supervision: SFT (Sec. 3.2).

    The first of the paper's two trainings: for each training image the model learns to write a
    teacher's reasoning, then every annotated interaction with its boxes (Eq. 1). teacher.py makes
    the traces. --out gets the trained model (model/), checkpoints and a page to look at,
    report.html. Started with python instead of torchrun, it is one process.

        python teacher.py --data hico_20160224_det --out traces.jsonl --max-cost 60
        torchrun --nproc_per_node 8 hoi_r1.py sft --data hico_20160224_det \\
            --model Qwen/Qwen2.5-VL-3B-Instruct --traces traces.jsonl --out runs/sft
    """

    traces: str = option("", "traces.jsonl of the teacher")
    untraced: typing.Literal["skip", "answer"] | None = option(
        None,
        "images without a trace: leave out, or train on the answer alone; to be chosen where more "
        "than 5 % have none (default: leave out)",
    )
    batch_size: int = option(
        8, "images of one optimizer step, over all ranks", least=1, paper="Sec. 4.2"
    )
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs have", least=0)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainConfig):
    """Reinforcement learning by GRPO with rewards for HOI (Sec. 3.3).

    The second training. At each step the model writes G answers for each image of a batch, they are
    rewarded for format, labels and boxes (Eqs. 6-23), and those that beat the mean of their group
    become more likely (Eqs. 2-5). --out gets the trained model (model/), checkpoints and a page to
    look at, report.html. Started with python instead of torchrun, it is one process.

        torchrun --nproc_per_node 8 hoi_r1.py grpo --data hico_20160224_det \\
            --model runs/sft/model --out runs/grpo
    """

    batch_size: int = option(
        16, "images of a batch on all ranks, each with G completions", least=1, paper="Sec. 4.2"
    )
    max_steps: int = option(
        40, "batches; 0: as many as the epochs have", least=0, paper="Sec. 4.2"
    )
    save_every: int = option(10, "steps between checkpoints; 0: only the final model", least=0)
    group_size: int = option(4, "completions of an image, G", least=2, paper="Sec. 4.2")
    updates_per_batch: int = option(1, "optimizer steps on the same completions", least=1)
    kl_coef: float = option(0.04, "weight of the KL divergence from pi_ref, beta; 0: none", least=0)
    clip_eps: float = option(0.2, "clip range of the ratio, epsilon", least=0)
    ratio: typing.Literal["token", "sequence"] = option(
        "token", "the ratio of Eqs. 3-4: of each token, or of the whole output, as printed"
    )
    temperature: float = option(1.0, "of sampling and of the policies' log-probs", least=0.01)
    max_new_tokens: int = option(1024, "longest completion, in tokens", least=1)
    slots: int = option(64, "groups that are sampled at a time on a rank", least=1)
    duplicate_rule: typing.Literal["printed", "pair"] = option(
        "printed",
        "a duplicate in Eq. 7 has either box, as printed, or both boxes in common with an "
        "earlier pair",
    )
    duplicates_earn: typing.Literal["labels", "nothing"] = option(
        "labels", "what a duplicate earns in Eqs. 14 and 16: its labels, as printed, or nothing"
    )
    label_reward: typing.Literal["printed", "matched"] = option(
        "printed", "labels against the image's whole set (Eqs. 14-18), or on the pairs of Eq. 21"
    )
    without: tuple[typing.Literal["label", "iou"], ...] = option((), "rewards left out (Table 3)")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RunConfig):
    """Greedy prediction for a split of HICO-DET, or for any photographs.

    With --data, --out gets predictions.jsonl, a line an image, which evaluate.py scores, and a
    page to look at, report.html. With --image no data set is needed: the reasoning and a table of
    interactions are printed, and --out gets a picture of each photograph.

        torchrun --nproc_per_node 8 hoi_r1.py predict --data hico_20160224_det \\
            --model runs/grpo/model --out runs/test
        python hoi_r1.py predict --image photo.jpg \\
            --model runs/grpo/model --out photos
    """

    GROUPS = {
        "what to read and write": "model data image out dry_run",
        "with --data only": "split limit resume",
        "prompt and answer (Fig. 4)": "thinking task_description box_frame",
        "decoding and scores": "max_new_tokens repetition_penalty scores",
        "memory and speed": "slots workers",
    }
    seed: int = option(0, "", least=0)  # of no effect where nothing is drawn
    data: str = option("", "folder of hico_20160224_det: anno_bbox.mat, images/")
    image: tuple[str, ...] = option((), "photographs to predict, instead of --data", metavar="FILE")
    split: typing.Literal["train", "test"] = option("test", "images to predict")
    limit: int = option(
        0, "only the first so many images (evaluate.py needs the same --limit); 0: all", least=0
    )
    max_new_tokens: int = option(2048, "longest completion, in tokens", least=1)
    slots: int = option(0, "images decoded at once on a rank; 0: as many as fit, up to 64", least=0)
    scores: typing.Literal["rank", "ones", "likelihood"] = option(
        "rank",
        "falling from 1.0 to 0.5 in the order of the text, as the authors do; all 1.0; or the "
        "probability the model gave to an instance's tokens",
    )
    repetition_penalty: float = option(
        1.0, "divides the logits of tokens already written; Qwen2.5-VL's own is 1.05", least=1
    )

    def __post_init__(self):
        super().__post_init__()
        if bool(self.data) == bool(self.image):
            raise ValueError("--data, --image: give one of them")
        for name in self.GROUPS["with --data only"].split():
            if self.image and getattr(self, name) != getattr(PredictConfig, name):
                raise ValueError(f"--{name}: only with --data, not with --image")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """All of it on a drawn data set, with a tiny model, on a laptop.

    Draws people and objects in HICO-DET's format and takes a Qwen2.5-VL of a million weights
    through a base training, SFT, GRPO, prediction and mAP, by the commands of a real run. It ends
    with a table, pictures and a page, after some 12 minutes on two CPU cores. The second line shows
    only that everything runs: a hundredth of the steps teaches nothing.

        python hoi_r1.py demo
        python hoi_r1.py demo --steps-scale 0.01 --test-images 20 --out runs/small
    """

    GROUPS = {
        "what to read and write": "out base",
        "drawings": "train_images test_images complete",
        "length of the run": "steps_scale base_steps sft_steps grpo_steps seed",
    }
    out: str = option("runs/demo", "folder for all that the demo writes")
    seed: int = option(0, "of the drawings, the first weights, data order and sampling", least=0)
    train_images: int = option(10000, "drawn training images", least=1)
    test_images: int = option(1000, "drawn held-out images", least=1)
    base_steps: int = option(1000, "steps that make the base model", least=1)
    sft_steps: int = option(1200, "steps of SFT", least=1)
    grpo_steps: int = option(40, "steps of GRPO", least=1)
    base: str = option("", "folder of a base model made before, such as runs/demo/base/model")
    complete: bool = option(False, "annotate every pair of the training images")
    steps_scale: float = option(1.0, "so many times the steps and training images", least=0.001)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """One HTML page of one or more runs, side by side; needs no network.

    The page tells whether a run is healthy and shows Table 1 with the paper's figures, curves,
    rewards, examples, the APs of evaluate.py --json, and the command that made each run.

        python hoi_r1.py report runs/sft runs/grpo runs/test
    """

    GROUPS = {"what to read and write": "runs out"}
    runs: tuple[str, ...] = required(
        "folders of runs, trainings and predictions", metavar="RUN", positional=True
    )
    out: str = option("", "file to write, instead of report.html in the last folder")


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Config):
    """Pictures of images: the ground truth, and the prediction beside it.

    Each interaction has a colour, and a line from the person to the object.

        python hoi_r1.py show --data hico_20160224_det --images 20
        python hoi_r1.py show --data hico_20160224_det --worst 20 \\
            --predictions runs/test/predictions.jsonl
    """

    GROUPS = {
        "what to read and write": "data predictions out",
        "which images": "split images file worst by",
    }
    data: str = required("folder of hico_20160224_det: anno_bbox.mat, images/")
    predictions: str = option("", "predictions.jsonl of the split, to be drawn beside the truth")
    out: str = option("pictures", "folder for the pictures")
    images: int = option(0, "so many, from the first; by default 12", least=0)
    file: str = option("", "the image of this file name", metavar="NAME")
    worst: int = option(0, "so many of the worst, these first; by default none", least=0)
    by: typing.Literal["missed", "reward"] = option(
        "missed", "what is worst: most missed interactions, or the lowest total reward (Eq. 23)"
    )
    split: typing.Literal["train", "test"] = option("test", "images to draw")

    def __post_init__(self):
        super().__post_init__()
        if sum(map(bool, (self.images, self.file, self.worst))) > 1:
            raise ValueError("--images, --file and --worst: give one of them")
        if self.worst and not self.predictions:
            raise ValueError("--worst: give the predictions too, with --predictions")
        if self.by == "reward" and not self.worst:
            raise ValueError("--by reward: give --worst too, which it orders")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Config):
    """Read every image once, and list those that cannot be used.

    An image is to be there, to be read whole, and to have the size that its annotation says. A
    training with --skip-bad-images leaves the others out.

        python hoi_r1.py check --data hico_20160224_det
    """

    GROUPS = {"what to read": "data split workers"}

    data: str = required("folder of hico_20160224_det: anno_bbox.mat, images/")
    split: typing.Literal["train", "test"] | None = option(
        None, "images to read; default: those of both"
    )
    workers: int = option(0, "images read at a time; 0: as many as there are CPUs", least=0)


STAGES = {
    **{"sft": SFTConfig, "grpo": GRPOConfig, "predict": PredictConfig, "demo": DemoConfig},
    **{"report": ReportConfig, "show": ShowConfig, "check": CheckConfig},
}


def parse_config(argv: list[str] | None = None):
    """The config of the stage that the command line names. Exits on --help and on a typo."""
    return parse_stage(STAGES, "\n\n".join(__doc__.split("\n\n")[:2]), argv)


def pin_exact_sizes() -> None:
    """Let pinned memory (`--offload`) be of the sizes asked for, unless the user chose otherwise.

    PyTorch rounds each tensor up to a power of two: 76 GB for the 60 GB of a 3B model. It reads
    this when it is imported; before 2.13 it stops at the name.
    """
    release = tuple(int(part) for part in version("torch").split(".")[:2])
    if release >= (2, 13) and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_max_round_threshold_mb:1")


def run_stage(config) -> None:
    """Run the stage of a config. It is imported only now, with the seconds that torch takes."""
    pin_exact_sizes()
    if isinstance(config, DemoConfig):
        from demo.run import run_demo

        return run_demo(**dataclasses.asdict(config))
    if isinstance(config, ReportConfig):
        from engine.report import write_page

        return print(write_page(config.runs, config.out))
    if isinstance(config, ShowConfig):
        from engine.show import show
        from rewards import total_reward

        for line in show(**dataclasses.asdict(config), total_reward=total_reward):
            print(line, flush=True)
        return
    if isinstance(config, CheckConfig):
        from engine.check import check

        for line in check(**dataclasses.asdict(config)):
            print(line, flush=True)
        return
    if isinstance(config, PredictConfig):
        from predict import predict, predict_photographs

        return predict_photographs(config) if config.image else predict(config)
    import train

    return (train.sft if isinstance(config, SFTConfig) else train.grpo)(config)


def main(argv: list[str] | None = None) -> None:
    """The command line. What the user must mend is one line; all else keeps its traceback."""
    config = parse_config(argv)
    # numpy: only once the command line is known to be right
    from engine.signals import end_interrupted, resume_command
    from hicodet import InputError

    try:
        run_stage(config)
    except (InputError, OSError) as error:
        if not said_already(str(error)):
            # on a line of its own: a progress bar may stand before it, of any rank
            start = "\n" if "tqdm" in sys.modules else ""
            print(f"{start}error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        resumable = isinstance(config, RunConfig) and not config.dry_run
        resumable = resumable and not getattr(config, "image", ())
        end_interrupted("", f"go on with: {resume_command()}" if resumable else "")
    finally:
        leave_ranks(failed=sys.exc_info()[0] is not None)


def said_already(message: str) -> bool:
    """Whether another rank has said this: what all of them find is printed once."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    try:
        return dist.distributed_c10d._get_default_store().add(message, 1) > 1
    except RuntimeError:  # the store went with a host
        return False


def leave_ranks(failed: bool) -> None:
    """Close the process group, if one was opened."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    # a rank that failed alone would wait for the others
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
