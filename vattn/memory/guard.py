"""``VirtualTensor``: a view of virtual addresses that raises an error where printing or copying it would fault."""

from __future__ import annotations

from typing import Any

import torch

from vattn import _core

_PIECES = 1 << 14  # the most pieces of a view that are looked up in the arena


class VirtualTensor(torch.Tensor):
    """A view of a cache's addresses, of which only a part is mapped.

    For kernels and for torch's operations it is an ordinary tensor: it costs them nothing, and their results are
    ordinary tensors. Operations that a debugger, a REPL or ``torch.save`` starts by itself (``repr``, ``format``,
    pickling, ``deepcopy``, ``numpy``, ``cpu``, ``tolist``) work where the whole view is mapped and raise RuntimeError
    where it is not. Slices are ``VirtualTensor`` too. Any other operation on unmapped rows faults, as in a kernel.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _arena: _core.Arena

    def _seen(self) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        if not _readable(self._arena, plain):
            raise RuntimeError(
                f"a view of {list(self.shape)} virtual rows has no memory behind all of them: slice it to the rows of "
                "a sequence, e.g. cache.k(layer)[slot, :length]"
            )
        return plain

    def __getitem__(self, index: Any) -> torch.Tensor:
        out: torch.Tensor = super().__getitem__(index)
        is_view = out.untyped_storage().data_ptr() == self.untyped_storage().data_ptr()
        return guarded(out, self._arena) if is_view else out

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return self._seen().__repr__(**options)  # type: ignore[no-untyped-call,no-any-return]

    def __format__(self, spec: str) -> str:
        return self._seen().__format__(spec)  # type: ignore[no-untyped-call,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The clone leaves out the storage, which spans all reserved addresses.
        return self._seen().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        memo[id(self)] = copied = self._seen().clone()
        return copied

    def __array__(self, *args: Any, **options: Any) -> Any:
        return self._seen().__array__(*args, **options)  # type: ignore[no-untyped-call]

    def numpy(self, *args: Any, **options: Any) -> Any:
        return self._seen().numpy(*args, **options)

    def cpu(self, *args: Any, **options: Any) -> torch.Tensor:
        return self._seen().cpu(*args, **options)

    def tolist(self) -> Any:
        return self._seen().tolist()


def guarded(view: torch.Tensor, arena: _core.Arena) -> VirtualTensor:
    """Returns a view of an arena's addresses as a ``VirtualTensor``."""
    made = view.as_subclass(VirtualTensor)
    made._arena = arena
    return made


def _readable(arena: _core.Arena, view: torch.Tensor) -> bool:
    """Whether all memory that a view reaches is mapped; False also where ``_PIECES`` look-ups do not answer that."""
    if view.numel() == 0:
        return True
    dims = sorted(((stride, n) for stride, n in zip(view.stride(), view.shape, strict=True) if n > 1), reverse=True)
    left = _PIECES

    def look(offset: int, depth: int) -> bool:
        nonlocal left
        left -= 1
        reach = 1 + sum(stride * (n - 1) for stride, n in dims[depth:])
        if arena.readable(offset, reach * view.element_size()):
            return True
        if depth == len(dims) or left <= 0:
            return False
        stride, n = dims[depth]
        return all(look(offset + i * stride * view.element_size(), depth + 1) for i in range(n))

    return look(view.data_ptr() - arena.base, 0)
