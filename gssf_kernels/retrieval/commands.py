"""``python -m gssf_kernels eval`` and ``mine``: evaluation and mining of embeddings in files.

An error is one line that names what is wrong, and exit status 2. An output is written beside its place and renamed at
the end, so that it is never half a file; one that exists is refused without ``--force``.
"""

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from gssf_kernels.retrieval import plots
from gssf_kernels.retrieval.checkpoint import replacing
from gssf_kernels.retrieval.sources import open_rows

EMBEDDINGS = "a file .npy or .safetensors (FILE.safetensors::NAME) or a directory of such files"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(words: Sequence[str]) -> int:
    """Run a subcommand; words: the command line after ``python -m gssf_kernels``. Returns the exit status."""
    from gssf_kernels.retrieval.mine_command import add_mine  # which imports this file

    parser = Parser(
        prog="python -m gssf_kernels", description="Without a command: versions, devices and backends, for bug reports."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    add_eval(subparsers)
    add_mine(subparsers)
    options = parser.parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table has arrows, which not every terminal has
    try:
        with one_line_warnings():
            options.run(options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{options.prog}: error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings on stderr, without the line of source that they are raised from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def positive(text: str) -> int:
    """A whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return int(text)


def add_eval(subparsers) -> None:
    """The subcommand ``eval``."""
    parser = subparsers.add_parser(
        "eval",
        help="R@K, ranks, MRR, mAP, R-precision, NDCG and RSUM of embeddings in files",
        description="Evaluate retrieval between two files of embeddings, both ways. Files need not fit into memory.",
    )
    parser.add_argument("images", metavar="IMAGES", help=f"[N, D]: {EMBEDDINGS}")
    parser.add_argument("captions", metavar="CAPTIONS", help="[M, D], likewise")
    parser.add_argument(
        "--ids",
        nargs=2,
        metavar=("IMAGE_IDS", "CAPTION_IDS"),
        help="[N] and [M] integers in files; equal ids belong together. Without: row i and row i",
    )
    parser.add_argument(
        "--folds", type=positive, default=1, metavar="F", help="average over F blocks of images (COCO 1K: 5)"
    )
    parser.add_argument(
        "--k", type=positive, nargs="+", default=[1, 5, 10], metavar="K", help="the K of R@K and NDCG@K"
    )
    parser.add_argument("--normalize", action="store_true", help="scores are cosines")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="write the state to FILE, from which the same command goes on"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the measures to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw recall and ranks into this file (matplotlib)"
    )
    parser.add_argument("--force", action="store_true", help="replace outputs that exist")
    parser.set_defaults(run=run_eval, prog=parser.prog)


def run_eval(options: argparse.Namespace) -> None:
    from gssf_kernels.retrieval.streaming import evaluate_files

    outputs = [(path, name) for path, name in ((options.json, "--json"), (options.plot, "--plot")) if path is not None]
    for path, name in outputs:
        check_output(path, name, options.force)
    if len({path.resolve() for path, _ in outputs}) < len(outputs):
        raise ValueError(f"--plot: expected another file than --json, got {options.plot}")
    if options.plot is not None:
        plots.require_matplotlib()
    if options.ids is None:
        check_rows_pair(options.images, options.captions)
    result = evaluate_files(
        options.images,
        options.captions,
        *(options.ids or (None, None)),
        ks=tuple(options.k),
        folds=options.folds,
        normalize=options.normalize,
        checkpoint=options.checkpoint,
        progress=sys.stderr.isatty(),
    )
    if options.json is not None:
        with written(options.json, "--json", options.force) as path:
            path.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    if options.plot is not None:
        with written(options.plot, "--plot", options.force) as path:
            plots.save_plot(result, path, "image", "caption")
    print(result.table("image", "caption"))


def check_rows_pair(images: str, captions: str) -> None:
    """Without ids, row i of the images and row i of the captions are a pair."""
    with (
        contextlib.closing(open_rows(images, "IMAGES", "embeddings")) as x,
        contextlib.closing(open_rows(captions, "CAPTIONS", "embeddings")) as y,
    ):
        n, m = x.shape[0], y.shape[0]
    if n == m:
        return
    hint = "pass --ids IMAGE_IDS CAPTION_IDS, files of integers that are equal where they belong together"
    if n and m % n == 0:
        hint += f"; with {m // n} captions after one another: numpy.arange({n}) and numpy.arange({n}).repeat({m // n})"
    raise ValueError(f"CAPTIONS: expected {n} rows as in IMAGES (row i pairs with row i), got {m}: {hint}")


def check_output(path: Path, name: str, force: bool) -> None:
    """An output can be written, and does not replace a file without ``--force``."""
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the directory {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: expected a file in a directory that exists, got {path}")
    if path.exists() and not force:
        raise ValueError(f"{name}: expected a file that does not exist, or --force, got {path}")


@contextlib.contextmanager
def written(path: Path, name: str, force: bool) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place at the end, or is removed if an error is raised."""
    with replacing(path) as file:
        yield Path(file.name)
        check_output(path, name, force)  # again: it may have come meanwhile


__all__ = ["main"]
