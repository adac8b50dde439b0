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
samples and is refreshed after each batch; pi_ref, frozen, only where --kl-coef is above 0.

Data order and sampling seeds are pure functions of (seed, step, place in the batch), and losses are
divided by counts over all ranks and micro-batches: world size and `--resume` do not change the run.
"""

import dataclasses
import os
import sys
from importlib.metadata import version

from engine import configs
from engine.options import parse_stage


def parse_config(argv: list[str] | None = None):
    """The config of the stage that the command line names. Exits on --help and on a typo."""
    return parse_stage(configs.STAGES, "\n\n".join(__doc__.split("\n\n")[:2]), argv)


def pin_exact_sizes() -> None:
    """Let pinned memory (`--offload`) have the sizes asked for, unless the user chose otherwise.

    PyTorch rounds each tensor up to a power of two: 76 GB for the 60 GB of a 3B model. It reads
    this variable when it is imported. Before 2.13 it does not know the name.
    """
    release = tuple(int(part) for part in version("torch").split(".")[:2])
    if release >= (2, 13) and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "pinned_max_round_threshold_mb:1")


def run_stage(config) -> None:
    """Run the stage of a config. Its module is imported here: torch takes seconds."""
    pin_exact_sizes()
    if isinstance(config, configs.DemoConfig):
        from demo.run import run_demo

        run_demo(config)
    elif isinstance(config, configs.ReportConfig):
        from engine.report.page import write_page

        print(write_page(config.runs, config.out))
    elif isinstance(config, configs.ShowConfig):
        from engine.report.pictures import show

        for line in show(**dataclasses.asdict(config)):
            print(line, flush=True)
    elif isinstance(config, configs.CheckConfig):
        from engine.data.image_check import check

        for line in check(**dataclasses.asdict(config)):
            print(line, flush=True)
    elif isinstance(config, configs.PredictConfig):
        from predict import predict, predict_photographs

        (predict_photographs if config.image else predict)(config)
    else:
        import train

        (train.sft if isinstance(config, configs.SFTConfig) else train.grpo)(config)


def main(argv: list[str] | None = None) -> None:
    """The command line. What the user must fix is one line; all else keeps its traceback."""
    config = parse_config(argv)
    from engine.signals import RESUME, one_line

    resumable = isinstance(config, configs.StageConfig) and not config.dry_run
    resumable = resumable and not getattr(config, "image", ())
    with one_line("", RESUME if resumable else ""):
        try:
            run_stage(config)
        finally:
            leave_ranks(failed=sys.exc_info()[0] is not None)


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
