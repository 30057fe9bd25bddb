"""`paella-diffusers batch`: what can be refused is refused before the model is loaded."""

import argparse
import functools
import importlib.util
import os
from pathlib import Path

from .. import EMOJI_MODEL
from ..about import pip_install
from ..apps import BATCH_LAYOUTS, BATCH_OUTPUTS
from .checks import HUB_ID, check_adapters, local_model
from .draw import arguments, load
from .model_options import MAX_SEED, MOST, add_model_options, add_sampling_options
from .values import number, size

MADE_WITH = ("model", "revision", "variant", "lora", "lora_scale", "no_prior", "low_memory", "dtype")  # of the options


def add_batch(commands):
    """The command and its options."""
    parser = commands.add_parser(
        "batch",
        usage="paella-diffusers batch PROMPTS --out FOLDER [OPTION ...]",
        help="generate very many pictures",
        description="Generate a picture for each row of a file or a dataset. A row has a prompt, and any arguments of the "
        f"pipeline's call. Start the same command again to go on after an interruption. It needs `{pip_install('batch')}`.",
    )
    parser.set_defaults(run=batch)
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="a file of JSON lines, CSV or Parquet (.jsonl, .csv, .parquet), local or at an address such as "
        "s3://bucket/prompts.jsonl, or a dataset of the Hub",
    )
    _add_input(parser.add_argument_group("input"))
    _add_output(parser.add_argument_group("output"))
    _add_running(parser.add_argument_group("running"))
    sampling = parser.add_argument_group("sampling", "for rows that do not say otherwise")
    sampling.add_argument(
        "--size", type=size, metavar="N or WxH", help="size of the pictures in pixels (default: the model's own)"
    )
    add_sampling_options(sampling, steps="the model's own, mostly 12")
    add_model_options(parser.add_argument_group("model"))


def batch(args: argparse.Namespace):
    """Draw what is not done yet, and say what is."""
    rank, world_size = _place()
    columns = _check(args, world_size)
    # processes of a cluster run in other folders
    args.prompts, args.model, *args.lora = map(_absolute, (args.prompts, args.model, *args.lora))
    args.out = args.out if "://" in args.out else os.path.abspath(args.out)

    import torch  # seconds, from here on

    from ..apps.batch import Job, run
    from ..apps.batch_input import BatchInput

    if world_size > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    processes = args.processes
    if processes is None and args.engine is None:
        alone_on_gpus = args.device in (None, "cuda") and world_size == 1
        processes = max(1, torch.cuda.device_count()) if alone_on_gpus else 1
    made_with = {name: getattr(args, name) for name in MADE_WITH if getattr(args, name)}
    made_with["model"] = "the embedded model" if args.model == EMOJI_MODEL else str(args.model)
    job = Job(
        BatchInput(args.prompts, args.split, columns, arguments(args, {}), args.seed),
        args.out,
        args.layout,
        args.output,
        args.shard_size,
        args.batch_size,
        args.threads,
        args.max_errors,
        made_with | ({"scheduler": args.scheduler} if args.scheduler else {}),
    )
    result = run(job, functools.partial(load, args), processes, rank, world_size, args.engine)
    if rank == 0:
        refused = f"; {result.errors} rows were refused: see *.errors.jsonl" if result.errors else ""
        print(f"{args.out}: {result.shards_done} of {result.num_shards} shards{refused}")


def _absolute(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source


def _place() -> tuple[int, int]:
    """Which process this is, and of how many, as launchers tell it."""
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < world_size:  # shards would be left out
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world_size}: set both, RANK from 0 to WORLD_SIZE - 1, or neither.")
    return rank, world_size


def _check(args, world_size: int) -> dict[str, str]:
    """Refuse what cannot work; the columns by argument."""
    from ..apps.batch_input import BatchInput

    kind = BatchInput(args.prompts).format
    is_dataset = kind == "dataset" and not os.path.isdir(args.prompts)
    if kind != "dataset" and "://" not in args.prompts and not os.path.isfile(args.prompts):
        raise ValueError(f"PROMPTS {args.prompts}: there is no such file.")
    if is_dataset and (os.path.exists(args.prompts) or not HUB_ID.fullmatch(args.prompts)):
        raise ValueError(f"PROMPTS {args.prompts}: give a .jsonl, .csv or .parquet file, or a dataset of the Hub.")
    if kind in (".parquet", "dataset") and importlib.util.find_spec("datasets") is None:
        raise ValueError(f"PROMPTS {args.prompts} needs the package datasets: {pip_install('batch')}")
    if args.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError(f"--engine ray needs Ray: {pip_install('ray')}")
    if "://" not in args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file: give a folder.")
    if world_size > 1 and (args.engine == "ray" or (args.processes or 1) > 1):
        raise ValueError("--processes and --engine ray start processes themselves: do not start them under a launcher.")
    check_adapters(args)
    local_model(args)
    columns = {}
    for column in args.columns or ():
        argument, equals, name = column.partition("=")
        if not (argument and equals and name):
            raise ValueError(f"--columns {column}: give ARGUMENT=COLUMN, such as prompt=caption.")
        columns[argument] = name
    if columns and "prompt" not in columns:
        raise ValueError("--columns must name the prompts' column as well: prompt=COLUMN.")
    return columns


def _add_input(group):
    group.add_argument(
        "--columns",
        nargs="+",
        metavar="ARGUMENT=COLUMN",
        help="the columns to read, such as prompt=caption key=id; others are ignored (default: all, each by its own name: "
        "key, prompt, seed, and arguments of the pipeline's call)",
    )
    group.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")


def _add_output(group):
    group.add_argument("--out", required=True, metavar="FOLDER", help="a folder, or an address such as s3://bucket/folder")
    group.add_argument(
        "--layout",
        choices=BATCH_LAYOUTS,
        default="webdataset",
        help="shards are WebDataset archives, or folders of plain files (default: %(default)s)",
    )
    group.add_argument(
        "--output",
        choices=BATCH_OUTPUTS,
        default="png",
        help="format of the pictures, or tokens for the token grids and their initial noise (default: %(default)s)",
    )
    many = number(int, at_least=1, at_most=1_000_000)
    group.add_argument("--shard-size", type=many, default=512, metavar="N", help="rows of a shard (default: %(default)s)")
    group.add_argument(
        "--max-errors",
        type=number(int, at_least=0),
        metavar="N",
        help="end when more than N rows were refused; they are listed in *.errors.jsonl (default: go on)",
    )


def _add_running(group):
    many = number(int, at_least=1, at_most=MOST)
    group.add_argument(
        "--batch-size", type=many, default=16, metavar="N", help="rows generated together (default: %(default)s)"
    )
    group.add_argument(
        "--processes",
        type=many,
        metavar="N",
        help="processes on this machine (default: one for each GPU, or 1); with --engine ray the most actors (default: as "
        "many as there is room for)",
    )
    group.add_argument(
        "--threads", type=many, default=1, metavar="N", help="CPU threads of each process (default: %(default)s)"
    )
    group.add_argument("--engine", choices=("ray",), help="draw in a Ray cluster, through Ray Data")
    group.add_argument(
        "--seed",
        type=number(int, at_least=0, at_most=MAX_SEED),
        default=0,
        metavar="N",
        help="a row's seed comes from this number and the row's key (default: 0)",
    )
