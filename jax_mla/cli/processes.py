"""The flags that make a command one process of several."""

import argparse

from jax_mla.cli.arguments import address, natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Every process runs the same command, with a --mesh over all their devices; only the first "
        "one prints, and writes files that exist once.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="started by SLURM, Kubernetes or Open MPI, which tell JAX the other three",
    )
    group.add_argument(
        "--coordinator",
        type=address,
        metavar="HOST:PORT",
        help="otherwise: the address on which the first process listens",
    )
    group.add_argument(
        "--process-id", type=natural, metavar="I", help="of this process, counted from 0"
    )
    group.add_argument("--num-processes", type=positive, metavar="N")


def join(args: argparse.Namespace) -> None:
    """Connects to the other processes before jax uses a device; does nothing without the flags.

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
            f"--process-id must be below --num-processes, which is {args.num_processes}, got "
            f"{args.process_id}; processes count from 0"
        )
    if not given and not args.distributed:
        return
    import jax

    # It would swallow every SIGTERM that arrives before training has installed its own handler.
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
