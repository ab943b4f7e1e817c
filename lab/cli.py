"""
The command line: flags, exit codes, and errors in one line.
"""
import argparse
import inspect
import math
from dataclasses import fields
from pathlib import Path

import torch

from lab import parallel
from lab.console import complain, prepare_streams, say, shell_quoted
from lab.files import CHECKPOINT, without_password
from lab.progress import Stopped, best_of
from lab.runs import MUST
from lab.settings import Settings, UsageError, flag, pick_device

TEXTS = "a UTF-8 text file, a URL, or tales, pirate, bard, noir"
# What longer commands hand on to tune.
OF_RUNS = {"resume", "fresh", "save_every"}
HANDED_ON = {
    None: OF_RUNS, "voices": OF_RUNS,
    "compare": {"r", "alpha", "target_modules", *OF_RUNS},
}


def run(story, commands, argv=None, description=None):
    """Run a command line: one of `commands` {name: function}, or story without a command.

    Returns the exit code: 0 on success, 1 on an error, 2 for invalid flags, 130 if interrupted.
    """
    prepare_streams()
    options = vars(make_parser(description).parse_args(argv))
    name = options.pop("command", None)
    debug = options.pop("debug", False)
    try:
        device = pick_device(options.get("device"))
        with parallel.processes(device):
            call(commands.get(name, story), name, options, device)
        return 0
    except KeyboardInterrupt as stop:
        complain(f"\n{after_stop(stop, name, options)}")
        return 130
    except parallel.FirstFailed:
        return 1
    except Exception as error:
        if debug:
            raise
        is_usage = isinstance(error, UsageError)        # which all processes notice
        if not is_usage or not parallel.name_of_process():
            complain(f"error: {parallel.name_of_process()}{in_one_line(error)}")
        return 2 if is_usage else 1


def call(command, name, options, device):
    """Call the function of a command with the flags that were given."""
    refuse_other_flags(command, name, options)
    if "device" in inspect.signature(command).parameters:
        options["device"] = device
    if options.get("resume") and options.get("fresh"):
        raise UsageError("--resume continues a run and --fresh discards it; give one of them")
    if options.get("resume"):
        options["resume"] = MUST
    record = command(**options)
    say_what_next(name, options, record)


def refuse_other_flags(command, name, options):
    """Raises UsageError for a flag before the command that the command does not have."""
    parameters = inspect.signature(command).parameters.values()
    known = {parameter.name for parameter in parameters}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        known |= {setting.name for setting in fields(Settings)}
        known |= HANDED_ON.get(name, set())
    unknown = options.keys() - known
    if unknown:
        flags = ", ".join(sorted(map(flag, unknown)))
        raise UsageError(f"{name} has no flag {flags}; see train.py {name} --help")


def say_what_next(name, options, record):
    """After pretrain or tune: say what was written, and what to do with it."""
    if name not in ("pretrain", "tune"):
        return
    out = shell_quoted(options["out"])
    model = f"--base {out}"
    if name == "tune":
        first, best = record["curve"][0]["bpb"], best_of(record["curve"])
        data = without_password(options["data"])
        say(f"{data}, held out: {first:.3f} bpb before, {best['bpb']:.3f} after (best "
            f"at step {best['step']}).")
        if options.get("method") != "full":
            model = f"--base {shell_quoted(options['base'])} --adapter {out}"
    say(f'Written: {out}. Now try:\n  python train.py sample {model} --prompt "Once"')


def after_stop(stop, name, options):
    """What to say after Ctrl-C: whether there is something to continue, and how."""
    how = str(stop) if isinstance(stop, Stopped) else "stopped"
    fresh = options.get("fresh")
    if name in ("sample", "merge"):
        return how
    if name not in ("pretrain", "tune"):
        without = " without --fresh" if fresh else ""
        return f"{how}; run the same command again{without} to continue"
    has_checkpoint = Path(options["out"], CHECKPOINT).exists()
    if fresh and isinstance(stop, Stopped):
        return f"{how}; run the same command with --resume instead of --fresh to continue"
    if has_checkpoint and not fresh:        # with --fresh it may be that of an older run
        return f"{how}; run the same command with --resume to continue"
    return f"{how}; nothing was saved, so run the same command again"


def in_one_line(error):
    """An error as text: its message if it is one of ours, and its type if it is a surprise."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, OSError, ArithmeticError)):
        text = f"{type(error).__name__}: {text[:300]}"
        if isinstance(error, torch.OutOfMemoryError):
            text += "; to need less memory, lower --batch-size, raise --accumulate, or add "
            text += "--recompute"
        text += " (--debug shows where)"
    return text


# ---- the flags ---------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Has no defaults: a flag that is not given is not there, and the function's default holds.

    So a flag of training counts on either side of the command: `--steps 7 voices` is
    `voices --steps 7`.
    """

    def __init__(self, **options):
        super().__init__(argument_default=argparse.SUPPRESS, **options)
        self.register("action", None, Once)
        self.register("action", "parsers", Subcommand)

    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def make_parser(description=None):
    """The parser of all commands, and of the whole story, which has none."""
    parser = Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    add_device(parser)
    add_prompt(parser)
    add_training(parser)
    add_preset(parser)
    add_lora(parser)
    parser.add_argument("--out", help="directory to write to (default: out)")
    commands = parser.add_subparsers(
        metavar="COMMAND", dest="command",
        help="if not given: the whole story, with the built-in texts",
    )

    def add_command(name, help):
        command = commands.add_parser(name, help=help, description=help)
        add_common(command)
        return command

    command = add_command("pretrain", "train a base model from scratch")
    add_device(command)
    add_prompt(command)
    add_training(command)
    add_preset(command)
    add_data(command)
    add_out(command)

    command = add_command("tune", "tune a base model to a text")
    add_device(command)
    add_training(command)
    command.add_argument(
        "--method", choices=("lora", "full"),
        help="lora: train only the adapters (default); full: train all weights",
    )
    add_lora(command)
    add_base(command)
    add_data(command)
    add_out(command)

    command = add_command("compare", "tune by both methods, and measure both")
    add_device(command)
    add_prompt(command)
    add_training(command)
    add_lora(command)
    add_base(command)
    add_data(command)
    add_base_data(command)
    add_out(command)

    command = add_command("voices", "tune several adapters for one base")
    add_device(command)
    add_prompt(command)
    add_training(command)
    add_preset(command)
    add_lora(command)
    command.add_argument(
        "--data", nargs="+", help=f"the texts, each {TEXTS} (default: pirate bard noir)"
    )
    command.add_argument("--base", help="a base model; by default one is pretrained on tales")
    command.add_argument("--out", help="directory to write to (default: out)")
    add_base_data(command)

    command = add_command("sample", "continue a prompt, with the base and each adapter")
    add_device(command)
    add_prompt(command)
    add_base(command)
    command.add_argument(
        "--adapter", action="append",
        help="an adapter's directory; may be given several times",
    )
    add_sampling(command)

    command = add_command("merge", "merge an adapter into its base: a plain model directory")
    add_base(command)
    command.add_argument("--adapter", required=True, help="the adapter's directory")
    command.add_argument("--fresh", action="store_true", help="replace what is in --out")
    add_out(command)
    return parser


def add_common(parser):
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device(parser):
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps; by default the best available")


def add_prompt(parser):
    parser.add_argument("--prompt", help="what the samples begin with")


def add_training(parser):
    parser.add_argument(
        "--resume", action="store_true", help="continue the interrupted run in --out"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, replacing the run in --out"
    )
    parser.add_argument(
        "--save-every", type=number(int, above=-1),
        help="steps between checkpoints; 0: none (default: 200)",
    )
    for setting in fields(Settings):
        options = {"help": setting.metadata["help"]}
        if setting.type is bool:
            options["action"] = OnceOrNot
        else:
            options["type"] = setting.type
        parser.add_argument(flag(setting.name), **options)


def add_preset(parser):
    parser.add_argument(
        "--preset", help="the shape: tiny, small, gpt2, ...; by default what suits the device"
    )


def add_lora(parser):
    parser.add_argument(
        "--r", type=number(int, above=0), help="the rank of the adapter (default: 8)"
    )
    parser.add_argument(
        "--alpha", type=number(float, above=0),
        help="the update is scaled by alpha / r (default: 16)",
    )
    parser.add_argument(
        "--target-modules", nargs="+", help="the layers to adapt (default: c_attn c_proj c_fc)"
    )


def add_base(parser):
    parser.add_argument(
        "--base", required=True,
        help="a base model: a directory, or gpt2, gpt2-medium, gpt2-large, gpt2-xl",
    )


def add_data(parser):
    parser.add_argument("--data", required=True, help=TEXTS)


def add_base_data(parser):
    parser.add_argument(
        "--base-data",
        help="a text to measure forgetting on; by default what the base was pretrained on",
    )


def add_out(parser):
    parser.add_argument("--out", required=True, help="directory to write to")


def add_sampling(parser):
    parser.add_argument(
        "--merge", action="store_true", help="merge each adapter into the weights first"
    )
    parser.add_argument("--max-new-tokens", type=int, help="(default: 150)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-k", type=int, help="keep the k most likely tokens (default: 40)")
    parser.add_argument("--top-p", type=float, help="nucleus sampling: keep this probability")
    parser.add_argument("--seed", type=int, help="random seed (default: 0)")


class Once(argparse.Action):
    """A flag whose second value would silently replace the first: it is an error."""

    def __call__(self, parser, namespace, value, option_string=None):
        refuse_second(parser, namespace, self.dest, option_string)
        setattr(namespace, self.dest, value)


class OnceOrNot(argparse.BooleanOptionalAction):
    """--flag or --no-flag, but not both."""

    def __call__(self, parser, namespace, values, option_string=None):
        refuse_second(parser, namespace, self.dest, option_string)
        super().__call__(parser, namespace, values, option_string)


class Subcommand(argparse._SubParsersAction):
    """A command, which must not be given a flag that was also given before it."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = {name: value for name, value in vars(namespace).items() if name != self.dest}
        super().__call__(parser, namespace, values, option_string)
        for name, value in before.items():
            if getattr(namespace, name) is not value:
                parser.error(f"{flag(name)} is given twice; give it once")


def refuse_second(parser, namespace, dest, option_string):
    if hasattr(namespace, dest):
        parser.error(f"{option_string} is given twice; give it once")


def number(kind, above):
    """A type for argparse: a finite number of this kind above a limit."""
    def parse(text):
        value = kind(text)
        if not above < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above {above}")
        return value
    parse.__name__ = kind.__name__
    return parse
