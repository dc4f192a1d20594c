"""The way back: python -m convert_weights.export --checkpoint DIR --output FILE

Any checkpoint as one safetensors file. Stable Diffusion 3.5's part has diffusers' names and layouts, behind `transformer.`
and `vae.`; the new parts are `transformer.temporal_blocks.N.*` and `transformer.frame_embed.*`, the prompt's embedding
`prompt.*`, and the config stands in the metadata. `python -m convert_weights --input FILE`, without `--dtype`, makes the same
checkpoint of it, to the bit.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from convert_weights import rules
from convert_weights.convert import check_new, staged
from convert_weights.source import CONFIG_KEY, ConversionError, local
from svdp_jax import checkpoint, cli
from svdp_jax.config import ConfigError, to_dict
from svdp_jax.files import MediaError

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(directory: str | os.PathLike, output: pathlib.Path) -> None:
    """Writes the file `output`, tensors in the types that the checkpoint stores. Raises ConfigError, ConversionError if `output` exists, MediaError if it
    cannot be written."""
    check_new(output, "file")
    config, params, frozen = checkpoint.load_stored(directory)
    arrays = flatten_dict({"params": params, "frozen": frozen._asdict()})
    slots, shapes = rules.slots(config, "diffusers"), rules.expected(config, "diffusers")
    tensors = {name: (arrays[slot.path].dtype, shapes[name][0]) for slot in slots for name in slot.tensors}

    def values() -> Iterator[np.ndarray]:
        for slot in tqdm(slots, unit="array", dynamic_ncols=True):
            yield from rules.to_source(config, slot, arrays[slot.path] if slot.layer is None else arrays[slot.path][slot.layer])

    with staged(output, sum(array.nbytes for array in arrays.values())) as partial:
        write_safetensors(partial, tensors, values(), metadata={CONFIG_KEY: json.dumps(to_dict(config)), "format": "pt"})


def write_safetensors(
    path: pathlib.Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], values: Iterable[np.ndarray], *, metadata: dict[str, str]
) -> None:
    """A safetensors file of `tensors` (name -> type, shape), whose values come in the same order, one at a time.

    The library's own writer wants all of them in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype.name], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            stream.write(value.tobytes())


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m convert_weights.export", description="A checkpoint to one safetensors file with diffusers' names.")
    parser.add_argument("--checkpoint", required=True, help="a converted or exported checkpoint, or a training workdir")
    parser.add_argument("--output", type=local, required=True, help="the file, which must not exist yet")
    flags = parser.parse_args()
    cli.on_host()
    with cli.messages(ConversionError, ConfigError, MediaError):
        export(flags.checkpoint, flags.output)
        print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()
