"""Compiles models and layers, and places weights of linear layers side by side, so that one product reads them.

The product of one projection's weights with a few rows is too small to keep a GPU's memory busy; the product of three
projections of the same input is not. ``lay_side_by_side`` therefore places the weights of linear layers of one module
one after the other, as views of one tensor. Where a step applies such neighbours to the same input, a pass over its
graph replaces their products by a single one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn import functional

from vattn.kernels.linear import linear as product_of
from vattn.kernels.linear import takes

_LAYER_NUMBERS = r".*\.layer_idx"  # where transformers' modules keep the number of their layer, as torch names it


def compiled(forward: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Wraps a model's forward such that it is compiled at its first call.

    Args:
        forward: the forward of a model whose weights ``lay_side_by_side`` has placed.
        options: options of ``torch.compile``, which override those that are set here.
    """
    options = {**_options(), **(options or {})}
    done: Callable[..., Any] = torch.compile(forward, fullgraph=True, dynamic=False, options=options)
    return done


def _options() -> dict[str, Any]:
    """The options of ``torch.compile`` for models whose weights lie side by side."""
    options: dict[str, Any] = {"pre_grad_custom_pass": _joined(), "combo_kernels": True}
    if hasattr(inductor, "pre_grad_pass_timing"):
        # By default the pass runs only where no compiled graph is cached, and a cached one may have been compiled for
        # weights that lie elsewhere.
        options["pre_grad_pass_timing"] = "early"
    return options


def drop_output_hooks(model: nn.Module) -> bool:
    """Removes hooks that transformers keeps ready for callers who ask for hidden states; torch cannot compile them.

    The model is changed: use ``models.private.private_copy``.

    Returns:
        Whether no other forward hooks are left, which compiled layers might leave out.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def compile_layers(
    model: nn.Module, options: dict[str, Any] | None = None, *, pairs: bool = True, small: bool = True
) -> int:
    """Lets the layers of a model be compiled at their first call, once for all layers that run the same code.

    Linear layers beside them compute by ``vattn::linear``.

    The model is changed: use ``models.private.private_copy``. Call it within ``compiled_calls``.

    Args:
        model: a model whose weights ``lay_side_by_side`` has placed.
        options: options of ``torch.compile``, which override those that are set here.
        pairs: whether two layers are compiled as one, where their number is even. Calls raise an error where these are
            not given the same arguments.
        small: whether small modules beside them are compiled, too, e.g. the last normalization.

    Returns:
        How many layers are compiled. A layer whose weights are not placed as those of most others is not: it would run
        code that reads several weights as one tensor, and reads past those that are not side by side.
    """
    stacks = ((owner, child) for owner in model.modules() for child in owner.children())
    found = [(owner, child) for owner, child in stacks if isinstance(child, nn.ModuleList)]
    owner, layers = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=(None, None))
    if owner is None or layers is None:
        return 0
    placements = [_placement(layer) for layer in layers]
    [(usual, _)] = Counter(placements).most_common(1)
    alike = [placement == usual for placement in placements]
    options = {**_options(), **(options or {})}
    parts: list[nn.Module] = []
    for is_usual, run in itertools.groupby(range(len(layers)), alike.__getitem__):
        if is_usual:
            mine = [layers[index] for index in run]
            if pairs and len(mine) % 2 == 0:
                parts += [LayersAsOne(mine[at : at + 2]) for at in range(0, len(mine), 2)]
            else:
                parts += mine
    if small:
        parts += [child for child in owner.children() if child is not layers and _is_small(child)]
    inside = {module for part in parts for module in part.modules()}
    for module in model.modules():  # e.g. the one that computes logits
        plain = type(module) is nn.Linear and module.bias is None and "forward" not in vars(module)
        if plain and module not in inside:
            module._compiled_call_impl = functools.partial(_forward, module)
    for part in parts:
        part.compile(fullgraph=True, dynamic=True, options=options)
        if isinstance(part, LayersAsOne):
            part.take_calls()
    return sum(alike)


def _forward(module: Any, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 as the module names it
    return product_of(input, module.weight)


def _is_small(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers, and none of them is a matrix. Those of torch need no compilation."""
    tensors = [*module.parameters(), *module.buffers()]
    return (
        bool(tensors) and all(each.dim() < 2 for each in tensors) and not type(module).__module__.startswith("torch.")
    )


class LayersAsOne(nn.Module):
    """Layers that follow each other and are compiled as one, so that one kernel ends a layer and begins the next.

    A call of the first of them computes all, and calls of the others return what they are given.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # What the first of the layers has returned and was given, until the last one was called.
        self._computed: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]] | None = None
        self._uncalled = 0

    def forward(self, states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        for layer in self.layers:
            states = layer.forward(states, *args, **options)
        return states

    def take_calls(self) -> None:
        """Takes the place of the layers where these are called."""
        first, *others = self.layers
        first._compiled_call_impl = self._compute
        for layer in others:
            layer._compiled_call_impl = self._pass_on

    def _compute(self, states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        made: torch.Tensor = self(states, *args, **options)
        self._computed, self._uncalled = (made, args, options), len(self.layers) - 1
        return made

    def _pass_on(self, states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert self._computed is not None
        made, given, named = self._computed
        alike = len(args) == len(given) and all(map(operator.is_, args, given)) and options.keys() == named.keys()
        if states is not made or not alike or any(value is not named[name] for name, value in options.items()):
            raise ValueError("layers that are compiled as one are given other arguments than the first of them")
        self._uncalled -= 1
        if not self._uncalled:
            self._computed = None
        return states


@contextlib.contextmanager
def compiled_calls() -> Iterator[None]:
    """Within this context layers that ``compile_layers`` has prepared are called."""
    # By default the number of a layer counts as a constant, and each layer is compiled anew. Other integers stay
    # constants: kernels that divide by heads and their sizes as variables take several times as long.
    config: Any = torch.compiler.config
    # Numbers like the scale of attention are constants, too: else torch finds that later, and begins anew.
    dynamo = torch._dynamo.config.patch(recompile_limit=32, specialize_float=True)
    with config.patch(dynamic_sources=_LAYER_NUMBERS), dynamo:
        yield


def _placement(layer: nn.Module) -> tuple[Any, ...]:
    """Which linear layers of a layer have weights that can be read together with those of the next ones."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        linears = [(key, child) for key, child in module.named_children() if type(child) is nn.Linear]
        for (key, mine), (other, theirs) in itertools.permutations(linears, 2):
            if _adjacent([mine.weight, theirs.weight]):
                biased = mine.bias is not None and theirs.bias is not None and _adjacent([mine.bias, theirs.bias])
                found.append((name, key, other, mine.weight.storage_offset() == 0, biased))
    return tuple(found)


def lay_side_by_side(model: nn.Module) -> bool:
    """Places side by side the weights of linear layers that are children of one module and take inputs of one size.

    The parameters stay the same objects, and only their memory moves, also for other models that have the same
    parameters. Other parameter objects that view the old memory do not move along. ``save_pretrained`` saves the
    weights as before; ``safetensors.torch.save_model`` refuses them, since they share a storage.

    Args:
        model: the model whose weights are moved.

    Returns:
        Whether any weights have moved. Weights that lie side by side already, or that share their memory with another
        process, do not move.

    Raises:
        torch.OutOfMemoryError: there is no memory for a second copy of the weights that are to lie side by side; those
            of other layers may have moved.
    """
    moved = False
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + 1
    for module in model.modules():
        alike: dict[Any, list[nn.Linear]] = {}
        for child in module.children():
            if type(child) is nn.Linear and _plain(child, owners):
                weight = child.weight
                key = (child.in_features, weight.dtype, weight.device, child.bias is None, weight.requires_grad)
                alike.setdefault(key, []).append(child)
        for linears in alike.values():
            moved = _join([linear.weight for linear in linears]) or moved
            if linears[0].bias is not None:
                moved = _join([linear.bias for linear in linears]) or moved
    return moved


def _plain(linear: nn.Linear, owners: dict[int, int]) -> bool:
    """Whether the parameters of a layer can be moved.

    Args:
        linear: the layer.
        owners: for each address, how many parameters of the model begin there.
    """
    parameters = list(linear.parameters(recurse=False))
    return all(
        type(parameter) is nn.Parameter
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and parameter.data_ptr() != 0
        and owners[parameter.data_ptr()] == 1  # tied parameters stay where they are
        and (parameter.is_cuda or not parameter.is_shared())  # type: ignore[no-untyped-call]
        for parameter in parameters
    )


def _join(parameters: Sequence[torch.Tensor]) -> bool:
    alone = all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters)
    # A parameter in a larger storage lies side by side with others already, or is a part of another tensor.
    if len(parameters) == 1 or not alone:
        return False
    with torch.inference_mode(False), torch.no_grad():
        joint = torch.cat([parameter.detach() for parameter in parameters])
        if joint.is_cuda:
            torch.cuda.synchronize(joint.device)  # kernels on other streams may still read the old memory
        for parameter, part in zip(parameters, torch.split(joint, [len(p) for p in parameters]), strict=True):
            parameter.data = part
        if joint.is_cuda:
            # Else the next allocations are cut out of the old memory, and what remains of it is too small to be used.
            torch.cuda.empty_cache()
    return True


def _adjacent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether contiguous tensors follow each other without a gap in one storage."""
    return all(
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and b.storage_offset() == a.storage_offset() + a.numel()
        for a, b in itertools.pairwise(tensors)
    )


# Functions of the module ``operator`` that write to their first operand.
_WRITERS = {operator.setitem} | {
    getattr(operator, f"i{name}")
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
}


class _Joined(CustomGraphPass):
    """A pass over a graph of torch functions that joins products of one input with weights that lie side by side.

    Products without a bias are then computed by ``vattn::linear``, where it takes their weight.
    """

    def uuid(self) -> Any:
        return "vattn.compiled 3"

    def __call__(self, graph: torch.fx.Graph) -> None:
        of_input: dict[Any, list[Any]] = {}
        for node in list(graph.nodes):
            if _changes(node):  # it may write to an input: products before it are not joined with products behind it
                self._join_each(graph, of_input)
            elif node.op == "call_function" and node.target is functional.linear and not node.kwargs:
                of_input.setdefault(node.args[0], []).append(node)
        self._join_each(graph, of_input)
        for node in graph.nodes:
            if node.target is functional.linear and not node.kwargs and _is_taken(node):
                node.target, node.args = torch.ops.vattn.linear.default, node.args[:2]

    def _join_each(self, graph: torch.fx.Graph, of_input: dict[Any, list[Any]]) -> None:
        for nodes in of_input.values():
            nodes = [node for node in nodes if node.args[1].op == "placeholder"]
            nodes.sort(key=lambda node: _place(_value(node.args[1])))
            run: list[Any] = []
            for node in nodes:
                if run and not all(map(_joins, map(list, zip(*map(_parts, (*run, node)), strict=True)))):
                    self._join(graph, run)
                    run = []
                run.append(node)
            self._join(graph, run)
        of_input.clear()

    def _join(self, graph: torch.fx.Graph, nodes: list[Any]) -> None:
        if len(nodes) < 2:
            return
        first = next(node for node in graph.nodes if node in nodes)
        sizes = [_value(node.args[1]).shape[0] for node in nodes]
        with graph.inserting_before(first):
            joint = []
            for mine in (mine for mine in _parts(nodes[0]) if mine is not None):
                value = _value(mine)
                shape = (sum(sizes), *value.shape[1:])
                joint.append(graph.call_function(torch.as_strided, (mine, shape, value.stride())))
            product = graph.call_function(functional.linear, (first.args[0], *joint))
            starts = [0, *itertools.accumulate(sizes)]
            parts = [
                graph.call_function(torch.narrow, (product, -1, *span)) for span in zip(starts, sizes, strict=False)
            ]
        for node, part in zip(nodes, parts, strict=True):
            part.meta["example_value"] = _value(node)  # without which torch does not keep what it compiles
            node.replace_all_uses_with(part)
            graph.erase_node(node)


@functools.cache
def _joined() -> _Joined:
    """The pass, always the same object: torch compiles anew where it is another one."""
    return _Joined()


def _parts(node: Any) -> tuple[Any, Any]:
    """The weight and the bias of a linear layer's product."""
    return node.args[1], node.args[2] if len(node.args) > 2 else None


def _is_taken(product: Any) -> bool:
    """Whether a linear layer's product, or one that was joined, is computed by ``vattn::linear``."""
    weight, bias = _parts(product)
    weight = weight.args[0] if weight.target is torch.as_strided else weight
    if bias is not None or weight.op != "placeholder" or inductor.max_autotune or inductor.max_autotune_gemm:
        return False  # torch measures products itself if it is asked to
    rows = product.args[0].meta.get("example_value")
    alike = rows is not None and rows.dtype == _value(weight).dtype  # else torch.autocast rounds the rows
    return alike and takes(_value(weight))


def _joins(parts: list[Any]) -> bool:
    """Whether the weights, or the biases, of some products can be read as one tensor; also if all biases are None."""
    if all(part is None for part in parts):
        return True
    if any(part is None or part.op != "placeholder" for part in parts):
        return False
    values = [_value(part) for part in parts]
    # A compiled graph is told where an input begins, but not where its storage does: the first has to begin there.
    return values[0].storage_offset() == 0 and _adjacent(values)


def _changes(node: Any) -> bool:
    """Whether a node writes to a tensor, as far as the names of torch's functions and arguments tell."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if in_place or node.target in _WRITERS or any(node.kwargs.get(name) for name in ("out", "inplace")):
        return True
    # Functions of torch.nn.functional may be given ``inplace`` as a positional argument.
    names = getattr(getattr(node.target, "__code__", None), "co_varnames", ())
    return "inplace" in names and any(arg is True for arg in node.args)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies, as its storage and its offset there."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["example_value"]
    return value
