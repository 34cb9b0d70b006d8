"""``StepCall``: a call of a model with one token for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vattn.graphs.runner import rows_of_graph
from vattn.hf.attach import Forward
from vattn.hf.store import Store
from vattn.models.versions import CACHE_KEYWORDS


@dataclass
class StepCall:
    """A call of a model with one token for each row, as a decode step.

    Args:
        forward: of the model.
        store: of the cache that the call is given.
        ids: the tokens, ``[batch, 1]``.
        mask: the attention mask, ``[batch, length + 1]``, or None.
        tensors: the tensor arguments that change from step to step, by name; None for those that the call leaves out
            and that follow from the length.
        caches: the cache, by each keyword that it is given under.
        others: arguments that are not tensors, by name. Steps of one graph have the same.
        given: all arguments by name.
        unknown: the name of an argument of another kind, with which the call is not computed as a step; or None.
        length: positions that the sequences hold before the step; -1 while that is not known.
    """

    forward: Forward
    store: Store
    ids: torch.Tensor
    mask: torch.Tensor | None
    tensors: dict[str, torch.Tensor | None]
    caches: dict[str, Any]
    others: dict[str, Any]
    given: dict[str, Any]
    unknown: str | None = None
    length: int = -1

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return len(self.ids)

    @property
    def rounded(self) -> bool:
        """Whether the cache stores K and V in fewer bits."""
        return self.store.options.scales is not None

    def bucket(self) -> int:
        """Returns how many rows a graph for this batch has, see ``rows_of_graph``.

        Where an argument has more than two dimensions, it is just the number of rows of the batch.
        """
        if any(tensor is not None and tensor.dim() > 2 for tensor in self.tensors.values()):
            return self.batch
        return rows_of_graph(self.batch)

    def key(self, rows: int) -> Any:
        """Returns what identifies a graph with ``rows`` rows: calls with another key need another graph."""
        shapes = tuple((n, None if t is None else (self.shape(t, rows), t.dtype)) for n, t in self.tensors.items())
        return shapes, tuple(self.caches), tuple(sorted(self.others.items()))

    def shape(self, tensor: torch.Tensor, rows: int) -> tuple[int, ...]:
        """Returns the shape that one of the arguments has in a graph with ``rows`` rows."""
        return (rows, *tensor.shape[1:]) if self.by_rows(tensor) else tuple(tensor.shape)

    def inputs(self, rows: int) -> dict[str, torch.Tensor]:
        """Returns zeros that a graph with ``rows`` rows reads its arguments from, by name."""
        following = {"position_ids": (rows, 1), "cache_position": (1,)}
        with torch.inference_mode(False):
            return {
                name: torch.zeros(following[name], dtype=torch.int64, device=self.ids.device)
                if tensor is None
                else torch.zeros(self.shape(tensor, rows), dtype=tensor.dtype, device=tensor.device)
                for name, tensor in self.tensors.items()
            }

    def by_rows(self, tensor: torch.Tensor) -> bool:
        """Returns whether an argument has a first dimension for the rows, rather than the same values for all rows."""
        return tensor.dim() == 2 and len(tensor) == self.batch

    @classmethod
    def of(cls, forward: Forward, store: Store, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall | None:
        """Returns a call of a model as a decode step, or None where it is none.

        Args:
            forward: of the model.
            store: of the cache that the call is given.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
        """
        parameters = forward.parameters
        given = dict(kwargs)
        if args:
            if len(args) > 1 or "input_ids" in kwargs or parameters[:1] != ("input_ids",):
                return None
            given["input_ids"] = args[0]
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or "position_ids" not in parameters:
            return None
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return None
        tensors: dict[str, torch.Tensor | None] = {"input_ids": ids, "position_ids": None}
        if "cache_position" in parameters:
            tensors["cache_position"] = None
        caches, others, unknown = {}, {}, None
        for name, value in given.items():
            if name in ("input_ids", "attention_mask") or value is None:
                continue
            if name in ("position_ids", "cache_position") and isinstance(value, torch.Tensor):
                tensors[name] = value
            elif name in CACHE_KEYWORDS:
                caches[name] = value
            elif name != "labels" and isinstance(value, torch.Tensor) and value.shape == ids.shape:
                tensors[name] = value  # e.g. the kinds of tokens
            elif isinstance(value, (bool, int, float, str)):
                others[name] = value
            else:
                unknown = name
        if others.get("output_attentions") or others.get("output_hidden_states") or others.get("return_dict") is False:
            return None
        return cls(forward, store, ids, mask, tensors, caches, others, given, unknown)


def tokens_of(given: dict[str, Any]) -> Any:
    """Returns the tokens or embeddings of a model's call, ``[batch, n, ...]``, or None where it has none.

    Args:
        given: the arguments of the call by name.
    """
    found = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((t for t in found if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
