"""A model's description indexed for a client: children, sites and parameters by path, and refusals of unknown names."""

from __future__ import annotations

from dataclasses import dataclass, field

from polytrace.aliases import Aliases, resolved, standard_aliases
from polytrace.description import Leaf, ModelDescription, ModuleInfo, ParameterInfo, PartInfo, PointInfo, SiteInfo
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Port, Site
from polytrace.lines import user_line
from polytrace.sources import Sources


class NoSuchNameError(GraphError, AttributeError):
    """Also an AttributeError: `hasattr` and completion ask for names that are not there."""


class NoSuchLayerError(GraphError, IndexError):
    """Also an IndexError, as of any list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortTable:
    """One side of a module: its tensors by the way to them."""

    info: SiteInfo
    is_layer_output: bool  # a decoder layer's `.output`, one tensor
    leaves: dict[tuple[int | str, ...], tuple[Site, Leaf]]
    dims: tuple[str, ...] | None = None  # names of the dimensions of a named point
    is_stream: bool = False  # the residual as a norm takes it: assigned, it is another one for the layer's sum too
    is_dropout_input: bool = False  # of a family's attention dropout: `input[0][0]` means the weights too
    refuses_ints: bool = False  # another layer's `.output`, one tensor: `[0]` meant the hidden states for years
    is_call: bool = False  # `.inputs`: positional arguments, then those by keyword


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a dotted path leads to."""

    description: ModelDescription
    modules: dict[str, ModuleInfo]
    children: dict[str, tuple[str, ...]]  # path -> names, in the model's order
    own_parameters: dict[str, tuple[str, ...]]  # path of a module -> names of its own
    parameters: dict[str, ParameterInfo]
    ports: dict[tuple[str, str], PortTable]  # by path and the port's name; first visits
    leaves: dict[Site, Leaf]  # of these ports
    sources: Sources
    points: dict[str, dict[str, PointInfo]]  # by path and name: names that are no ports
    layer_weights: dict[str, dict[str, str]]  # decoder layer -> paths of named weights inside it, by name
    inside_layers: dict[str, tuple[str, ...]]  # decoder layer -> modules inside it that have named points
    standard: dict[str, str]  # modules that every decoder has, by standard name
    parts: dict[tuple[str, str], PartInfo]  # by decoder layer and standard name
    aliases: Aliases = field(default_factory=dict)
    # of a model that is called as it is: all visits of a port by their numbers, also those without tensors
    visits: dict[tuple[str, str], dict[int, PortTable]] = field(default_factory=dict)

    def native(self, path: str, start: str = "") -> str:
        """The path below `start` that one with aliases in it means."""
        return resolved(path, self.aliases, self.modules, start)

    def why_not(self, path: str, name: str) -> str | None:
        """Why a module has nothing of a standard name; None of other names, and where it has."""
        part = self.parts.get((path, name))
        return part.refusal if part is not None else None if path else self.description.not_standard.get(name)

    def why_no_own_path(self, path: str) -> str | None:
        """Why there is no module at a path at which there are weights: it is one that has another path, too."""
        if path in self.modules or not any(known.startswith(f"{path}.") for known in self.parameters):
            return None
        return "it is a module that has another path, too: print(model) shows which; its calls are that one's visits"

    def module(self, path: str) -> ModuleInfo:
        """Raises NoSuchNameError with the nearest paths."""
        if path not in self.modules:
            raise NoSuchNameError(f"this model has no module {path!r}{nearest(path, self.modules)}", where=user_line())
        return self.modules[path]


def index_description(description: ModelDescription) -> Table:
    """The table of a description, made once."""
    children: dict[str, list[str]] = {}
    for info in description.modules:
        if info.path:
            parent, _, name = info.path.rpartition(".")
            children.setdefault(parent, []).append(name)
    own: dict[str, list[str]] = {}
    for parameter in description.parameters:
        parent, _, name = parameter.path.rpartition(".")
        own.setdefault(parent, []).append(name)
    modules = {info.path: info for info in description.modules}
    ports: dict[tuple[str, str], PortTable] = {}
    leaves: dict[Site, Leaf] = {}
    for port in description.sites:
        if port.visit == 0:
            members = {leaf.selector: (_site(port, leaf), leaf) for leaf in port.leaves}
            leaves |= dict(members.values())
            module = modules[port.module]
            is_layer_output = module.is_decoder_layer and port.port is Port.OUTPUT and port.structure == "tensor"
            ports[port.module, port.port.value] = PortTable(
                info=port, is_layer_output=is_layer_output, leaves=members, refuses_ints=refuses_ints(port, module)
            )
    points: dict[str, dict[str, PointInfo]] = {}
    for point in description.points:
        points.setdefault(point.module, {})[point.name] = point
    owners = dict.fromkeys([*(info.module for info in description.sites if info.port.is_inner), *points])
    inside: dict[str, list[str]] = {}
    for owner in owners:
        layer = layer_of(owner, description)
        if layer is not None:
            inside.setdefault(layer, []).append(owner)
    layer_weights: dict[str, dict[str, str]] = {}
    for parameter in description.parameters:
        owner, _, name = parameter.path.rpartition(".")
        layer = layer_of(owner, description) if parameter.of is not None else None
        if layer is not None:
            layer_weights.setdefault(layer, {}).setdefault(name, parameter.path)
    return Table(
        description=description,
        modules=modules,
        children={path: tuple(names) for path, names in children.items()},
        own_parameters={path: tuple(names) for path, names in own.items()},
        parameters={parameter.path: parameter for parameter in description.parameters},
        ports=ports,
        leaves=leaves,
        sources=Sources(description),
        points=points,
        layer_weights=layer_weights,
        inside_layers={path: tuple(own) for path, own in inside.items()},
        standard={"layers": description.layers, **description.standard},
        parts={(part.module, part.name): part for part in description.parts},
        aliases=standard_aliases(description, children),
    )


def refuses_ints(port: SiteInfo, owner: ModuleInfo) -> bool:
    """Whether an int on a module's `.output` means two things: the layer gave a tuple for years, whose first member
    were the hidden states, and gives these alone now, whose first member is the first sequence's.
    """
    is_one = port.port is Port.OUTPUT and port.structure == "tensor"
    if not is_one or not port.leaves or owner.is_decoder_layer or not owner.is_layer:
        return False  # without leaves: what it gives is of `torch.func` or `torch.vmap`, and nobody's to read
    (leaf,) = port.leaves
    return len(leaf.tail) + (0 if leaf.is_whole else 2) > 2


def _site(info: SiteInfo, leaf: Leaf) -> Site:
    return Site(module=info.module, port=info.port, selector=leaf.selector, visit=info.visit)


def layer_of(path: str, description: ModelDescription) -> str | None:
    """The decoder layer that a module is inside of; None of a layer itself, and of what is in none."""
    rest = path.removeprefix(f"{description.layers}.")
    number, dot, _ = rest.partition(".")
    return join(description.layers, number) if rest != path and dot else None


def join(path: str, name: str) -> str:
    """A child's path."""
    return f"{path}.{name}" if path else name


def draw(table: Table, path: str) -> str:
    """The module tree below a path, as torch prints it, with equal neighbours in a list folded into one line."""
    info = table.modules[path]
    lines = []
    groups: list[tuple[str, str, str]] = []  # first name, last name, text
    for name in table.children.get(path, ()):
        text = draw(table, join(path, name))
        if info.is_list and groups and groups[-1][2] == text:
            groups[-1] = (groups[-1][0], name, text)
        else:
            groups.append((name, name, text))
    also: dict[str, list[str]] = {}
    for alias, target in table.aliases.get(path, {}).items():
        also.setdefault(target, []).append(alias)
    for first, last, text in groups:
        indented = text.replace("\n", "\n  ")
        if first == last:
            label = "/".join([first, *also.get(join(path, first), ())])
            lines.append(f"  ({label}): {indented}")
        else:
            lines.append(f"  ({first}-{last}): {int(last) - int(first) + 1} x {indented}")
    return f"{info.class_name}(" + ("\n" + "\n".join(lines) + "\n" if lines else "") + ")"
