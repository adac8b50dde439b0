"""All options of all stages, each defined once with its default, help and section of the paper.

docs/options.md is written from these classes. Only the standard library is imported, so that --help
is fast.
"""

from dataclasses import dataclass
from typing import Literal

from engine.options import Config, flag_of, option, required

FILES = "input and output"
PROMPT = "prompt and answer (Fig. 4)"  # the fields of examples.PromptOptions
LENGTH = "length and order of the run"
SAMPLING = "sampling (Sec. 3.3)"
OBJECTIVE = "objective (Eqs. 2-5)"
REWARDS = "rewards (Eqs. 6-23)"  # each is a keyword of rewards.total_reward
OPTIMIZER = "optimizer"
LORA = "LoRA (not in the paper)"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation while training"
DECODING = "decoding and scores"  # with SPEED, the keywords of predict.predict_rows
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
    model: str = required("folder or hub name of a Qwen-VL model", group=FILES, per_host=True)
    adapter: str = option(
        "", "LoRA adapter for --model, ours or peft's; a training continues it", group=FILES,
        metavar="DIR", per_host=True,
    )
    data: str = required(DATA, group=FILES, per_host=True)
    exclude: str = option(
        "", "leave out the images that this file lists, one name per line; `check --out` writes it",
        group=FILES, metavar="FILE", per_host=True,
    )
    out: str = required("folder for everything the run writes", group=FILES, per_host=True)
    resume: bool = option(False, "continue the run in --out from its last checkpoint", group=FILES)
    dry_run: bool = option(False, "print only the first sample, as the model sees it", group=FILES)
    thinking: bool | None = option(
        None, "ask for reasoning first (Table 2); default: as --model was trained, else on",
        group=PROMPT,
    )
    task_description: bool | None = option(
        None, "list the valid classes in the prompt (Table 2); default: as --model was trained, "
        "else on", group=PROMPT,
    )
    box_frame: Literal["model", "original", "thousand"] | None = option(
        None,
        "units of boxes in the text: pixels of the resized image that the model sees, pixels of "
        "the original image, or thousandths of each side; default: as --model was trained",
        group=PROMPT,
    )
    text_first: bool | None = option(
        None, "put the image after the text, which is then computed once for all images: faster, "
        "but not the authors' prompt; default: as --model was trained, else off", group=PROMPT,
    )
    workers: int = option(
        2, "processes per rank that read images; 0: none, the rank reads them itself", least=0,
        group=SPEED, per_host=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """Options shared by sft and grpo; defaults are Sec. 4.2 or the readings of docs/paper.md."""

    seed: int = option(
        0, "seed of data order and sampling", least=0, below=2**63, group=LENGTH
    )
    epochs: int = option(
        1, "passes over the training images if --max-steps is 0", least=1, paper="Sec. 4.2",
        group=LENGTH, on_resume="allow",
    )
    learning_rate: float | None = option(
        None, "peak learning rate of AdamW (default: 1e-6, Sec. 4.2; with LoRA 1e-4 in sft, 1e-5 "
        "in grpo)", least=0, group=OPTIMIZER, on_resume="note",
    )
    lora_rank: int = option(0, "rank of LoRA adapters; 0: train all weights", least=0, group=LORA)
    lora_alpha: float | None = option(
        None, "LoRA alpha; adapters are scaled by alpha / rank (default: twice the rank)",
        least=0.001, group=LORA,
    )
    warmup_steps: int = option(0, "steps until the learning rate peaks", least=0, group=OPTIMIZER)
    adam_beta2: float = option(
        0.999, "decay of AdamW's second moment", least=0, below=1, group=OPTIMIZER
    )
    weight_decay: float = option(0.0, "AdamW weight decay", least=0, group=OPTIMIZER)
    max_grad_norm: float = option(1.0, "clip gradients to this norm", least=1e-6, group=OPTIMIZER)
    save_every: int = option(100, "steps between checkpoints; 0: none", least=0, group=CHECKPOINTS)
    keep: int = option(2, "number of newest checkpoints to keep", least=1, group=CHECKPOINTS)
    export_every: int = option(
        0, "steps between exports of model-000400/ and so on (Fig. 2); 0: none", least=0,
        group=CHECKPOINTS,
    )
    eval_every: int = option(0, "steps between evaluations; 0: none", least=0, group=EVALUATION)
    eval_images: int = option(200, "evaluate on the first N test images", least=1, group=EVALUATION)
    eval_max_new_tokens: int = option(
        2048, "longest completion in an evaluation, in tokens", least=1, group=EVALUATION
    )
    tokens_per_microbatch: int = option(
        16384, "most tokens per forward pass; lower it if memory runs out", least=1, group=SPEED
    )
    gradient_checkpointing: bool = option(
        True, "recompute activations in backward; off: faster steps, far more memory (default: on)",
        group=SPEED,
    )
    offload: bool = option(
        False, "keep weights, gradients and AdamW's state in host memory; slower", group=SPEED
    )
    timeout: float = option(
        10, "minutes to wait for other ranks", least=0.01, below=1e6, group=SPEED
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_alpha and not (self.lora_rank or self.adapter):
            raise ValueError("--lora-alpha: only with --lora-rank or --adapter")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Thinking distillation and answer supervision: SFT (Sec. 3.2).

    The first of the paper's two trainings. For each training image the model learns to write a
    teacher's reasoning, then every annotated interaction with its boxes (Eq. 1). teacher.py makes
    the traces. --out gets the trained model (model/), checkpoints and a page, report.html. For one
    process, use python instead of torchrun.

        python teacher.py --data hico_20160224_det --out traces.jsonl --max-cost 60
        torchrun --nproc_per_node 8 hoi_r1.py sft --data hico_20160224_det \\
            --model Qwen/Qwen2.5-VL-3B-Instruct --traces traces.jsonl --out runs/sft
    """

    LORA_RATE = 1e-4
    traces: str = option("", "traces.jsonl from teacher.py", group=FILES, per_host=True)
    untraced: Literal["skip", "answer"] | None = option(
        None,
        "leave out images without a trace, or train on their answer alone; required if more than "
        "5 % have no trace (default: skip)", group=FILES, on_resume="refuse",
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

    The second training. At each step the model writes G answers for each image of a batch. Rewards
    score their format, labels and boxes (Eqs. 6-23). Answers above the mean of their group become
    more likely (Eqs. 2-5). --out gets the trained model (model/), checkpoints and a page,
    report.html. For one process, use python instead of torchrun.

        torchrun --nproc_per_node 8 hoi_r1.py grpo --data hico_20160224_det \\
            --model runs/sft/model --out runs/grpo
    """

    LORA_RATE = 1e-5
    batch_size: int = option(
        16, "images per batch, over all ranks", least=1, paper="Sec. 4.2", group=LENGTH
    )
    max_steps: int = option(
        40, "number of batches; 0: as many as the epochs have", least=0, paper="Sec. 4.2",
        group=LENGTH, on_resume="allow",
    )
    save_every: int = option(10, "steps between checkpoints; 0: none", least=0, group=CHECKPOINTS)
    group_size: int = option(
        4, "completions per image, G", least=2, paper="Sec. 4.2", group=SAMPLING
    )
    temperature: float = option(
        1.0, "sampling temperature; log-probs use it too", least=0.01, group=SAMPLING
    )
    max_new_tokens: int = option(1024, "longest completion, in tokens", least=1, group=SAMPLING)
    updates_per_batch: int = option(1, "optimizer steps per batch", least=1, group=LENGTH)
    kl_coef: float = option(
        0.04, "weight of the KL divergence from pi_ref, beta; 0: none", least=0, group=OBJECTIVE
    )
    clip_eps: float = option(0.2, "clip range of the ratio, epsilon", least=0, group=OBJECTIVE)
    ratio: Literal["token", "sequence"] = option(
        "token", "ratio of Eqs. 3-4: per token, or of the whole output as printed", group=OBJECTIVE
    )
    without: tuple[Literal["label", "iou"], ...] = option(
        (), "rewards to leave out (Table 3)", group=REWARDS
    )
    label_reward: Literal["printed", "matched"] = option(
        "printed", "compare labels with all labels of the image (printed, Eqs. 14-18), or within "
        "the pairs of Eq. 21 (matched)", group=REWARDS,
    )
    duplicate_rule: Literal["printed", "pair"] = option(
        "printed",
        "Eq. 7 duplicate: human or object box overlaps an earlier pair (printed), or both do "
        "(pair)", group=REWARDS,
    )
    duplicates_earn: Literal["labels", "nothing"] = option(
        "labels", "a duplicate earns label rewards (Eqs. 14 and 16) as printed, or nothing",
        group=REWARDS,
    )
    slots: int = option(64, "most groups sampled at a time on a rank", least=1, group=SPEED)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(StageConfig):
    """Greedy prediction for a split of HICO-DET, or for any photographs.

    With --data, --out gets predictions.jsonl, which evaluate.py scores, and a page, report.html.
    With --image, no data set is needed: it prints the reasoning and a table of interactions, and
    --out gets a picture of each photograph.

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
        "", "predict nothing for the images that this file lists, one name per line",
        group=DATA_ONLY, metavar="FILE", per_host=True,
    )
    resume: bool = option(False, "continue the run in --out", group=DATA_ONLY, on_resume="allow")
    split: Literal["train", "test"] = option("test", "images to predict", group=DATA_ONLY)
    limit: int = option(
        0, "predict only the first N images; evaluate.py needs the same --limit; 0: all", least=0,
        group=DATA_ONLY,
    )
    max_new_tokens: int = option(2048, "longest completion, in tokens", least=1, group=DECODING)
    repetition_penalty: float = option(
        1.0, "divides the logits of tokens already written; Qwen2.5-VL's default is 1.05", least=1,
        group=DECODING,
    )
    scores: Literal["rank", "ones", "likelihood"] = option(
        "rank", "rank: from 1.0 down to 0.5 in the order of the text, as the authors do; ones: all "
        "1.0; likelihood: the probability of the instance's tokens", group=DECODING,
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
    """The whole pipeline on a data set of drawings, with a tiny model, on a laptop.

    Draws people and objects in HICO-DET's format. Then runs SFT, GRPO, prediction and mAP by the
    commands of a real run, with a Qwen2.5-VL of a million weights that can already describe such
    drawings. Ends with a table, pictures and a page, after about five minutes on two CPU cores. The
    second line below only checks that everything runs; in 1 % of the steps nothing is learned.

        python hoi_r1.py demo
        python hoi_r1.py demo --steps-scale 0.01 --test-images 20 --out runs/small
    """

    DRAWINGS = "drawings"
    out: str = option("runs/demo", "folder for everything the demo writes", group=FILES)
    resume: bool = option(False, "continue the demo in --out after its last command", group=FILES)
    base: str = option("", "base model to use instead of demo/base_model", group=FILES)
    train_base: bool = option(False, "train the base model from random weights", group=FILES)
    train_images: int = option(10000, "number of training drawings", least=1, group=DRAWINGS)
    test_images: int = option(1000, "number of held-out drawings", least=1, group=DRAWINGS)
    complete: bool = option(False, "annotate every pair of the training images", group=DRAWINGS)
    steps_scale: float = option(
        1.0, "factor for the steps and the training drawings", least=0.001, group=LENGTH
    )
    sft_steps: int = option(800, "steps of SFT", least=1, group=LENGTH)
    grpo_steps: int = option(40, "steps of GRPO", least=1, group=LENGTH)
    seed: int = option(0, "seed of the drawings, data order and sampling", least=0, group=LENGTH)

    def __post_init__(self):
        super().__post_init__()
        if self.base and self.train_base:
            raise ValueError("--base, --train-base: give one of them")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """One HTML page of one or more runs, side by side; needs no network.

    The page judges whether a run is healthy. It shows mAP, curves, rewards, examples, the APs of
    evaluate.py --json, and the command of each run.

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
    worst: int = option(0, "draw the N images with most missed interactions", least=0, group=WHICH)

    def __post_init__(self):
        super().__post_init__()
        if sum(map(bool, (self.images, self.file, self.worst))) > 1:
            raise ValueError("--images, --file, --worst: give one of them")
        if self.worst and not self.predictions:
            raise ValueError("--worst: give the predictions too, with --predictions")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Config):
    """Read every image once, and list those that cannot be used.

    Each image must exist, decode fully and have its annotated size. A training stops at an image
    that does not; `--exclude bad.txt` leaves the listed images out.

        python hoi_r1.py check --data hico_20160224_det --out bad.txt
    """

    data: str = required(DATA, group=FILES)
    split: Literal["train", "test"] | None = option(
        None, "images to read; default: those of both", group=FILES
    )
    out: str = option("", "file for the names of unusable images", metavar="FILE", group=FILES)
    workers: int = option(0, "images read at a time; 0: one per CPU", least=0, group=SPEED)


STAGES = {
    **{"sft": SFTConfig, "grpo": GRPOConfig, "predict": PredictConfig, "demo": DemoConfig},
    **{"report": ReportConfig, "show": ShowConfig, "check": CheckConfig},
}
