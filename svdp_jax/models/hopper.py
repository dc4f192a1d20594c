"""Softmax attention on NVIDIA's Hopper (H100, H200): a Pallas kernel, in bfloat16, forward alone.

As many blocks run as the device has multiprocessors, and each takes one tile of 3 x 64 queries of a head after the other. In a block, three warpgroups have
64 queries each, and a fourth fetches: queries of the next tile while this one is worked on, keys and values `STAGES` blocks ahead. The tensor cores get the
scores of the next block of keys and the sums of this block's values together; the exponentials in between are taken while other warpgroups have the
tensor cores. Scores are in units of log2(e), which queries are scaled by before they come, so that the exponential is the device's own, of base 2.

Where a bound on scores says that the exponential of none can leave float32, none needs the largest score of its row taken off: 275 instructions a block, for 451. Where the
bound is larger, or none is given, the largest so far is kept, as in FlashAttention (arXiv:2205.14135). The bound is read by the kernel: it is no constant of the program.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, BFloat16, Float32, Int32

WARPGROUPS = 3  # that compute
ROWS = 64  # queries of a warpgroup, as many as its instruction takes
KEYS = 128  # at a time
STAGES = 3  # blocks of keys and values in shared memory
REGISTERS = 160, 32  # of a thread that computes, and of one that fetches: 65,536 in all
HEAD_SIZE = 64
UNIT = 8  # rows of a tile of shared memory, of which sequences are to be multiples
MULTIPROCESSORS = 132
TILE = WARPGROUPS * ROWS

# Exponentials are then between 2^-87 and 2^87. Below, 2^39 are left to the smallest normal number; above, a sum over a million keys leaves values 2^20.
BOUND = 60.0


@jax.jit  # so that layers of the same shapes share one kernel: lowering one takes half a second
def attention(
    q: BFloat16[Array, "G Q N 64"],
    k: BFloat16[Array, "G K N 64"],
    v: BFloat16[Array, "G K N 64"],
    lengths: Int32[Array, " G"] | None = None,
    bound: Float32[Array, ""] | None = None,
) -> BFloat16[Array, "G Q N 64"]:
    """softmax(q k / sqrt(H)) v of each group, over its first lengths[g] keys, of which there is at least one; None: over all.

    `bound`, given, is what no score q k / sqrt(H) exceeds in magnitude. Keys and values beyond the length have to be finite."""
    groups, queries, heads, size = q.shape
    keys = k.shape[1]
    q = (q.astype(jnp.float32) * (size**-0.5 * math.log2(math.e))).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % UNIT), (0, 0), (0, 0))) for x in (q, k, v))
    tiles_of_head = pl.cdiv(queries, TILE)
    tiles = groups * heads * tiles_of_head
    blocks = min(tiles, getattr(jax.devices()[0], "core_count", None) or MULTIPROCESSORS)
    given = [x for x in (lengths, None if bound is None else bound.reshape(1)) if x is not None]

    def hopper_attention(q_ref, k_ref, v_ref, *refs):
        refs = list(refs)
        lengths_ref = None if lengths is None else refs.pop(0)
        bound_ref = None if bound is None else refs.pop(0)
        out_ref, q_tiles, out_tiles, k_blocks, v_blocks, *barriers = refs
        q_full, q_free, k_full, k_free, v_full, v_free = barriers
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        mine = (tiles - block + blocks - 1) // blocks

        def place(turn):
            """(group, head, first query) of a tile, and how many keys its group has. Neighbours in time share keys and values."""
            tile = block + turn * blocks
            group = tile // (tiles_of_head * heads)
            return (group, tile // tiles_of_head % heads, tile % tiles_of_head * TILE), keys if lengths is None else lengths_ref[group]

        def fetch():
            gpu.set_max_registers(REGISTERS[1], action="decrease")

            def tile(turn, first):
                (group, head, start), count = place(turn)
                slot = turn % 2
                for part in range(WARPGROUPS):
                    barrier = slot * WARPGROUPS + part
                    pl.when(turn >= 2)(lambda barrier=barrier: gpu.barrier_wait(q_free.at[barrier]))
                    rows = pl.ds(start + part * ROWS, ROWS)
                    gpu.copy_gmem_to_smem(q_ref.at[group, rows, head], q_tiles.at[slot, part], q_full.at[barrier])

                steps = pl.cdiv(count, KEYS)

                def keys_and_values(step, _):
                    slot = (first + step) % STAGES
                    rows = pl.ds((step + steps - 1) % steps * KEYS, KEYS)  # the last block first
                    for source, target, full, free in ((k_ref, k_blocks, k_full, k_free), (v_ref, v_blocks, v_full, v_free)):
                        pl.when(first + step >= STAGES)(lambda free=free: gpu.barrier_wait(free.at[slot]))
                        gpu.copy_gmem_to_smem(source.at[group, rows, head], target.at[slot], full.at[slot])

                lax.fori_loop(0, steps, keys_and_values, None)
                return first + steps

            lax.fori_loop(0, mine, tile, 0)

        def exponentials(scores, largest):
            """[ROWS, KEYS], in the type of values, and their sums [ROWS]."""
            weights = jnp.exp2(scores if largest is None else scores - lax.broadcast_in_dim(largest, scores.shape, [0]))
            return weights.astype(v.dtype), weights.sum(axis=1)

        def compute(running_max: bool):
            def tile(turn, first):
                (group, head, start), count = place(turn)
                steps, asked = pl.cdiv(count, KEYS), turn % 2 * WARPGROUPS + warpgroup
                gpu.barrier_wait(q_full.at[asked])

                def scores(step, sum_values=None):
                    """[ROWS, KEYS] of a block of keys. `sum_values` joins it in the tensor cores, and may go on behind it."""
                    slot = (first + step) % STAGES
                    gpu.barrier_wait(k_full.at[slot])

                    def product(scores_ref):
                        gpu.wgmma(scores_ref, q_tiles.at[turn % 2, warpgroup], k_blocks.at[slot].transpose((1, 0)))
                        if sum_values:
                            sum_values()
                        return lax.optimization_barrier(gpu.wgmma_accumulator_load(scores_ref, wait_n=1 if sum_values else 0))

                    found = pl.run_scoped(product, gpu.ACC((ROWS, KEYS), jnp.float32))
                    gpu.barrier_arrive(k_free.at[slot])
                    return found

                def softmax(sums_ref):
                    """Sums of values, by their weights, and of the weights [ROWS]."""

                    def sum_values(step, weights):
                        gpu.wgmma(sums_ref, weights, v_blocks.at[(first + step) % STAGES])

                    def summed(step):
                        sums = gpu.wgmma_accumulator_load(sums_ref, wait_n=0)
                        gpu.barrier_arrive(v_free.at[(first + step) % STAGES])
                        return lax.optimization_barrier(sums)

                    def block(step, carry):
                        """Values of a block, and scores of the next."""
                        weights, largest, total = carry
                        weights = lax.optimization_barrier(weights)  # they stay where they are while the tensor cores read them
                        gpu.barrier_wait(v_full.at[(first + step) % STAGES])
                        found = scores(step + 1, lambda: sum_values(step, weights))
                        if running_max:
                            largest, before = jnp.maximum(largest, found.max(axis=1)), largest
                            fade = jnp.exp2(before - largest)
                            total *= fade
                        weights, more = exponentials(found, largest)
                        sums = summed(step)
                        if running_max:
                            sums_ref[...] = sums * lax.broadcast_in_dim(fade, sums.shape, [0])
                        return weights, largest, total + more

                    found = scores(0)
                    key = gpu.broadcasted_iota(jnp.int32, found.shape, 1, layout=gpu.Layout.WGMMA)
                    found = jnp.where(key < count - (steps - 1) * KEYS, found, -jnp.inf)
                    largest = found.max(axis=1) if running_max else None
                    weights, total = exponentials(found, largest)
                    weights, _, total = lax.fori_loop(0, steps - 1, block, (weights, largest, total))
                    gpu.barrier_arrive(q_free.at[asked])
                    gpu.barrier_wait(v_full.at[(first + steps - 1) % STAGES])
                    sum_values(steps - 1, lax.optimization_barrier(weights))
                    return summed(steps - 1), total

                sums, total = pl.run_scoped(softmax, gpu.ACC((ROWS, size), jnp.float32))
                gpu.wait_smem_to_gmem(0)  # of the tile before
                out_tiles[warpgroup] = (sums * lax.broadcast_in_dim(1 / total, sums.shape, [0])).astype(q.dtype)
                gpu.commit_smem()
                gpu.copy_smem_to_gmem(out_tiles.at[warpgroup], out_ref.at[group, pl.ds(start + warpgroup * ROWS, ROWS), head])
                return first + steps

            lax.fori_loop(0, mine, tile, 0)
            gpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            gpu.set_max_registers(REGISTERS[0], action="increase")
            if bound is None:
                compute(running_max=True)
            else:
                small = bound_ref[0] <= BOUND
                pl.when(small)(lambda: compute(running_max=False))
                pl.when(~small)(lambda: compute(running_max=True))

        pl.when(warpgroup == WARPGROUPS)(fetch)

    tiled = gpu.TilingTransform((UNIT, HEAD_SIZE)), gpu.SwizzleTransform(128)
    shared = lambda *shape: gpu.SMEM((*shape, size), q.dtype, transforms=tiled)
    every, one = lambda number: gpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=number), lambda number: gpu.Barrier(num_barriers=number)
    run = gpu.kernel(
        hopper_attention,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            *(shared(2, WARPGROUPS, ROWS), shared(WARPGROUPS, ROWS), shared(STAGES, KEYS), shared(STAGES, KEYS)),
            *(one(2 * WARPGROUPS), one(2 * WARPGROUPS), one(STAGES), every(STAGES), one(STAGES), every(STAGES)),
        ],
        compiler_params=gpu.CompilerParams(approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup),  # jax 0.11's own; 0.10's is another
    )
    return run(q, k, v, *given)[:, :queries]
