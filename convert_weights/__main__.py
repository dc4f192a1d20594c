"""python -m convert_weights --input FILE_OR_DIR --output DIR [--text-encoders DIR] [--prompt ""] [--dtype float32|bfloat16] [--seed 0]"""

from convert_weights.convert import convert
from convert_weights.source import ConversionError, local
from svdp_jax import checkpoint, cli
from svdp_jax.config import ConfigError
from svdp_jax.files import MediaError


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m convert_weights", description="Stable Diffusion 3.5 Medium's weights to a checkpoint to train or sample from.")
    parser.add_argument("--input", type=local, required=True, help="sd3.5_medium.safetensors, a diffusers folder, or what convert_weights.export wrote")
    parser.add_argument("--output", type=local, required=True, help="directory of the checkpoint, which must not exist yet")
    parser.add_argument("--text-encoders", type=local, help="diffusers folder with text_encoder*/ and tokenizer*/; those absent count as zeros (default: none)")
    parser.add_argument("--prompt", default="", help="the one prompt of the model, encoded now and never again (default: empty)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the network's parameters (default: an exported file's own, else float32)")
    parser.add_argument("--seed", type=int, default=0, help="of the new parts: temporal blocks and frame encoding (default: %(default)s)")
    flags = parser.parse_args()
    cli.on_host()
    with cli.messages(ConversionError, ConfigError, MediaError):
        config = convert(flags.input, flags.output, text_encoders=flags.text_encoders, prompt=flags.prompt, dtype=flags.dtype, seed=flags.seed)
        model, dtype = config.model, checkpoint.stored_dtype(flags.output / checkpoint.WEIGHTS)
        print(f"{flags.output}: {model.depth} blocks of width {model.width}, {model.dual_blocks} with a second attention, {dtype}")


if __name__ == "__main__":
    main()
