"""HOI-R1: supervised fine-tuning, GRPO with HOI rewards, prediction (Secs. 3.2, 3.3, 4.2).

    # all stages on a data set of drawings, on a laptop
    python hoi_r1.py demo
    # the paper's model: SFT on traces of teacher.py, GRPO, prediction, mAP
    torchrun --nproc_per_node 8 hoi_r1.py sft --data hico_20160224_det \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --traces traces.jsonl --out runs/sft
    torchrun --nproc_per_node 8 hoi_r1.py grpo --data hico_20160224_det \\
        --model runs/sft/model --out runs/grpo
    torchrun --nproc_per_node 8 hoi_r1.py predict --data hico_20160224_det \\
        --model runs/grpo/model --out runs/test
    python evaluate.py runs/test/predictions.jsonl --data hico_20160224_det
    # can every image be read?
    python hoi_r1.py check --data hico_20160224_det
    # a page of all runs; pictures of the images with the most misses
    python hoi_r1.py report runs/sft runs/grpo runs/test
    python hoi_r1.py show --data hico_20160224_det --worst 20 \\
        --predictions runs/test/predictions.jsonl

Plain `python` runs one process. There are three policies. pi_theta is trained: fp32 weights that
FSDP2 shards over the ranks, bf16 computation on a GPU. pi_old samples: a replica on every rank,
refreshed after each batch. pi_ref is frozen, and loaded only if --kl-coef is above 0.

Data order and sampling seeds depend only on (seed, step, place in the batch). Losses are divided by
counts over all ranks and micro-batches. So world size and `--resume` do not change the run.
"""

import dataclasses
import os
import sys
from importlib.metadata import version

from engine import configs
from engine.options import parse_stage


def parse_config(argv: list[str] | None = None):
    """The config of the stage that the command line names. Exits on --help and on errors."""
    return parse_stage(configs.STAGES, "\n\n".join(__doc__.split("\n\n")[:2]), argv)


def pin_exact_sizes() -> None:
    """Allocate pinned memory (`--offload`) without rounding, unless the user set the allocator.

    PyTorch rounds each tensor up to a power of two: 76 GB for the 60 GB of a 3B model. It reads
    this variable at import, and knows the name from 2.13 on.
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
    elif isinstance(config, configs.ShowConfig | configs.CheckConfig):
        from engine.data.image_check import check
        from engine.report.pictures import show

        lines_of = show if isinstance(config, configs.ShowConfig) else check
        for line in lines_of(**dataclasses.asdict(config)):
            print(line, flush=True)
    elif isinstance(config, configs.PredictConfig):
        from predict import predict, predict_photographs

        (predict_photographs if config.image else predict)(config)
    else:
        import train

        (train.sft if isinstance(config, configs.SFTConfig) else train.grpo)(config)


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's fault prints one line; any other error keeps its traceback."""
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
