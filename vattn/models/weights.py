"""``Weights``: the parameters of a model, which leave the device, come back and get other values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vattn.arguments import shown
from vattn.models.state import plain_tensors


@dataclass
class _Away:
    """Memory that was put away.

    Args:
        storage: that has no memory now.
        nbytes: that it had.
        names: of the parameters in it.
        values: of its bytes, in host memory; None where they were discarded.
    """

    storage: torch.UntypedStorage
    nbytes: int
    names: set[str]
    values: torch.UntypedStorage | None


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
        self._away: list[_Away] = []

    def put_away(self, *, discard: bool) -> None:
        """Frees the memory of the parameters. What cannot be freed stays, such as weights in a file's memory.

        Args:
            discard: whether their values are given up, also those that are away already; else these go to host memory.
        """
        self.away = True
        if discard:
            for each in self._away:
                self.missing |= each.names
                each.values = None
        names: dict[int, set[str]] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            for storage in _storages(parameter):
                # On a CPU the values are in host memory already.
                frees = storage.device.type == "cuda" or (discard and storage.device.type == "cpu")
                if frees and storage.nbytes() and storage.resizable():
                    storages[storage.data_ptr()] = storage
                    names.setdefault(storage.data_ptr(), set()).add(name)
        for address, storage in storages.items():
            values = None if discard else storage.cpu()  # type: ignore[no-untyped-call]
            self.missing |= names[address] if discard else set()
            self._away.append(_Away(storage, storage.nbytes(), names[address], values))
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def bring_back(self) -> None:
        """Gives the parameters their memory back, and those that were not discarded their values.

        Raises:
            torch.OutOfMemoryError: there is no memory; calling this again goes on.
        """
        while self._away:
            each = self._away[-1]
            each.storage.resize_(each.nbytes)
            if each.values is not None:
                each.storage.copy_(each.values)
            self._away.pop()
        self.away = False

    def require_here(self) -> None:
        """Raises RuntimeError where the parameters are away."""
        if self.away:
            raise RuntimeError("the engine sleeps: call wake_up()")

    def require_whole(self) -> None:
        """Raises RuntimeError where the parameters are away, or some have no values."""
        self.require_here()
        if self.missing:
            raise RuntimeError(f"{len(self.missing)} weights were discarded: call update_weights()")

    def load(self, weights: Any) -> None:
        """Gives parameters and buffers other values.

        Args:
            weights: tensors by name, as in the model's ``state_dict``, or pairs of name and tensor, some or all; or a
                folder with a model of the same configuration.

        Raises:
            FileNotFoundError: there is no such folder.
            TypeError, ValueError: a name, a kind of tensor or a shape is not the model's. Nothing has changed.
            RuntimeError: the parameters are away.
        """
        self.require_here()
        given = self._given(weights)
        mine = self._model.state_dict(keep_vars=True)
        for name, tensor in given.items():
            if name not in mine:
                raise ValueError(f"weights has {name!r}, which the model does not have")
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                raise TypeError(f"weights has {shown(tensor)} as {name!r}, which must be a tensor with values")
            if mine[name].is_meta:
                raise ValueError(f"weights has {name!r}, which the model does not keep on a device")
            if tensor.is_floating_point() != mine[name].is_floating_point():
                raise TypeError(f"weights has {name!r} in {tensor.dtype}, and the model in {mine[name].dtype}")
            if tensor.shape != mine[name].shape:
                raise ValueError(
                    f"weights has {name!r} of the shape {list(tensor.shape)}, and the model of {list(mine[name].shape)}"
                )
        filled = set()
        with torch.no_grad():
            for name, tensor in given.items():
                mine[name].copy_(tensor)
                filled |= {storage.data_ptr() for storage in _storages(mine[name])}
        self.missing = {
            name for name in self.missing if not filled >= {storage.data_ptr() for storage in _storages(mine[name])}
        }

    def _given(self, weights: Any) -> dict[str, Any]:
        if isinstance(weights, (str, os.PathLike)):
            return self._read(Path(weights))
        if isinstance(weights, Mapping):
            return dict(weights)
        if not isinstance(weights, Iterable):
            raise TypeError(f"weights must be tensors by name, pairs of both or a folder, not {shown(weights)}")
        given = {}
        for pair in weights:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
                raise TypeError(f"weights must be tensors by name, pairs of both or a folder, and has {shown(pair)}")
            given[pair[0]] = pair[1]
        return given

    def _read(self, folder: Path) -> dict[str, Any]:
        if not folder.is_dir():
            raise FileNotFoundError(f"weights is {str(folder)!r}, and there is no such folder")
        model, told = type(self._model).from_pretrained(
            folder, dtype=self._model.dtype, local_files_only=True, output_loading_info=True
        )
        if told["mismatched_keys"]:
            raise ValueError(f"weights in {str(folder)!r} have other shapes than the model's")
        # What the folder lacks has random values there.
        return {name: tensor for name, tensor in model.state_dict().items() if name not in told["missing_keys"]}


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The memory of a tensor, or of those that it consists of."""
    return [plain.untyped_storage() for plain in plain_tensors(tensor)]
