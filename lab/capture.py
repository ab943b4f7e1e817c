"""
A training step as a CUDA graph: recorded once, then replayed with new batches. Or each
of its phases as a graph of its own, so that they can be timed one by one.

A step of a small model launches about a thousand kernels that take a few microseconds
each, and the GPU waits for the CPU between them. Replaying a graph is a single
launch.
"""
import torch

# Eager steps before the capture. They create what must not be recorded: the state of the
# optimizers, which every replay would set back to zero, and cuBLAS's workspaces.
WARMUP = 3


def captured(step):
    """The step itself, or a CapturedStep of it if it can be captured."""
    return CapturedStep(step) if step.can_be_captured else step


class CapturedStep:
    """Calls `step` a few times, then captures it and replays the graph.

    Whatever changes between steps, such as the learning rate, must be in tensors that
    the captured kernels read.
    """

    def __init__(self, step):
        self.step = step
        self.calls = 0
        self.graph = None
        self.x = self.y = self.loss = None      # the tensors that the graph reads and writes

    def __call__(self, x, y):
        """x, y (B, T) -> the loss (). Raises ValueError if the shape is not the captured one."""
        self.calls += 1
        if self.calls <= WARMUP:
            return self.step(x, y)
        if self.graph is None:
            self.capture(x, y)
        if x.shape != self.x.shape:
            raise ValueError(
                f"the batch has shape {tuple(x.shape)}, but the step was captured for "
                f"{tuple(self.x.shape)}; use one shape, or settings with graph=False"
            )
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss.clone()            # the next replay overwrites self.loss

    def capture(self, x, y):
        """Record the kernels of one step. Nothing is computed yet."""
        self.x, self.y = x.clone(), y.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step(self.x, self.y)


def capture_each(functions):
    """Capture each of several functions in a CUDA graph of its own: a list of Replays.

    They may hand tensors to one another, as forward hands the loss to backward: the
    graphs share their memory, so replay them in the same order. Each function is
    called once, to be recorded; call all of them WARMUP times before.
    """
    pool = torch.cuda.graph_pool_handle()
    return [Replay(function, pool) for function in functions]


class Replay:
    """Replays what a function did when it was recorded.

    The graph knows only addresses. `function` is kept, and with it the tensors that it
    reads: their memory would be used for something else.
    """

    def __init__(self, function, pool):
        self.function = function
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            function()

    def __call__(self):
        self.graph.replay()
