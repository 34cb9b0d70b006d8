"""Compares what vattn reads from every configuration class of transformers with the layers of a ``DynamicCache``."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, DynamicCache

from vattn.memory import configuration

_OF_LAYERS = ("layer_types", "layers_block_type", "per_layer_config")
# Parts of the messages with which a configuration may be refused: vattn has no rows for what its layers cache, or it
# does not give a number of attention heads as a single integer, as in configurations of image models.
CAUSES = (
    "which vattn has no rows for",
    "lacks '",
    "must be an integer, not [",
    "must be an integer, not (",
    "at least 1",
)


@dataclass(frozen=True)
class Answer:
    """What vattn reads from one form of a configuration.

    Attributes:
        model: the model type.
        form: ``"object"``, or a mapping: ``"file"``, or ``"old file"``, which lacks the keys that say what each layer
            is.
        expected: for each layer that ``DynamicCache`` makes, 0 if it has no rows, else its window, None without one.
        got: the same as vattn reads it; None if vattn refused the configuration.
        recurrent: whether there are layers with a recurrent state, by ``DynamicCache`` and by vattn.
        refusal: the message of the refusal.
    """

    model: str
    form: str
    expected: list[int | None]
    got: list[int | None] | None
    recurrent: tuple[bool, bool]
    refusal: str = ""

    @property
    def right(self) -> bool:
        if self.got is None:
            return any(cause in self.refusal for cause in CAUSES)
        # Some versions of DynamicCache make no layers for the last layers where these share the rows of others.
        got = self.got[: len(self.expected)] + [one for one in self.got[len(self.expected) :] if one != 0]
        return got == self.expected and self.recurrent[0] == self.recurrent[1]


def _without(mapping: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without(value) if isinstance(value, dict) else value
        for name, value in mapping.items()
        if name not in _OF_LAYERS
    }


def _answer(model: str, form: str, given: Any, layers: list[Any]) -> Answer:
    names = [type(layer).__name__ for layer in layers]
    expected = [
        getattr(layer, "sliding_window", None) if name in configuration._ROWS else 0
        for name, layer in zip(names, layers, strict=True)
    ]
    recurrent = any(name in configuration._STATES for name in names)
    try:
        shapes, ours = configuration.described(given, None)
    except (TypeError, ValueError) as error:
        return Answer(model, form, expected, None, (recurrent, recurrent), str(error))
    return Answer(model, form, expected, [s.window if s else 0 for s in shapes], (recurrent, ours))


def answers(*wanted: str) -> Iterator[Answer]:
    """Yields an answer for each form of each configuration that ``DynamicCache`` takes and JSON can hold.

    Args:
        wanted: the forms, see ``Answer``.
    """
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model, kind in CONFIG_MAPPING.items():
                try:
                    config = kind()
                    if configuration._without_layer_types(config):
                        continue
                    file = json.loads(json.dumps(config.to_dict(), default=str))
                except Exception:  # the class has no defaults for all of its arguments
                    continue
                forms: dict[str, Any] = {"object": config, "file": file, "old file": _without(file)}
                for form in wanted:
                    given = forms[form]
                    try:
                        config = given if form == "object" else kind.from_dict(copy.deepcopy(given))
                        layers = DynamicCache(config=config).layers
                    except Exception:  # the model has no cache
                        continue
                    yield _answer(model, form, given, layers)
    finally:
        logging.disable(logging.NOTSET)
