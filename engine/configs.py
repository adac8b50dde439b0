"""The options of all stages, each defined once: default, help, section of the paper, resumability.

docs/options.md is written from these classes. Standard library only: --help is answered at once.
"""

from dataclasses import dataclass
from typing import Literal

from engine.options import Config, flag_of, option, required

FILES = "input and output"
PROMPT = "prompt and answer (Fig. 4)"
LENGTH = "length and order of the run"
SAMPLING = "sampling (Sec. 3.3)"
OBJECTIVE = "objective (Eqs. 2-5)"
REWARDS = "rewards (Eqs. 6-23)"  # each is a keyword of rewards.total_reward
OPTIMIZER = "optimizer"
LORA = "LoRA (not in the paper)"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation while training"
DECODING = "decoding and scores"
SPEED = "memory and speed"

FULL_RATE = 1e-6  # Sec. 4.2
DATA = "folder in the layout of hico_20160224_det, or with annotations.jsonl and images/"


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """Options shared by sft, grpo and predict."""

    GROUPS = (
        *(FILES, PROMPT, LENGTH, SAMPLING, DECODING, OBJECTIVE, REWARDS, OPTIMIZER, LORA),
        *(CHECKPOINTS, EVALUATION, SPEED),
    )
    FREE = (FILES, CHECKPOINTS, EVALUATION, SPEED)
    model: str = required(
        "folder or hub name of a Qwen-VL model (safetensors)", group=FILES, per_host=True
    )
    adapter: str = option(
        "", "folder of a LoRA adapter for --model, ours or peft's; a training continues it",
        group=FILES, metavar="DIR", per_host=True,
    )
    data: str = required(DATA, group=FILES, per_host=True)
    exclude: str = option(
        "", "file with one image name a line: leave these images out; `check --out FILE` writes it",
        group=FILES, metavar="FILE", per_host=True,
    )
    out: str = required("folder for all that the run writes", group=FILES, per_host=True)
    resume: bool = option(
        False, "continue the run in --out from its last checkpoint or image", group=FILES
    )
    dry_run: bool = option(
        False, "print the first sample as the model sees it, and stop", group=FILES
    )
    thinking: bool | None = option(
        None,
        "prompt with the Thinking Process (Table 2); default: as --model was trained, else on",
        group=PROMPT,
    )
    task_description: bool | None = option(
        None,
        "prompt with the role and the valid classes (Table 2); default: as --model was trained, "
        "else on", group=PROMPT,
    )
    box_frame: Literal["model", "original", "thousand"] | None = option(
        None,
        "what boxes in the text count: pixels of the resized image that the model sees, pixels of "
        "the original, or thousandths of each side; default: as --model was trained", group=PROMPT,
    )
    text_first: bool | None = option(
        None, "put the image after the text, whose states all images then share: faster, and "
        "another prompt than the authors'; default: as --model was trained, else off",
        group=PROMPT,
    )
    workers: int = option(
        2, "processes per rank that read images; 0: the rank itself reads", least=0, group=SPEED,
        per_host=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """Options shared by sft and grpo; defaults are Sec. 4.2 or the readings of docs/paper.md."""

    seed: int = option(0, "seed of data order and sampling", least=0, group=LENGTH)
    epochs: int = option(
        1, "passes over the training images if --max-steps is 0", least=1, paper="Sec. 4.2",
        group=LENGTH, on_resume="allow",
    )
    learning_rate: float | None = option(
        None, "peak learning rate of AdamW (default: 1e-6, Sec. 4.2; for LoRA 1e-4 in sft and 1e-5 "
        "in grpo: at 1e-6 adapters hardly learn)", least=0, group=OPTIMIZER, on_resume="note",
    )
    lora_rank: int = option(
        0, "train LoRA adapters of this rank instead of all weights; 0: all weights, as in the "
        "paper", least=0, group=LORA,
    )
    lora_alpha: float | None = option(
        None, "LoRA adapters are scaled by this over their rank (default: twice the rank)",
        least=0.001, group=LORA,
    )
    warmup_steps: int = option(
        0, "steps over which the learning rate rises", least=0, group=OPTIMIZER
    )
    adam_beta2: float = option(
        0.999, "decay of AdamW's second moment", least=0, below=1, group=OPTIMIZER
    )
    weight_decay: float = option(0.0, "AdamW weight decay", least=0, group=OPTIMIZER)
    max_grad_norm: float = option(
        1.0, "largest gradient norm; a larger gradient is scaled down", least=1e-6, group=OPTIMIZER
    )
    save_every: int = option(
        100, "steps between checkpoints; 0: only the final model", least=0, group=CHECKPOINTS
    )
    keep: int = option(2, "number of newest checkpoints to keep", least=1, group=CHECKPOINTS)
    export_every: int = option(
        0, "steps between models exported as model-000400/ and so on (Fig. 2); 0: none", least=0,
        group=CHECKPOINTS,
    )
    eval_every: int = option(
        0, "steps between evaluations on test images; 0: none", least=0, group=EVALUATION
    )
    eval_images: int = option(
        200, "number of test images per evaluation, the first ones", least=1, group=EVALUATION
    )
    eval_max_new_tokens: int = option(
        2048, "longest completion in an evaluation, in tokens", least=1, group=EVALUATION
    )
    tokens_per_microbatch: int = option(
        16384, "most tokens per forward pass; lower it if memory runs out", least=1, group=SPEED
    )
    gradient_checkpointing: bool = option(
        True,
        "recompute activations in backward; switched off, a step is faster and needs far more "
        "memory (default: on)", group=SPEED,
    )
    offload: bool = option(
        False, "keep weights, gradients and AdamW's state in host memory; slower", group=SPEED
    )
    timeout: float = option(
        10, "minutes that a rank waits for the others before it ends", least=0.01, group=SPEED
    )


    def __post_init__(self):
        super().__post_init__()
        if self.lora_alpha and not self.lora_rank:
            raise ValueError("--lora-alpha: only with --lora-rank")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Thinking distillation and answer supervision: SFT (Sec. 3.2).

    The first of the paper's two trainings. For each training image the model learns to write a
    teacher's reasoning, then every annotated interaction with its boxes (Eq. 1). teacher.py makes
    the traces. --out gets the trained model (model/), checkpoints and a page, report.html. Started
    with python instead of torchrun, it is one process.

        python teacher.py --data hico_20160224_det --out traces.jsonl --max-cost 60
        torchrun --nproc_per_node 8 hoi_r1.py sft --data hico_20160224_det \\
            --model Qwen/Qwen2.5-VL-3B-Instruct --traces traces.jsonl --out runs/sft
    """

    LORA_RATE = 1e-4
    traces: str = option("", "traces.jsonl from teacher.py", group=FILES, per_host=True)
    untraced: Literal["skip", "answer"] | None = option(
        None,
        "images without a trace: leave them out, or train on their answer alone; needed if more "
        "than 5 % have none (default: leave out)", group=FILES, on_resume="refuse",
    )
    batch_size: int = option(
        8, "images per optimizer step, over all ranks", least=1, paper="Sec. 4.2", group=LENGTH
    )
    max_steps: int = option(
        0, "number of optimizer steps; 0: as many as the epochs have", least=0, group=LENGTH,
        on_resume="allow",
    )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainConfig):
    """Reinforcement learning by GRPO with rewards for HOI (Sec. 3.3).

    The second training. At each step the model writes G answers for each image of a batch. They are
    rewarded for format, labels and boxes (Eqs. 6-23), and those that beat the mean of their group
    become more likely (Eqs. 2-5). --out gets the trained model (model/), checkpoints and a page,
    report.html. Started with python instead of torchrun, it is one process.

        torchrun --nproc_per_node 8 hoi_r1.py grpo --data hico_20160224_det \\
            --model runs/sft/model --out runs/grpo
    """

    LORA_RATE = 1e-5
    batch_size: int = option(
        16, "images per batch, over all ranks, each with G completions", least=1, paper="Sec. 4.2",
        group=LENGTH,
    )
    max_steps: int = option(
        40, "number of batches; 0: as many as the epochs have", least=0, paper="Sec. 4.2",
        group=LENGTH, on_resume="allow",
    )
    save_every: int = option(
        10, "steps between checkpoints; 0: only the final model", least=0, group=CHECKPOINTS
    )
    group_size: int = option(
        4, "completions per image, G", least=2, paper="Sec. 4.2", group=SAMPLING
    )
    temperature: float = option(
        1.0, "sampling temperature; log-probs use it too", least=0.01, group=SAMPLING
    )
    max_new_tokens: int = option(1024, "longest completion, in tokens", least=1, group=SAMPLING)
    updates_per_batch: int = option(
        1, "optimizer steps per batch of completions", least=1, group=LENGTH
    )
    kl_coef: float = option(
        0.04, "weight of the KL divergence from pi_ref, beta; 0: none", least=0, group=OBJECTIVE
    )
    clip_eps: float = option(0.2, "clip range of the ratio, epsilon", least=0, group=OBJECTIVE)
    ratio: Literal["token", "sequence"] = option(
        "token", "ratio of Eqs. 3-4: of each token, or of the whole output as printed",
        group=OBJECTIVE,
    )
    without: tuple[Literal["label", "iou"], ...] = option(
        (), "rewards to leave out (Table 3)", group=REWARDS
    )
    label_reward: Literal["printed", "matched"] = option(
        "printed",
        "compare labels with the image's whole set (Eqs. 14-18), or on the pairs of Eq. 21",
        group=REWARDS,
    )
    duplicate_rule: Literal["printed", "pair"] = option(
        "printed",
        "Eq. 7 duplicate: human or object box overlaps an earlier pair (printed), or both do "
        "(pair)", group=REWARDS,
    )
    duplicates_earn: Literal["labels", "nothing"] = option(
        "labels", "what a duplicate earns in Eqs. 14 and 16: its labels as printed, or nothing",
        group=REWARDS,
    )
    slots: int = option(64, "most groups sampled at a time on a rank", least=1, group=SPEED)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(StageConfig):
    """Greedy prediction for a split of HICO-DET, or for any photographs.

    With --data, --out gets predictions.jsonl, one line per image, which evaluate.py scores, and a
    page, report.html. With --image no data set is needed: the reasoning and a table of interactions
    are printed, and --out gets a picture of each photograph.

        torchrun --nproc_per_node 8 hoi_r1.py predict --data hico_20160224_det \\
            --model runs/grpo/model --out runs/test
        python hoi_r1.py predict --image photo.jpg \\
            --model runs/grpo/model --out photos
    """

    DATA_ONLY = "with --data only"
    data: str = option("", DATA, group=FILES, per_host=True)
    image: tuple[str, ...] = option(
        (), "photographs to predict, instead of --data", group=FILES, metavar="FILE"
    )
    exclude: str = option(
        "", "file with one image name a line: leave these images out", group=DATA_ONLY,
        metavar="FILE", per_host=True,
    )
    resume: bool = option(
        False, "continue the prediction in --out", group=DATA_ONLY, on_resume="allow"
    )
    split: Literal["train", "test"] = option("test", "images to predict", group=DATA_ONLY)
    limit: int = option(
        0, "predict only the first N images; evaluate.py needs the same --limit; 0: all", least=0,
        group=DATA_ONLY,
    )
    max_new_tokens: int = option(2048, "longest completion, in tokens", least=1, group=DECODING)
    repetition_penalty: float = option(
        1.0, "divides the logits of tokens already written; Qwen2.5-VL's own is 1.05", least=1,
        group=DECODING,
    )
    scores: Literal["rank", "ones", "likelihood"] = option(
        "rank",
        "falling from 1.0 to 0.5 in the order of the text, as the authors do; all 1.0; or the "
        "probability that the model gave to an instance's tokens", group=DECODING,
    )
    slots: int = option(
        0, "images decoded at once on a rank; 0: as many as fit, up to 64", least=0, group=SPEED
    )

    def __post_init__(self):
        super().__post_init__()
        if bool(self.data) == bool(self.image):
            raise ValueError("--data, --image: give one of them")
        for name, value in self.group(self.DATA_ONLY).items():
            if self.image and value != getattr(PredictConfig, name):
                raise ValueError(f"{flag_of(name)}: only with --data, not with --image")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """All of it on a drawn data set, with a tiny model, on a laptop.

    Draws people and objects in HICO-DET's format. Takes a Qwen2.5-VL of a million weights, which
    can already describe such drawings, through SFT, GRPO, prediction and mAP, by the commands of a
    real run. Ends with a table, pictures and a page, after about five minutes on two CPU cores. The
    second line shows only that everything runs: a hundredth of the steps teaches nothing.

        python hoi_r1.py demo
        python hoi_r1.py demo --steps-scale 0.01 --test-images 20 --out runs/small
    """

    DRAWINGS = "drawings"
    out: str = option("runs/demo", "folder for all that the demo writes", group=FILES)
    resume: bool = option(
        False, "go on with the demo in --out after its last finished command", group=FILES
    )
    base: str = option("", "folder of another base model than demo/base_model", group=FILES)
    train_base: bool = option(
        False, "make the base model again, from random weights", group=FILES
    )
    train_images: int = option(10000, "number of training drawings", least=1, group=DRAWINGS)
    test_images: int = option(1000, "number of held-out drawings", least=1, group=DRAWINGS)
    complete: bool = option(False, "annotate every pair of the training images", group=DRAWINGS)
    steps_scale: float = option(
        1.0, "factor for the steps and the training drawings", least=0.001, group=LENGTH
    )
    sft_steps: int = option(800, "steps of SFT", least=1, group=LENGTH)
    grpo_steps: int = option(40, "steps of GRPO", least=1, group=LENGTH)
    seed: int = option(
        0, "seed of the drawings, the data order and sampling", least=0, group=LENGTH
    )

    def __post_init__(self):
        super().__post_init__()
        if self.base and self.train_base:
            raise ValueError("--base, --train-base: give one of them")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """One HTML page of one or more runs, side by side; needs no network.

    The page tells whether a run is healthy and shows mAP, curves, rewards, examples, the APs of
    evaluate.py --json, and the command that made each run.

        python hoi_r1.py report runs/sft runs/grpo runs/test
    """

    runs: tuple[str, ...] = required(
        "folders of runs, trainings and predictions", metavar="RUN", positional=True, group=FILES
    )
    out: str = option("", "file to write, instead of report.html in the last folder", group=FILES)


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Config):
    """Pictures of images: the ground truth, and the prediction next to it.

    Each interaction has a colour, and a line from the person to the object.

        python hoi_r1.py show --data hico_20160224_det --images 20
        python hoi_r1.py show --data hico_20160224_det --worst 20 \\
            --predictions runs/test/predictions.jsonl
    """

    WHICH = "which images"
    data: str = required(DATA, group=FILES)
    predictions: str = option("", "predictions.jsonl of the split, drawn too", group=FILES)
    out: str = option("pictures", "folder for the pictures", group=FILES)
    split: Literal["train", "test"] = option("test", "images to draw", group=WHICH)
    images: int = option(
        0, "draw the first N images; 12 if no other option chooses", least=0, group=WHICH
    )
    file: str = option("", "draw the image of this file name", metavar="NAME", group=WHICH)
    worst: int = option(
        0, "draw the N images with the most missed interactions", least=0, group=WHICH
    )

    def __post_init__(self):
        super().__post_init__()
        if sum(map(bool, (self.images, self.file, self.worst))) > 1:
            raise ValueError("--images, --file, --worst: give one of them")
        if self.worst and not self.predictions:
            raise ValueError("--worst: give the predictions too, with --predictions")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Config):
    """Read every image once, and list those that cannot be used.

    An image must exist, decode fully and have its annotated size. A training stops at one that does
    not, and `--exclude bad.txt` leaves the listed ones out.

        python hoi_r1.py check --data hico_20160224_det --out bad.txt
    """

    data: str = required(DATA, group=FILES)
    split: Literal["train", "test"] | None = option(
        None, "images to read; default: those of both", group=FILES
    )
    out: str = option("", "file for the names of unusable images", metavar="FILE", group=FILES)
    workers: int = option(
        0, "images read at a time; 0: as many as there are CPUs", least=0, group=SPEED
    )


STAGES = {
    **{"sft": SFTConfig, "grpo": GRPOConfig, "predict": PredictConfig, "demo": DemoConfig},
    **{"report": ReportConfig, "show": ShowConfig, "check": CheckConfig},
}
