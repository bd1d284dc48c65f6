"""Plans as JAX shardings: placements over (fsdp, sp, ep) are the dimensions of a PartitionSpec."""

from typing import Literal

from jax.sharding import Mesh as JaxMesh
from jax.sharding import NamedSharding, PartitionSpec

from ..layout import Placements
from ..mesh import AXES, Mesh
from ..plan import Plan, ask
from ..specs import Specs


def partition_specs(
    plan: Plan, specs: Specs, mesh: JaxMesh, uneven: Literal["refuse", "replicate"] = "refuse"
) -> dict[str, NamedSharding]:
    """What the plan says of each parameter, on a JAX mesh with dimensions named fsdp, sp and ep.

    A name that the mesh has not is a dimension of size 1; what else the mesh has copies the whole. The device at a
    place of the mesh holds what the rank at that place holds, byte for byte. JAX cuts evenly only: `uneven` says
    whether a parameter that torch would cut unevenly is refused, or stays whole in that dimension.
    Raises ValueError naming the parameter, its dimension and the sizes; and what `plan.ask` raises.
    """
    sizes = Mesh(**{axis: mesh.shape.get(axis, 1) for axis in AXES})
    placements = ask(plan, specs, sizes)
    return {
        name: NamedSharding(mesh, _spec(name, specs[name].shape, placements, sizes, uneven == "replicate"))
        for name in specs
    }


def _spec(
    name: str, shape: tuple[int, ...], placements: Placements, sizes: Mesh, replicate: bool
) -> PartitionSpec:  # fmt: skip
    # One after the other, outermost first, as DTensor cuts: so PartitionSpec orders the names of a dimension.
    cuts: list[list[str]] = [[] for _ in shape]
    for axis, size, placement in zip(AXES, sizes, placements[name], strict=True):
        if placement.is_shard() and size > 1:
            cuts[placement.dim].append(axis)
    for dim, axes in enumerate(cuts):
        ranks = 1
        for axis in axes:
            ranks *= getattr(sizes, axis)
        if shape[dim] % ranks:
            if not replicate:
                over = " and ".join(f"{axis} {getattr(sizes, axis)}" for axis in axes)
                raise ValueError(
                    f"the plan cuts dimension {dim} of {name}, {shape[dim]} long, over {over}: JAX cuts evenly only; "
                    "uneven='replicate' leaves it whole"
                )
            axes.clear()
    while cuts and not cuts[-1]:
        cuts.pop()
    return PartitionSpec(*(tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in cuts))
