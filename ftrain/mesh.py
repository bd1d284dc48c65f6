"""The mesh: three named dimensions that split the work, and a fourth that copies it.

`fsdp` and `ep` split the batch, `sp` splits the sequence; all three always exist, with
size 1 where unused. `replica` (HSDP) is an outer dimension that exists only above size 1:
it splits the batch too, and no model and no plan needs to know it.
"""

from typing import NamedTuple

AXES = ("fsdp", "sp", "ep")


class Mesh(NamedTuple):
    """Sizes of the mesh dimensions: all that a plan may know of the machine."""

    fsdp: int = 1
    sp: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        return self.fsdp * self.sp * self.ep


def resolve(fsdp: int, sp: int, ep: int, replica: int, world: int) -> Mesh:
    """The mesh for `world` ranks, with one size of -1 inferred.

    Raises ValueError, naming the sizes, when they do not multiply to the world size.
    """
    sizes = {"fsdp": fsdp, "sp": sp, "ep": ep}
    if replica < 1:
        raise ValueError(f"--mesh.replica {replica}: must be at least 1")
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"--mesh.{name} {size}: must be a positive size, or -1 to infer it")
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        flags = " and ".join(f"--mesh.{name}" for name in unknown)
        raise ValueError(f"{flags} are both -1: at most one mesh dimension can be inferred")
    known = replica
    for size in sizes.values():
        known *= size if size != -1 else 1
    if unknown:
        if world % known:
            raise ValueError(
                f"--mesh.{unknown[0]} -1: the world size {world} is not divisible by {known}, "
                "the product of the other mesh dimensions"
            )
        sizes[unknown[0]] = world // known
    elif known != world:
        product = " x ".join([f"fsdp {fsdp}", f"sp {sp}", f"ep {ep}"] + [f"replica {replica}"] * (replica > 1))
        raise ValueError(
            f"mesh {product} = {known} ranks, but the world size is {world}: the dimensions must "
            f"multiply to the world size (use --nproc {known}, or -1 for one dimension)"
        )
    return Mesh(**sizes)


def device_mesh(mesh: Mesh, replica: int, device_type: str):
    """torch's DeviceMesh of these sizes; needs an initialised process group."""
    from torch.distributed.device_mesh import init_device_mesh

    if replica > 1:
        return init_device_mesh(device_type, (replica, *mesh), mesh_dim_names=("replica", *AXES))
    return init_device_mesh(device_type, tuple(mesh), mesh_dim_names=AXES)
