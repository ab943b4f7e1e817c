"""
Many adapters for one base: switch between them, mix them in one batch, add them up.

A layer knows a single adapter. An Adapters object holds several, each under a name,
and puts the tensors of one of them, or a stack of several, into the layers. No base
weight is copied or moved.

    adapters = Adapters(model)
    adapters.load("out/pirate", "pirate")
    adapters.load("out/bard", "bard")
    adapters.use("pirate")                              # switch; None is the base model
    adapters.use(["pirate", None, "bard"])              # a batch of three rows, one each
    adapters.combine({"pirate": 0.5, "bard": 0.5}, "both")      # a sum is an adapter, too

Switching keeps the Parameter objects of each adapter, so an optimizer made for them stays valid.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

from lab.files import some
from lab.nf4 import lora_classes
from lab.peft_files import check_classes, check_fit, check_same_settings, read_adapter
from lora_minimal import (
    adapt_layers,
    check_can_adapt,
    check_settings,
    find_lora_layers,
    find_targets,
    unmerge,
)


@dataclass
class LayerAdapter:
    """One adapter in one layer: A (r, in), B (out, r), and how they are used."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    @classmethod
    def of(cls, layer):
        """The adapter that is in a layer now."""
        return cls(
            lora_A=layer.lora_A,
            lora_B=layer.lora_B,
            scaling=layer.scaling,
            r=layer.r,
            alpha=layer.alpha,
            dropout=layer.dropout,
            use_rslora=layer.use_rslora,
        )

    def put_into(self, layer, rank_mask=None):
        """Make the layer use this adapter."""
        unmerge(layer)
        device = layer.weight.device
        for parameter in (self.lora_A, self.lora_B):
            if parameter.device != device:      # the model has moved since the last use
                parameter.data = parameter.data.to(device)
        layer.lora_A, layer.lora_B = self.lora_A, self.lora_B
        layer.scaling, layer.r, layer.alpha = self.scaling, self.r, self.alpha
        layer.dropout, layer.use_rslora = self.dropout, self.use_rslora
        layer.rank_mask = rank_mask


def use_base(layer):
    """Make the layer compute what the base layer computes."""
    unmerge(layer)
    layer.lora_A = layer.lora_B = layer.rank_mask = None


class Adapters:
    """The adapters of a model, by name. One that it has already is named "default".

    Raises ValueError if the model has a variant of LoRA: it may have parameters of its own.
    """

    def __init__(self, model):
        check_classes(find_lora_layers(model))
        self.model = model
        self.current = None         # a name, None for the base, or a tuple: one a row
        self._held = {}             # {name: {path: LayerAdapter}}
        existing = {}
        for path, layer in find_lora_layers(self.model).items():
            if layer.lora_A is not None:
                existing[path] = LayerAdapter.of(layer)
        if existing:
            self._held["default"] = existing
            self.current = "default"

    @property
    def names(self):
        """The names of the adapters, sorted."""
        return sorted(self._held)

    def __getitem__(self, name):
        """The adapter `name` as {path: LayerAdapter}. Raises ValueError if unknown."""
        self._check_names([name])
        self._keep_current(find_lora_layers(self.model))
        return self._held[name]

    def _check_names(self, names):
        unknown = set(names) - self._held.keys()
        if unknown:
            unknown = some(map(repr, unknown))
            raise ValueError(f"unknown adapter {unknown}; there are: {some(self.names)}")

    def _check_free(self, name):
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter is {name!r}; expected a string")
        if name in self._held:
            raise ValueError(f"there is an adapter {name!r} already; delete it first")

    def _keep_current(self, layers):
        """Note what the adapter in use has become: tensors or layers may be new."""
        if isinstance(self.current, tuple):
            return
        active = {path: layer for path, layer in layers.items() if layer.lora_A is not None}
        if active and self.current is None:
            raise ValueError(
                f"{some(active)} got LoRA from elsewhere; use adapters.add() for that"
            )
        held = self._held.get(self.current, {})
        lost = held.keys() - active.keys()
        if lost:
            raise ValueError(
                f"{some(lost)} of the adapter {self.current!r} has no LoRA any more; "
                "leave disable_lora, or make a new Adapters(model) after remove_lora"
            )
        for path, layer in active.items():
            held[path] = LayerAdapter.of(layer)

    def use(self, which):
        """Switch to the adapter of a name, or to the base model with None.

        A list has a name or None for each row of the batches to come: they then go
        through different adapters at once. Such a stack can be neither trained nor
        merged nor saved. Raises ValueError for a name that does not exist. Merged
        layers are unmerged.
        """
        one_for_all = which is None or isinstance(which, str)
        rows = [which] if one_for_all else list(which)
        if not rows:
            raise ValueError(f"no adapter was given; there are: {some(self.names)}")
        self._check_names(name for name in rows if name is not None)
        layers = find_lora_layers(self.model)
        self._keep_current(layers)
        for name in set(rows) - {None}:
            lost = self._held[name].keys() - layers.keys()
            if lost:
                raise ValueError(
                    f"{some(lost)} of the adapter {name!r} has no LoRA any more; after "
                    "remove_lora, make a new Adapters(model)"
                )
        self._switch(which if one_for_all else tuple(rows))

    def _switch(self, which):
        """Put an adapter into all layers: a name, None, or a tuple of these for the rows."""
        self.current = which
        for path, layer in find_lora_layers(self.model).items():
            if isinstance(which, tuple):
                self._put_stack(which, path, layer)
            else:
                self._put_one(which, path, layer)

    def _put_one(self, name, path, layer):
        adapter = self._held.get(name, {}).get(path)
        if adapter is None:
            use_base(layer)
        else:
            adapter.put_into(layer)

    def _put_stack(self, rows, path, layer):
        different = dict.fromkeys(rows)
        names = [name for name in different if path in self._held.get(name, {})]
        if not names:
            use_base(layer)
            return
        parts = [self._held[name][path] for name in names]
        stack = stacked(parts, weights=[1.0] * len(parts), device=layer.weight.device)
        stack.put_into(layer, rank_mask(rows, names, parts).to(layer.weight.device))

    def add(self, name, r=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"),
            dropout=0.0, use_rslora=False):
        """Make a new adapter, as apply_lora does, and use it. Returns the layers' paths."""
        paths = find_targets(self.model, target_modules, lora_classes())
        settings = {"r": r, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
        self._add(name, dict.fromkeys(paths, settings))
        return paths

    def load(self, dir, name="default"):
        """Read an adapter directory of PEFT's format, and use it. Returns the layers'
        paths.

        If there is an adapter of this name with the same layers and settings, its
        tensors are overwritten; with others, ValueError is raised. See
        lora_minimal.load_lora for the rest.
        """
        settings, state = read_adapter(dir)
        check_fit(self.model, dir, settings, state)
        if name in self._held:
            advice = "delete that adapter first, or load this one under another name"
            check_same_settings(self[name], settings, dir, advice)
            self.use(name)
        else:
            self._add(name, settings)
        for path, part in self._held[name].items():
            part.lora_A.data.copy_(state[f"{path}.lora_A"])
            part.lora_B.data.copy_(state[f"{path}.lora_B"])
        return list(settings)

    def _add(self, name, settings):
        """Make the adapter of {path: its r, alpha, dropout, use_rslora}, and use it."""
        self._check_free(name)
        layers = find_lora_layers(self.model)
        new = {path: settings[path] for path in settings if path not in layers}
        for path, arguments in settings.items():
            check_settings(**arguments)
            if path in new:
                check_can_adapt(self.model, path, lora_classes())
        self.use(None)          # so that the adapter in use is not frozen with the base
        if new:
            adapt_layers(self.model, new, lora_classes())
        parts = {}
        for path, arguments in settings.items():
            layer = self.model.get_submodule(path)
            if path not in new:
                # A second layer on the same weight, only for its initial A and B.
                layer = type(layer)(layer, **arguments)
            parts[path] = LayerAdapter.of(layer)
        self._held[name] = parts
        self._switch(name)

    def combine(self, weights, name):
        """Make a new adapter, the weighted sum of others, and use it. weights {name: w}.

        It is exact, sum of w * scaling * B A: the A's and B's are stacked, so its
        rank is the sum of theirs. Raises ValueError for a name that is unknown or
        taken, or a weight that is not finite.
        """
        self._check_names(weights)
        self._check_free(name)
        if not weights or not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(
                f"weights are {weights!r}; expected finite numbers for some of "
                f"{some(self.names)}"
            )
        layers = find_lora_layers(self.model)
        self._keep_current(layers)
        combined = {}
        for path, layer in layers.items():
            names = [each for each in weights if path in self._held[each]]
            if names:
                parts = [self._held[each][path] for each in names]
                scales = [weights[each] for each in names]
                combined[path] = stacked(parts, scales, layer.weight.device)
                combined[path].lora_A.requires_grad_(True)
                combined[path].lora_B.requires_grad_(True)
        self._held[name] = combined
        self._switch(name)

    def delete(self, name):
        """Forget an adapter; if it is in use, use the base. Raises ValueError if unknown."""
        self._check_names([name])
        in_use = self.current if isinstance(self.current, tuple) else (self.current,)
        if name in in_use:
            self.use(None)
        del self._held[name]


@torch.no_grad()
def stacked(parts, weights, device):
    """The sum of w * scaling * B A over several adapters of one layer, as a single
    adapter:

    [w₁ s₁ B₁ | w₂ s₂ B₂ | …] [A₁; A₂; …], with A (Σ r, in), B (out, Σ r) and a
    scaling of 1.
    """
    A = torch.cat([part.lora_A.to(device) for part in parts])
    scales = [weight * part.scaling for weight, part in zip(weights, parts)]
    B = torch.cat([s * part.lora_B.to(device) for s, part in zip(scales, parts)], dim=1)
    frozen_A = nn.Parameter(A, requires_grad=False)
    frozen_B = nn.Parameter(B, requires_grad=False)
    return LayerAdapter(frozen_A, frozen_B, scaling=1.0, r=len(A), alpha=len(A))


def rank_mask(rows, names, parts):
    """(B, Σ r): 1 where a rank of the stack belongs to the adapter of the row, else 0."""
    owners = []                             # the name of the adapter of each rank
    for name, part in zip(names, parts):
        owners += [name] * part.r
    mask = torch.zeros(len(rows), len(owners))
    for i, row in enumerate(rows):
        mask[i] = torch.tensor([float(owner == row) for owner in owners])
    return mask
