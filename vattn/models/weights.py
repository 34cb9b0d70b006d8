"""``Weights``: the parameters of a model, which leave the device, come back and get other values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vattn.arguments import shown
from vattn.models.state import plain_tensors


class Weights:
    """The parameters of a model. They stay the same objects, so that nothing has to be told when they come back.

    Args:
        model: a model of transformers.

    Attributes:
        away: whether ``put_away`` was called, and ``bring_back`` has not brought all back.
        missing: names of parameters that were discarded and have got no values yet.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.away = False
        self.missing: set[str] = set()
        self._away: list[tuple[torch.UntypedStorage, int, torch.UntypedStorage | None]] = []

    def put_away(self, *, discard: bool) -> None:
        """Frees the memory of the parameters. Weights that cannot be freed, such as those of a file, stay.

        Args:
            discard: whether their values are given up; else these go to host memory.
        """
        names: dict[int, list[str]] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            for tensor in plain_tensors(parameter):
                storage = tensor.untyped_storage()
                # On a CPU the values are in host memory already.
                if storage.nbytes() and storage.resizable() and (discard or storage.device.type != "cpu"):
                    storages[storage.data_ptr()] = storage
                    names.setdefault(storage.data_ptr(), []).append(name)
        self.away = True
        for address, storage in storages.items():
            self._away.append((storage, storage.nbytes(), None if discard else storage.cpu()))  # type: ignore[no-untyped-call]
            storage.resize_(0)
            if discard:
                self.missing.update(names[address])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def bring_back(self) -> None:
        """Gives the parameters their memory back, and those that were not discarded their values.

        Raises:
            torch.OutOfMemoryError: there is no memory; calling this again goes on.
        """
        while self._away:
            storage, nbytes, values = self._away[-1]
            storage.resize_(nbytes)
            if values is not None:
                storage.copy_(values)
            self._away.pop()
        self.away = False

    def require_there(self) -> None:
        """Raises RuntimeError where the parameters are away, or some have no values."""
        if self.away:
            raise RuntimeError("the engine sleeps: call wake_up()")
        if self.missing:
            raise RuntimeError(f"{len(self.missing)} weights were discarded: call update_weights()")

    def load(self, weights: Any) -> None:
        """Gives parameters and buffers other values.

        Args:
            weights: tensors by name, as in the model's ``state_dict``, or pairs of name and tensor, some or all; or a
                folder with a model of the same configuration.

        Raises:
            TypeError, ValueError: a name or a shape is not the model's. Nothing has changed.
            RuntimeError: the parameters are away.
        """
        if self.away:
            raise RuntimeError("the engine sleeps: call wake_up()")
        given = self._given(weights)
        mine = self._model.state_dict(keep_vars=True)
        for name, tensor in given.items():
            if name not in mine:
                raise ValueError(f"weights has {name!r}, which the model does not have")
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"weights has {shown(tensor)} as {name!r}, which must be a tensor")
            if tensor.shape != mine[name].shape:
                raise ValueError(
                    f"weights has {name!r} of the shape {list(tensor.shape)}, and the model of {list(mine[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in given.items():
                mine[name].copy_(tensor)
        filled = {mine[name].untyped_storage().data_ptr() for name in given}
        self.missing -= {name for name in self.missing if mine[name].untyped_storage().data_ptr() in filled}

    def _given(self, weights: Any) -> dict[str, Any]:
        if isinstance(weights, (str, os.PathLike)):
            model = type(self._model).from_pretrained(weights, dtype=self._model.dtype, local_files_only=True)
            return dict(model.state_dict())
        if isinstance(weights, Mapping):
            return dict(weights)
        if not isinstance(weights, Iterable):
            raise TypeError(f"weights must be tensors by name, pairs of both or a folder, not {shown(weights)}")
        try:
            return dict(weights)
        except (TypeError, ValueError):
            raise TypeError("weights must be tensors by name, pairs of both or a folder") from None
