"""All-reduce over peer memory on Hopper: every device hands its part of the sum to all others, and each adds them up.

A block takes some columns of one token. It writes its part into its device's slot of every inbox, signals the same
block of every peer, waits for all of theirs, and adds the slots up in the order of the devices: all get the same bits.
The signal is a release and the wait an acquire, both of the whole system, so whoever has waited sees what was written.

What keeps calls apart, with no help from the host, is one of two things.

Without a workspace, XLA's own barrier of all devices, which it runs in the stream before a kernel that reaches peers.
When a kernel starts, every peer has come to this call, so the inboxes that XLA made for it are free and its semaphores
are zero. A block ends only when all parts for it are there: nothing is under way any more when XLA gives that memory to
something else. Nobody reads a peer's memory.

With a workspace there is no barrier. It is made once, zeroed, before any step, and lives as long as the engine; all
devices call the same kernels in the same order. Each block has inboxes and flags of its own there, two inboxes, taken
in turn. Say a peer's block writes its part of call n + 2 while ours still reads that of call n, from the same inbox:
it has ended call n + 1, so it has seen our flag of call n + 1, which our device set after all of its call n. So it
cannot be. A flag counts up by one for each call and down by one when that was waited for; with a flag for each pair of
devices, no device's early signal stands in for another's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm

I32, F32 = jnp.int32, jnp.float32
THREADS = 128  # of a warpgroup, of which a block has one
MIN_WIDTH = 1024  # columns of a block: 8 a thread, a load of 16 bytes
MAX_WIDTH = 8192  # what a block's registers hold
MAX_BLOCKS = 264  # two on each of an H100's multiprocessors: blocks wait for peers, so all must be resident
MAX_BYTES = 2 * 2**20  # that a device sends; not yet measured


def block_width(num_tokens: int, dim: int, *, whole_rows: bool) -> int | None:
    """Returns how many columns of a row a block takes, so that all blocks are resident.

    None where there is no such width.
    """
    if dim % THREADS or num_tokens > MAX_BLOCKS:
        return None
    if whole_rows:
        return dim if dim <= MAX_WIDTH else None
    widths = [dim // parts for parts in range(1, dim // THREADS + 1) if dim % (parts * THREADS) == 0]
    fitting = [w for w in widths if w <= MAX_WIDTH and num_tokens * (dim // w) <= MAX_BLOCKS]
    return min((w for w in fitting if w >= MIN_WIDTH), default=max(fitting, default=None))


def workspace_shapes(num_devices: int, max_width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the inboxes and flags of each device.

    They are for sums whose blocks are up to `max_width` columns wide.

    Flags hold for each device how many of its signals are unread; last, which inbox is next.
    """
    return (2, num_devices, MAX_BLOCKS, max_width), (MAX_BLOCKS, num_devices + 1)


def _inline(*arg_types: Any) -> Any:
    """Marks a function as Mosaic's own code; what is called has no launch context as its first argument."""
    return plgpu.inline_mgpu(arg_types=arg_types)


def _store(ref, values, layout) -> None:
    """Writes to a peer, of whose address Mosaic knows too little to write more than two bytes at once.

    Args:
      values: in `layout`, which is strided.
    """
    vec_size = layout.kwargs["vec_size"]

    @_inline(plgpu.RefType(), layout)
    def store(_, ref, values):
        start = arith.muli(mgpu.utils.thread_idx(), mgpu.utils.c(vec_size, mgpu.utils.thread_idx().type))
        for i, register in enumerate(values.registers.flat):
            pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [start], values.mlir_dtype)
            pointer = mgpu.utils.getelementptr(pointer, [i * THREADS * vec_size], values.mlir_dtype)
            llvm.store(register, pointer, alignment=vec_size * 2)

    store(ref, values)


@_inline(plgpu.RefType())
def _signal(_, flag):
    """Adds one to a peer's flag, once all threads' writes are done."""
    mgpu.utils.warpgroup_barrier()
    mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(flag)).signal(1)


@_inline(plgpu.RefType())
def _wait(_, flag):
    """Waits until a flag is positive, and takes one off."""
    mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(flag)).wait(1)


def all_reduce(x, axis_name: str, *, residual, norm_weight, norm_eps: float, norm_offset: float, workspace=None) -> Any:
    """See `api.all_reduce`."""
    num_devices, (num_tokens, dim) = lax.axis_size(axis_name), x.shape
    has_norm, kept = norm_weight is not None, () if workspace is None else (workspace.inboxes, workspace.flags)
    width = block_width(num_tokens, dim, whole_rows=has_norm)
    assert width is not None
    num_parts = dim // width
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(8, width // THREADS))

    def load(ref, *index):
        return plgpu.layout_cast(ref[*index], layout)

    def exchange(own, inbox_ref, index, signal, wait):
        """Gives `own` to every device's inbox, and returns the sum of what is in ours."""
        me = lax.axis_index(axis_name)
        peers = [{axis_name: lax.rem(me + i, jnp.int32(num_devices))} for i in range(1, num_devices)]
        inbox_ref[*index(me)] = own
        for peer in peers:
            _store(plgpu.remote_ref(inbox_ref, peer).at[*index(me)], own, layout)
        for peer in peers:
            signal(me, peer)
        wait([peer[axis_name] for peer in peers])
        parts = (load(inbox_ref, *index(jnp.int32(i))).astype(F32) for i in range(num_devices))
        return functools.reduce(jnp.add, parts).astype(x.dtype)

    def all_reduce(*refs, **arrived):
        refs = list(refs)
        x_ref = refs.pop(0)
        residual_ref = refs.pop(0) if residual is not None else None
        weight_ref = refs.pop(0) if has_norm else None
        inboxes_ref, flags_ref = (refs.pop(0), refs.pop(0)) if kept else (None, None)
        out_ref, *refs = refs
        row, part = lax.axis_index("row"), lax.axis_index("part")
        columns = pl.ds(part * width, width)
        own = load(x_ref, row, columns)
        if flags_ref is not None:
            block = row * num_parts + part
            turn = flags_ref[block, num_devices]
            total = exchange(
                own,
                inboxes_ref,
                lambda device: (turn, device, block, pl.ds(0, width)),
                lambda me, peer: _signal(plgpu.remote_ref(flags_ref, peer).at[block, me]),
                lambda devices: [_wait(flags_ref.at[block, device]) for device in devices],
            )
            flags_ref[block, num_devices] = 1 - turn
        else:
            total = exchange(
                own,
                refs[0],
                lambda device: (device, row, columns),
                lambda _, peer: pl.semaphore_signal(arrived["arrived"], device_id=peer),
                lambda devices: pl.semaphore_wait(arrived["arrived"], len(devices)),
            )
        if residual_ref is not None:
            total = (load(residual_ref, row, columns).astype(F32) + total.astype(F32)).astype(x.dtype)
        out_ref[row, columns] = total
        if weight_ref is not None:
            wide = total.astype(F32)
            factor = lax.rsqrt(jnp.sum(wide * wide) / dim + norm_eps)
            weight = load(weight_ref, columns).astype(F32) + norm_offset
            refs[-1][row, columns] = (wide * factor * weight).astype(x.dtype)

    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    inbox = jax.ShapeDtypeStruct((num_devices, *x.shape), x.dtype)
    outs = plgpu.kernel(
        all_reduce,
        out_type=(like_x, *[inbox] * (not kept), *[like_x] * has_norm),
        grid=(num_tokens, num_parts),
        grid_names=("row", "part"),
        scratch_types={} if kept else {"arrived": plgpu.SemaphoreType.REGULAR},
        compiler_params=plgpu.CompilerParams(skip_device_barrier=bool(kept)),
    )(*(array for array in (x, residual, norm_weight) if array is not None), *kept)
    return (outs[0], outs[-1]) if has_norm else outs[0]
