"""
Beside the training loop: evaluation, the best weights, checkpoints, stopping.
"""
import math
import signal
import time
from contextlib import ExitStack, contextmanager, suppress

import torch
from tqdm import tqdm

from lab import parallel
from lab.checkpoints import read_checkpoint, write_checkpoint
from lab.console import say, size
from lab.nf4 import parameter_count

PATIENCE = 5        # skipped steps in a row after which training gives up


# Ctrl-C, a polite kill, and (not on Windows) a terminal that is closed.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):
    STOP_SIGNALS.append(signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal stopped the training, after it had saved a checkpoint."""


class Progress:
    """`with Progress(...) as progress:` the companion of a training loop.

    step        a train.Step: its trained weights and optimizers go into checkpoints
    measure     a function that returns the bits per byte of the held-out text
    watch       is called with each point of the curve, or None
    save_every  steps between checkpoints in `dir`; 0: none

    `curve` is a list of {"step", "seconds" of training alone, "loss" in nats per
    token, "bpb", "skipped" steps until then}, and `start` the step to begin with.
    """

    def __init__(self, step, name, dir, measure, watch=None, save_every=0):
        self.step, self.settings = step, step.settings
        self.name, self.dir = name, dir
        self.measure, self.watch, self.save_every = measure, watch, save_every
        self.start = 0
        self.curve = []
        self.best = {}                          # {name: the best weights so far}
        self.loss = None                        # of the last step, on the device
        self.seconds = 0.0                      # of training, until `started`
        self.started = time.perf_counter()

    def __enter__(self):
        self.stack = ExitStack()
        self.signals = self.stack.enter_context(signals_noted())
        options = dict(unit=" steps", leave=False, dynamic_ncols=True)
        if not parallel.is_first():
            options["disable"] = True
        else:
            options["disable"] = None           # show the bar on a terminal only
        self.bar = self.stack.enter_context(tqdm(total=self.settings.steps, **options))
        return self

    def __exit__(self, kind, *exception):
        try:
            if kind is None:
                self.stop_if_asked(self.settings.steps)
        finally:
            self.stack.close()
        if kind is None and self.signals:       # a signal that came just now
            raise KeyboardInterrupt

    def resume(self):
        """Continue from the checkpoint in the directory."""
        step = self.step
        about, self.best = read_checkpoint(self.dir, step.trained, step.optimizers)
        self.start = about["step"]
        self.seconds = about["seconds"]
        self.curve = about["curve"]
        self.step.skipped += about["skipped"]
        if "loss_scale" in about:           # older checkpoints have none
            self.step.loss_scale.load(about["loss_scale"])
        self.bar.update(self.start)
        self.started = time.perf_counter()

    def before_step(self, n):
        """Evaluate, save or stop, whichever is due before step n.

        Raises Stopped after a signal, and ArithmeticError if training is stuck, both
        after saving a checkpoint; ArithmeticError if the model is not finite from the
        beginning.
        """
        self.evaluate_if_due(n)
        self.stop_if_asked(n)
        if self.save_every and n % self.save_every == 0 and n > self.start:
            self.save(n)
        self.give_up_if_stuck(n)

    def stop_if_asked(self, n):
        """Raises Stopped if there was a signal, after saving a checkpoint."""
        if parallel.any_of(bool(self.signals), self.step.device):
            self.save(n)
            raise Stopped(
                f"stopped at step {n} of {self.settings.steps}; checkpoint saved in "
                f"{self.dir}"
            )

    def evaluate_if_due(self, n):
        """Append a point to the curve, and keep the weights if they are the best so far."""
        is_due = n % self.settings.eval_every == 0 or n == self.settings.steps
        if not is_due or any(point["step"] == n for point in self.curve):
            return
        loss = None if self.loss is None else self.loss.item()      # waits for the device
        self.pause()
        skipped = int(self.step.skipped.item())
        point = {"step": n, "seconds": self.seconds, "loss": loss, "bpb": self.measure(),
                 "skipped": skipped}
        self.curve.append(point)
        if len(self.curve) == 1 and not math.isfinite(point["bpb"]):
            raise ArithmeticError(
                f"before any training the model gives {self.name} {point['bpb']} "
                "bits per byte; its weights are damaged"
            )
        if point is best_of(self.curve):
            for name, p in self.step.trained.items():
                self.best[name] = p.detach().to("cpu", copy=True)
        if self.watch is not None:
            self.watch(point)
        self.started = time.perf_counter()

    def pause(self):
        """Stop the clock of the training."""
        self.seconds += time.perf_counter() - self.started

    def save(self, n):
        """Write a checkpoint from which training can continue with step n."""
        self.pause()
        if parallel.is_first():
            step = self.step
            about = {
                "step": n, "seconds": self.seconds, "curve": self.curve,
                "skipped": int(step.skipped.item()), "loss_scale": step.loss_scale.state(),
            }
            write_checkpoint(self.dir, about, step.trained, self.best, step.optimizers)
        self.started = time.perf_counter()

    def give_up_if_stuck(self, n):
        """Raises ArithmeticError if several steps in a row were skipped."""
        if self.step.device.type != "cpu" and n % 10 != 0:
            return                          # reading the count would stop the device
        in_a_row = int(self.step.skipped_in_a_row.item())
        if in_a_row >= PATIENCE:
            self.save(n)
            raise ArithmeticError(
                f"the gradients of {in_a_row} steps in a row, up to step {n}, were "
                "not finite, so the steps were skipped. Probably the learning rate "
                f"is too high (--lr {self.settings.lr:.2g}, --muon-lr "
                f"{self.settings.muon_lr:.2g}). The weights from before are saved in "
                f"{self.dir}; start over with --fresh"
            )

    def after_step(self, n, loss):
        """Note the loss of step n, and move the bar."""
        self.loss = loss
        self.bar.update()
        if n % 10 == 9 and not self.bar.disable:
            steps = n + 1 - self.start
            tokens = steps * self.settings.batch_size * self.settings.block_size
            rate = tokens / self.bar.format_dict["elapsed"]
            self.bar.set_postfix_str(f"loss {loss.item():.3f}, {rate:,.0f} tokens/s")

    @torch.no_grad()
    def finish(self):
        """After the last step: evaluate, put the best weights back, and say what happened."""
        self.evaluate_if_due(self.settings.steps)
        for name, p in self.step.trained.items():
            p.copy_(self.best[name])
        skipped = self.curve[-1]["skipped"]
        if skipped:
            say(f"     {skipped} steps were skipped: their gradients were not finite")
        if parallel.world() > 1:
            self.say_what_was_sent()

    def say_what_was_sent(self):
        """Print the bytes of gradients that each process sent in a step."""
        everything = 4 * parameter_count(self.step.model)
        for name, p in self.step.model.named_parameters():
            if ".lora_" in name:
                everything -= 4 * p.numel()
        sent = self.step.averaging.bytes_sent
        say(f"     each of {parallel.world()} processes sent {size(sent)} of gradients in a "
            "step; in full fine-tuning the gradients of the whole model are "
            f"{size(everything)}")


def best_of(curve):
    """The point of a curve with the lowest bits per byte."""
    finite = [point for point in curve if math.isfinite(point["bpb"])]
    return min(finite or curve, key=lambda point: point["bpb"])


@contextmanager
def signals_noted():
    """The signals only append to the list that this yields, so that a step always
    finishes.

    A second signal stops at once. Signals that the process ignores, as under nohup, stay
    ignored.
    """
    noted = []
    old = {}

    def note(number, frame):
        noted.append(number)
        signal.signal(number, old[number])

    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        with suppress(ValueError):      # only the main thread may, and only it gets Ctrl-C
            old[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
