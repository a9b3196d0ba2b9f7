"""python -m bench: time and memory of our ops, of plain PyTorch and of other packages, each checked before it is timed.

python -m bench list                                            ops, ways to compute them, suites
python -m bench run --op triplet --sizes 1024,4096 --against naive,compile,pml
python -m bench suite quick                                     into bench/results/<device>-quick.json
python -m bench report bench/results/cpu-quick.json --into docs/benchmarks.md README.md
python -m bench compare before.json after.json                  exit status 1 where ratios differ
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from bench import compare, peers, plots, report, results, suites, versus
from bench.measure import CEILING, Case
from bench.ops import OPS
from bench.runner import Entry, Plan, Run

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CEILING}


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def chosen(parser: Parser, option: str, value: str, choices) -> str:
    """value, if it is one of choices; else one line that names them."""
    if value not in choices:
        why = " (PyTorch sees no CUDA device here)" if value == "cuda" else ""
        parser.error(f"{option}: expected one of {', '.join(choices)}{why}, got {value!r}")
    return value


def whole_numbers(parser: Parser, option: str, text: str) -> list[int]:
    values = text.split(",")
    if not all(v.isdigit() and int(v) > 0 for v in values):
        parser.error(f"{option}: expected whole numbers >= 1 with commas between, got {text!r}")
    return [int(v) for v in values]


def plan_of(parser: Parser, arguments: argparse.Namespace) -> list[Entry]:
    """The cases of `run`."""
    op = OPS[chosen(parser, "--op", arguments.op, OPS)]
    device = chosen(parser, "--device", arguments.device, devices())
    serving = peers.serving(op.name)
    ways = [name for name in op.variants if name != "ours"] + serving + sorted(arguments.user_variants)
    wanted = ways if arguments.against == "all" else [name for name in arguments.against.split(",") if name]
    for name in wanted:
        chosen(parser, "--against", name, [*ways, "all"])
    for name in arguments.user_variants:
        if name in op.variants or name in peers.PEERS:
            parser.error(f"--variant: expected a name of its own, got {name!r}")
    wanted += [name for name in arguments.user_variants if name not in wanted]
    entries = []
    for dtype in arguments.dtype.split(","):
        chosen(parser, "--dtype", dtype, DTYPES)
        for d in whole_numbers(parser, "--dim", arguments.dim):
            block = min(arguments.block, d)
            if block < 1 or d % block:
                parser.error(f"--block: expected a divisor of --dim {d}, got {arguments.block}")
            for n in whole_numbers(parser, "--sizes", arguments.sizes):
                if n < 2:
                    parser.error(f"--sizes: expected at least 2 (a negative for each row), got {n}")
                names = ("ours", *wanted)
                memory = names if arguments.memory else ()
                turns = arguments.turns or 5, arguments.turns or 41
                case = Case(op.name, n, d, block, dtype, device)
                entries.append(Entry(case, names, memory, arguments.seconds, *turns))
    return entries


def own_variant(text: str) -> tuple[str, str]:
    name, _, target = text.partition("=")
    if not name or ":" not in target:
        raise argparse.ArgumentTypeError(f"expected NAME=MODULE:FUNCTION, got {text!r}")
    return name, target


def command_line() -> str:
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


def measured(arguments: argparse.Namespace, entries: list[Entry], out: Path) -> int:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ends a run as gently
    book = Run(Plan(entries, command_line(), dict(getattr(arguments, "user_variants", {}))), out)()
    print(report.summary(book))
    print()
    print(report.details(book))
    print(f"\nwritten to {out}; `python -m bench report {out}` makes a page of it")
    return 130 if book["interrupted"] else 0


def run(parser: Parser, arguments: argparse.Namespace) -> int:
    arguments.user_variants = dict(arguments.variant)
    return measured(arguments, plan_of(parser, arguments), arguments.out or results.FOLDER / "run.json")


def suite(parser: Parser, arguments: argparse.Namespace) -> int:
    build = suites.SUITES[chosen(parser, "suite", arguments.name, suites.SUITES)]
    device = chosen(parser, "--device", arguments.device or devices()[-1], devices())
    entries = build(device)
    without = [name for name in arguments.without.split(",") if name]
    for name in without:
        chosen(parser, "--without", name, sorted({name for entry in entries for name in entry.variants} - {"ours"}))
    entries = [
        entry._replace(variants=tuple(name for name in entry.variants if name not in without)) for entry in entries
    ]
    return measured(arguments, entries, arguments.out or results.FOLDER / f"{device}-{arguments.name}.json")


def list_all(parser: Parser, arguments: argparse.Namespace) -> int:
    for op in OPS.values():
        ways = [name for name in op.variants if name != "ours" or op.variants["ours"]()]
        print(f"{op.name:18} {op.summary}\n{'':18} {', '.join([*ways, *peers.serving(op.name)])}")
    print("\npeers")
    for name in peers.PEERS:
        adapter = peers.adapter(name)
        print(f"  {name:22} {adapter.PACKAGE} {peers.version(name) or 'not installed'} ({', '.join(adapter.DEVICES)})")
    print(f"\nsuites   {', '.join(suites.SUITES)}\ndtypes   {', '.join(DTYPES)}\ndevices  {', '.join(devices())}")
    return 0


def make_report(parser: Parser, arguments: argparse.Namespace) -> int:
    book = results.load(arguments.file)
    page, picture = arguments.file.with_suffix(".md"), arguments.file.with_suffix(".png")
    roofline = arguments.file.with_name(arguments.file.stem + "-roofline.png")
    try:
        drawn, roofed = plots.draw(book, picture), plots.draw_roofline(book, roofline)
    except ImportError:
        drawn, roofed = picture.exists(), roofline.exists()
        print("plots left as they are: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    page.write_text(report.whole(book, picture.name if drawn else None, roofline.name if roofed else None))
    print(f"wrote {', '.join(map(str, [page, *[picture] * drawn, *[roofline] * roofed]))}")
    for target in arguments.into:
        plot = Path(os.path.relpath(picture, target.parent)).as_posix() if drawn else None
        report.into(target, book, plot)
        print(f"wrote the results into {target}")
    return 0


def make_comparison(parser: Parser, arguments: argparse.Namespace) -> int:
    page, agree = compare.page(results.load(arguments.before), results.load(arguments.after))
    print(page)
    return 0 if agree else 1


def make_versus(parser: Parser, arguments: argparse.Namespace) -> int:
    device = chosen(parser, "--device", arguments.device, devices())
    chosen(parser, "--dtype", arguments.dtype, DTYPES)
    n, d = (whole_numbers(parser, *option)[0] for option in (("--size", arguments.size), ("--dim", arguments.dim)))
    names = arguments.ops.split(",")
    for name in names:
        chosen(parser, "--ops", name, OPS)
        chosen(parser, "--way", arguments.way, OPS[name].variants)
    if d % min(32, d):
        parser.error(f"--dim: expected a multiple of 32, got {d}")
    cases = [Case(name, n, d, min(32, d), arguments.dtype, device) for name in names]
    print(versus.table(cases, arguments.way, arguments.seconds, command_line()))
    return 0


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    command = commands.add_parser("list", help="ops, ways to compute them, suites")
    command.set_defaults(act=list_all)

    command = commands.add_parser("run", help="one op at chosen sizes")
    command.add_argument("--op", required=True, help="see `list`")
    command.add_argument("--sizes", default="1024", help="N, commas between; default 1024")
    command.add_argument("--dim", default="512", help="D, commas between; default 512")
    command.add_argument("--block", type=int, default=32, help="width of the metric's channel blocks; default 32")
    command.add_argument("--dtype", default="float32", help=f"commas between: {', '.join(DTYPES)}")
    command.add_argument("--device", default=devices()[-1], help="cpu or cuda")
    command.add_argument("--against", default="naive", help="commas between, or all; see `list`")
    command.add_argument("--variant", action="append", default=[], type=own_variant, metavar="NAME=MODULE:FUNCTION",
                         help="a way of your own: a function of bench.problem.Problem")  # fmt: skip
    command.add_argument("--seconds", type=float, default=8.0, help="to spend on each case's turns; default 8")
    command.add_argument("--turns", type=int, help="exactly so many turns instead")
    command.add_argument("--memory", action="store_true", help="peak memory too, each in a fresh process")
    command.add_argument("--out", type=Path, help="default bench/results/run.json")
    command.set_defaults(act=run)

    command = commands.add_parser("suite", help="a fixed set of cases")
    command.add_argument("name", help=" or ".join(suites.SUITES))
    command.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    command.add_argument("--without", default="", help="variants to leave out, commas between")
    command.add_argument("--out", type=Path, help="default bench/results/<device>-<suite>.json")
    command.set_defaults(act=suite)

    command = commands.add_parser("versus", help="different ops side by side")
    command.add_argument("--ops", required=True, help="commas between; ratios are to the first")
    command.add_argument("--size", default="1024", help="N; default 1024")
    command.add_argument("--dim", default="512", help="D; default 512")
    command.add_argument("--dtype", default="float32", help=f"one of {', '.join(DTYPES)}")
    command.add_argument("--device", default=devices()[-1], help="cpu or cuda")
    command.add_argument("--way", default="ours", help="ours, naive or compile")
    command.add_argument("--seconds", type=float, default=8.0, help="to spend on turns; default 8")
    command.set_defaults(act=make_versus)

    command = commands.add_parser("report", help="a page and plots from a result file")
    command.add_argument("file", type=Path)
    command.add_argument("--into", type=Path, nargs="+", default=[], metavar="PAGE",
                         help="Markdown pages, to write the tables between their bench marks")  # fmt: skip
    command.set_defaults(act=make_report)

    command = commands.add_parser("compare", help="whether two files' ratios agree")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.set_defaults(act=make_comparison)

    arguments = parser.parse_args()
    try:
        return arguments.act(parser, arguments)
    except results.ResultError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
