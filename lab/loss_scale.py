"""
Training in float16: the loss is scaled, so that small gradients are not lost.

float16 has no number between 0 and 6e-8, and many gradients are smaller. Multiplying
the loss by a large number multiplies all gradients by it (Micikevicius et al. 2018, "Mixed
Precision Training", §3.2); before the update they are divided by it again, in float32.
If a gradient overflows, the step is skipped and the scale halved; after many good steps
it is doubled. bfloat16 reaches as far as float32 and needs none of this.
"""
import torch

FIRST = 2.0**16
DOUBLE_AFTER = 2000     # good steps in a row


class LossScale:
    """The factor of the loss, in tensors, so that a captured step can change it.

    value () is the factor, and good_steps () counts since it changed. If it is not
    `enabled`, nothing is scaled.
    """

    def __init__(self, enabled, device):
        self.enabled = enabled
        self.value = torch.full((), FIRST, device=device)
        self.good_steps = torch.zeros((), device=device)

    def scaled(self, loss):
        """The loss () times the factor."""
        return loss * self.value if self.enabled else loss

    def unscale(self, parameters):
        """Divide the gradients of the parameters by the factor."""
        if self.enabled:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.value)

    def is_at_its_smallest(self):
        """Whether halving cannot help any more, as a tensor (); true if not enabled."""
        if self.enabled:
            return self.value <= 1
        return torch.ones_like(self.value, dtype=torch.bool)

    def update(self, bad):
        """Halve the factor if the tensor `bad` () is true; double it after many good steps."""
        if not self.enabled:
            return
        self.good_steps += 1
        self.good_steps *= ~bad
        doubles = self.good_steps == DOUBLE_AFTER
        self.good_steps *= ~doubles
        halved = (self.value / 2).clamp(min=1)
        self.value.copy_(torch.where(bad, halved, torch.where(doubles, 2 * self.value, self.value)))

    def state(self):
        """[value, good_steps] as numbers, for a checkpoint."""
        return [self.value.item(), self.good_steps.item()]

    def load(self, state):
        """Continue from a state()."""
        value, good_steps = state
        self.value.fill_(value)
        self.good_steps.fill_(good_steps)
