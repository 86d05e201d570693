"""The flags that make a command one process of several."""

import argparse

from jax_mla.cli.arguments import address, natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Every process runs the same command, on a --mesh over the devices of all; the first one "
        "prints, and writes what is written once.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="SLURM, Kubernetes or Open MPI started the processes, and JAX asks them for the rest",
    )
    group.add_argument(
        "--coordinator",
        type=address,
        metavar="HOST:PORT",
        help="where none of them did: the address at which the first process is to listen",
    )
    group.add_argument("--process-id", type=natural, metavar="I", help="from 0 on")
    group.add_argument("--num-processes", type=positive, metavar="N")


def join(args: argparse.Namespace) -> None:
    """Meets the other processes, before jax touches a device; does nothing without the flags.

    Raises:
      ValueError: the flags are incomplete or contradict each other, or no cluster was found.
    """
    by_flag = {
        "--coordinator": args.coordinator,
        "--process-id": args.process_id,
        "--num-processes": args.num_processes,
    }
    given = [flag for flag, value in by_flag.items() if value is not None]
    missing = [flag for flag in by_flag if flag not in given]
    if args.distributed and given:
        raise ValueError(f"--distributed finds out what {given[0]} says; take one of them")
    if given and missing:
        raise ValueError(f"{', '.join(given)} cannot do without {', '.join(missing)}")
    if given and args.process_id >= args.num_processes:
        raise ValueError(
            f"--process-id {args.process_id} is not one of --num-processes {args.num_processes}, "
            "which count from 0"
        )
    if not given and not args.distributed:
        return
    import jax

    # It would swallow every SIGTERM that comes before training has a handler of its own.
    jax.config.update("jax_enable_preemption_service", False)
    if given:
        jax.distributed.initialize(
            args.coordinator, num_processes=args.num_processes, process_id=args.process_id
        )
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--distributed found no SLURM, Kubernetes or Open MPI around this process ({error}); "
            "--coordinator, --process-id and --num-processes do without"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that prints."""
    import jax

    return jax.process_index() == 0
