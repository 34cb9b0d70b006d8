"""What the computation of a model depends on: the addresses of its weights, its hooks, its adapters, its settings."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules import module as all_modules

from vattn.models.attention import attention_of


class ModelState:
    """Records what the computation of a model depends on, to tell later whether any of it has changed.

    Args:
        model: the model. It is not kept alive.

    Attributes:
        model: a weak reference to the model.
        configs: the configurations of its modules, see ``configs_of``.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model, functools.partial(_forget, weakref.ref(self)))
        modules = list(model.modules())
        self.configs = configs_of(model)
        self._weights = _weights(model)
        self._addresses = _addresses(self._weights)
        self._held = [
            (tensors, name, tensor)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
        ]
        self._settings = state_of(model, self.configs)
        self._hooks: list[dict[int, Any]] = [all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks]
        self._hooks += [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        # Modules that keep an offset of positions (``rope_deltas``), which they compute in a prompt and add to the
        # positions of later calls that give none.
        self._shifted = [vars(module) for module in modules if "rope_deltas" in vars(module)]
        self._adapters = [
            (vars(module), name, copy.copy(value))
            for module in modules
            for name, value in vars(module).items()
            if "adapter" in name and isinstance(value, (bool, str, list))
        ]

    def is_of(self, model: Any, *, everything: bool) -> bool:
        """Whether the model is the recorded one and unchanged.

        Args:
            model: the model to compare.
            everything: whether to compare all weights and settings, instead of just the model and its first weight.
        """
        if self.model() is not model or _addresses(self._weights[:1]) != self._addresses[:1]:
            return False
        if not everything:
            return True
        return _addresses(_weights(model)) == self._addresses and state_of(model, self.configs) == self._settings

    def stayed(self) -> bool:
        """Whether weights, buffers and adapters are what and where they were, and there are no hooks."""
        return (
            all(tensors.get(name) is tensor for tensors, name, tensor in self._held)
            and _addresses(self._weights) == self._addresses
            and not self.hooked()
            and all(settings.get(name) == value for settings, name, value in self._adapters)
        )

    def hooked(self) -> bool:
        """Whether the model has forward hooks, except for those of transformers that do nothing in a decode step."""
        idle = "transformers.utils.output_capturing"
        found = (hook for hooks in filter(None, self._hooks) for hook in hooks.values())
        return any(getattr(hook, "__module__", "") != idle for hook in found)

    def shifts_positions(self) -> bool:
        """Whether the model adds an offset to the positions of calls that give none."""
        return any(settings.get("rope_deltas") is not None for settings in self._shifted)

    def lacks_addresses(self) -> bool:
        """Whether some weights have elements but no address."""
        return any(t.numel() and not t.data_ptr() for t in self._weights)

    def forget(self) -> None:
        """Releases the weights of a model that no longer exists."""
        self._weights, self._held, self._hooks, self._adapters, self._shifted = [], [], [], [], []


def _forget(state: weakref.ref[ModelState], _: Any) -> None:
    if (mine := state()) is not None:
        mine.forget()


def configs_of(model: Any) -> list[Any]:
    """The configurations from which the modules of a model read their attention implementation."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def _weights(model: Any) -> list[torch.Tensor]:
    """The tensors that hold a model's parameters and buffers; of a tensor subclass the tensors that it consists of."""
    every = itertools.chain(model.parameters(), model.buffers())
    return [plain for tensor in every for plain in plain_tensors(tensor)]


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor subclass, e.g. of quantized weights, consists of; another tensor is itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def state_of(model: Any, configs: list[Any], *, leaving_out: str | None = None) -> list[Any]:
    """What a model's computation may depend on besides its weights, e.g. which adapter is active.

    Args:
        model: the model.
        configs: its configurations, see ``configs_of``.
        leaving_out: the name of a setting that is ignored, or None.

    Returns:
        A list that equals another one of the same model as long as nothing has changed.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return tuple((str(name), plain(each)) for name, each in value.items())
        if isinstance(value, (list, tuple)):
            return tuple(map(plain, value))
        if isinstance(value, (bool, int, float, str)):
            return value
        return id(value) if isinstance(value, torch.Tensor) else str(value)

    def settings(of: Any) -> tuple[Any, ...]:
        return tuple(
            (name, plain(value))
            for name, value in vars(of).items()
            if (
                isinstance(value, (bool, int, float, str, list))
                or (name[:1] != "_" and isinstance(value, (dict, tuple)))
            )
            and name not in ("_attn_implementation_internal", leaving_out)
        )

    modules = [
        (id(module), tuple(module._forward_hooks), tuple(module._forward_pre_hooks), id(vars(module).get("forward")))
        for module in model.modules()
    ]
    names = [attention_of(config) for config in configs]
    return [modules, names, *map(settings, model.modules()), *map(settings, configs)]
