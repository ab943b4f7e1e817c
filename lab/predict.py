"""
What a training step should cost, by arithmetic from the shapes.

Letters: B windows of T tokens, C channels (n_embd), V vocabulary entries, r rank.
"""
from torch import nn

from lab.nf4 import HasNF4Weight
from lora_minimal import LoRALinear


def predict(step, x):
    """Predict a train.Step on x (B, T).

    Returns {"memory": {kind: bytes}, "operations": {part: count}, "ahead": the
    operations of the backward pass that the loss does in the forward pass}.
    """
    return {
        "memory": predict_memory(step, x),
        "operations": predict_operations(step, x),
        "ahead": predict_ahead(step, x),
    }


def linear_layers(model):
    """All linear layers, the head included."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def adapted_layers(model):
    """The linear layers that have LoRA."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def numbers(layer):
    """How many numbers the weight of a linear layer stands for, in four bits or not."""
    return layer.in_features * layer.out_features


# ---- memory ------------------------------------------------------------------------

def predict_memory(step, x):
    """{"weights", "gradients", "optimizer", "activations": bytes} of a step on x (B, T).

    With a base in four bits also "transient", the largest weights dequantized at a time.
    """
    trained = sum(p.nbytes for p in step.trained.values())
    predicted = {
        "weights": sum(p.nbytes for p in step.model.parameters()),
        "gradients": trained,
        "optimizer": 2 * trained,           # AdamW's two running means
        "activations": predict_activations(step, x),
    }
    transient = bytes_of_dequantized(step)
    if transient:
        predicted["transient"] = transient
    return predicted


def bytes_of_dequantized(step):
    """Bytes for a moment of a step, in a model whose weights are in four bits; else 0.

    A weight is dequantized for each product. While that is done, there is also a 32-bit
    index for each two numbers. With recomputing, the weights of a block stay until its
    backward pass is done.
    """
    product_bytes = 4 if step.settings.dtype == "float32" else 2
    index_bytes = 2             # half of a 32-bit index
    layers = [m for m in step.model.modules() if isinstance(m, HasNF4Weight)]
    if not layers:
        return 0
    largest = max(map(numbers, layers))
    held = largest
    if step.settings.recompute:
        held = sum(map(numbers, layers)) // step.model.config.n_layer
    return product_bytes * held + index_bytes * largest


def predict_activations(step, x):
    """Bytes that the forward pass on a micro-batch of x (B, T) keeps for backward.

    Each kept tensor counts once, in the bytes of its dtype. The gradient of the head,
    which the chunked loss makes in the forward pass, is among the gradients already.
    """
    tokens = x.numel() // step.settings.accumulate
    product_bytes = 4 if step.settings.dtype == "float32" else 2
    residual_bytes = next(step.model.parameters()).element_size()
    sizes = (step.model, step.settings, product_bytes, residual_bytes)
    total = tokens * (bytes_of_blocks(*sizes) + bytes_of_head(*sizes))
    if product_bytes < residual_bytes and not step.settings.recompute:
        total += bytes_of_casts(step.model, product_bytes)
    return total


def bytes_of_blocks(model, settings, product_bytes, residual_bytes):
    """Bytes that all blocks keep for a token.

    product_bytes are those of a number that a matrix product reads or writes,
    residual_bytes those of a number in the residual stream.
    """
    config = model.config
    C = config.n_embd
    if settings.recompute:
        return config.n_layer * residual_bytes * C      # the input of each block
    layer_norms = 2 * residual_bytes * C + 2 * product_bytes * C    # inputs, outputs
    layer_norms += 2 * 8                                # mean and 1/σ of two, in float32
    attention = 4 * product_bytes * C                   # q, k, v, and the output
    attention += 4 * config.n_head                      # a float32 log-sum-exp a head
    mlp = 8 * product_bytes * C                         # before and after the GELU
    dropout = 2 * C if settings.dropout else 0          # what was dropped, a byte each
    total = config.n_layer * (layer_norms + attention + mlp + dropout)
    ranks = sum(layer.r for layer in adapted_layers(model))
    total += product_bytes * ranks                      # u = x Aᵀ
    if not model.transformer.wte.weight.requires_grad:
        total -= residual_bytes * C         # nothing before the blocks needs a gradient
    return total


def bytes_of_head(model, settings, product_bytes, residual_bytes):
    """Bytes that the last layer norm, the head and the loss keep for a token."""
    C, V = model.config.n_embd, model.config.vocab_size
    total = residual_bytes * C + 8          # the layer norm's input, mean and 1/σ
    if settings.loss_chunk or model.lm_head.weight.requires_grad:
        total += product_bytes * C          # the head's input or, with chunks, gradient
    if not settings.loss_chunk:
        total += 4 * V                      # log-probabilities
    return total


def bytes_of_casts(model, product_bytes):
    """Bytes of autocast's copies of the weights that autograd multiplies by."""
    adapted = adapted_layers(model)
    copied = [layer for layer in linear_layers(model) if layer not in adapted]
    return product_bytes * sum(numbers(m) for m in copied if m is not model.lm_head)


# ---- operations --------------------------------------------------------------------

def predict_operations(step, x):
    """Floating-point operations {part: count} of a step on x (B, T).

    A product with a matrix of n numbers takes 2 n for each token, forward; as many
    for the gradient of its input; and as many for the gradient of the matrix, which a
    frozen one does not need. So LoRA saves up to a third. A and B add thin products:
    forward u = x Aᵀ and u Bᵀ, backward v = g B, v A and the gradients of A and B. (To
    fold B A into W instead of computing u Bᵀ and v A costs less.)

    What the chunked loss computes ahead, in the forward pass, counts as backward.
    """
    model, config, tokens = step.model, step.model.config, x.numel()
    linears = linear_layers(model)
    trained = [layer for layer in linears if layer.weight.requires_grad]
    products = 2 * tokens * sum(numbers(layer) for layer in linears)
    # q kᵀ and p v, each over half of the T tokens on average.
    attention = 2 * tokens * config.n_layer * config.n_embd * x.size(1)
    adapted = adapted_layers(model)
    thin = 2 * tokens * sum(m.r * (m.in_features + m.out_features) for m in adapted)
    again = 0
    if step.settings.recompute:     # the blocks (at most: nothing may need their last product)
        again = products - 2 * tokens * model.lm_head.weight.numel() + attention + thin
    return {
        "forward": products + attention,
        "forward, thin products": thin,
        "backward, inputs": products + 2 * attention,
        "backward, weights": 2 * tokens * sum(numbers(m) for m in trained),
        "backward, thin products": 2 * thin,
        "backward, forward again": again,
    }


def predict_ahead(step, x):
    """Operations of the backward pass that the loss does in the forward pass on x (B, T).

    The chunked loss has the logits there, and never again: it makes the gradient of
    the hidden states, and that of the head if the head trains.
    """
    if not step.settings.loss_chunk:
        return 0
    head = step.model.lm_head.weight
    gradients = 2 if head.requires_grad else 1
    return gradients * 2 * x.numel() * head.numel()
