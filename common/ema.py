"""Exponential moving average of a model's weights."""

import copy

import torch

from common.runtime import unwrap


class EMA:
    """Averaged copy `.module` of a model, in eval mode and without gradients.

    The first `start_step` updates copy everything, buffers included. Later ones average the parameters,
    average = decay * average + (1 - decay) * raw without bias correction; buffers then keep the last copied value.
    """

    def __init__(self, model, decay, start_step=0):
        self.module = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
        self.decay, self.start_step, self.step = decay, start_step, 0

    @torch.no_grad()
    def update(self, model):
        """Take in the weights of `model`, which may be wrapped; call once after each optimizer step."""
        model = unwrap(model)
        self.step += 1
        average, raw = list(self.module.parameters()), list(model.parameters())
        if self.step <= self.start_step:
            average, raw = average + list(self.module.buffers()), raw + list(model.buffers())
            torch._foreach_copy_(average, raw)
        elif average:
            torch._foreach_lerp_(average, raw, 1 - self.decay)

    def state_dict(self):
        return {"weights": self.module.state_dict(), "step": self.step}

    def load_state_dict(self, state):
        """Strict: raises RuntimeError for weights of another model."""
        self.module.load_state_dict(state["weights"])
        self.step = state["step"]
