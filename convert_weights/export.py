"""The way back: python -m convert_weights.export --checkpoint DIR --output FILE

Any checkpoint as one safetensors file. Stable Diffusion 3.5's part has diffusers' names and layouts, behind `transformer.`
and `vae.`; the new parts are `transformer.temporal_blocks.N.*` and `transformer.frame_embed.*`, the prompt's embedding
`prompt.*`, and the config stands in the metadata. `python -m convert_weights --input FILE` makes the same checkpoint of it, to
the bit.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from convert_weights import rules
from convert_weights.convert import staged
from convert_weights.source import CONFIG_KEY, ConversionError
from svdp_jax import checkpoint, cli
from svdp_jax.config import ConfigError, to_dict

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export(directory: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the file `output`, tensors in the types that the checkpoint stores. Raises ConfigError, or ConversionError if `output` exists."""
    if output.exists():
        raise ConversionError(f"output {output} exists already: give a new file, or remove it")
    config, params, frozen = checkpoint.load_stored(directory)
    arrays = flatten_dict({"params": params, "frozen": frozen._asdict()})
    slots = rules.slots(config, "diffusers")
    shapes = rules.expected(config, "diffusers")
    header: dict[str, Any] = {"__metadata__": {CONFIG_KEY: json.dumps(to_dict(config)), "format": "pt"}}
    end = 0
    for slot in slots:
        dtype = arrays[slot.path].dtype
        for name in slot.tensors:
            shape, _ = shapes[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": TYPES[dtype.name], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # One tensor after the other: the library's writer wants all of them in memory at once, beside the checkpoint.
    with staged(output, end + len(text)) as partial, tqdm(total=len(slots), unit="array", dynamic_ncols=True) as bar:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for slot in slots:
                array = arrays[slot.path] if slot.layer is None else arrays[slot.path][slot.layer]
                for tensor in rules.to_source(config, slot, array):
                    stream.write(np.ascontiguousarray(tensor).tobytes())
                bar.update()


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m convert_weights.export", description="A checkpoint to one safetensors file with diffusers' names.")
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a converted or exported checkpoint, or a training workdir")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the file, which must not exist yet")
    flags = parser.parse_args()
    with cli.messages(ConversionError, ConfigError):
        export(flags.checkpoint, flags.output)
        print(f"wrote {flags.output}")


if __name__ == "__main__":
    main()
