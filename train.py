"""Train: python train.py --config configs/demo.py --workdir DIR [--train.steps 4 ...]

Any field of the config, typed, by its dotted name. A workdir that holds checkpoints is resumed. It gets `config.json`,
`frozen/`, `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/`.
"""

import json
import pathlib
import time

import flax.linen as nn
import imageio.v3 as iio
import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from svdp_jax import checkpoint, cli, pipeline, sharding, train_state
from svdp_jax.config import Config, ConfigError, load_config
from svdp_jax.data import clips, loader
from svdp_jax.data.video import MediaError
from svdp_jax.models.autoencoder import fit_linear, make_autoencoder
from svdp_jax.models.tokens import position_table
from svdp_jax.types import Frozen


def main(config: Config, workdir: pathlib.Path) -> None:
    # ----------------------------------------------------------------------------------------------------- mesh and data
    train = config.train
    mesh = sharding.make_mesh(config.mesh)
    whole, per_sample = sharding.replicated(mesh), sharding.batch_sharding(mesh, train.batch)
    checkpoints = checkpoint.manager(workdir, keep=train.keep)
    start = checkpoints.latest_step() or 0
    batches = loader.batches(config.data, split="train", seed=train.seed, batch=train.batch, start_step=start)
    shown = loader.whole_clip(clips.open_clips(config.data.path, split="validation")[0], config.data)

    # -------------------------------------------------------------------------------------------- state, born in its shards
    key_init, key = jax.random.split(jax.random.key(train.seed))
    new_state = lambda key: train_state.init_state(config, train_state.init_params(config, key))
    shardings = sharding.shardings_of(jax.eval_shape(new_state, key_init), mesh, config.mesh.strategy)
    if train.init_from and not start:
        params, frozen = checkpoint.load_initial(pathlib.Path(train.init_from), config)
        params = jax.device_put(params, shardings.params)
        state = jax.jit(lambda params: train_state.init_state(config, params), out_shardings=shardings)(params)
    else:
        state = jax.jit(lambda key: nn.meta.unbox(new_state(key)), out_shardings=shardings)(key_init)
        state = checkpoint.restore(checkpoints, state) if start else state
        frozen = checkpoint.load_frozen(workdir) if start else new_frozen(config)
    if not start:
        checkpoint.save_frozen(workdir, frozen)
    checkpoint.write_config(workdir, config)
    constants, autoencoder, key = jax.device_put((train_state.constants_of(config, frozen), frozen.autoencoder, key), whole)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{config.name}: {count:,} parameters, step {start} of {train.steps}, {jax.device_count()} x {jax.devices()[0].device_kind}")

    # -------------------------------------------------------------------------------------------------------------- step
    step_fn = jax.jit(
        train_state.train_step,
        static_argnums=0,
        static_argnames="with_history",
        out_shardings=(shardings, whole),
        donate_argnums=1,
    )

    # -------------------------------------------------------------------------------------------------------------- loop
    log = (workdir / "metrics.jsonl").open("a")
    board = SummaryWriter(str(workdir / "tensorboard"))
    end = min(train.steps, train.stop_at or train.steps)
    pending: list[dict] = []  # metrics stay on the device until a line is logged: reading them waits for the step
    waited, since, steps_since = 0.0, time.perf_counter(), 0
    with tqdm(total=train.steps, initial=start, unit="step", dynamic_ncols=True) as bar:
        for step in range(start, end):
            asked = time.perf_counter()
            batch = jax.device_put(next(batches), per_sample)
            waited += time.perf_counter() - asked
            state, metrics = step_fn(config, state, batch, autoencoder, constants, key, with_history=config.has_history(step))
            pending.append(metrics)
            steps_since += 1
            bar.update()
            done = step + 1
            if done % train.log_every == 0 or done == end:
                means = {name: float(np.mean([metrics[name] for metrics in pending])) for name in pending[0]}
                seconds = (time.perf_counter() - since) / steps_since
                record = {"step": done, **means, "seconds": seconds, "data_wait": waited / (seconds * steps_since)}
                log.write(json.dumps(record) + "\n")
                log.flush()
                for name, value in record.items():
                    board.add_scalar(f"train/{name}", value, done)
                bar.set_postfix_str(f"loss {means['loss']:.4f}, grad {means['grad_norm']:.2f}, {seconds:.2f} s/step, waiting {record['data_wait']:.0%}")
                pending, waited, since, steps_since = [], 0.0, time.perf_counter(), 0
            if done % train.checkpoint_every == 0 or done == end:
                checkpoint.save(checkpoints, state)
            if done % train.sample_every == 0 or done == end:
                picture = pipeline.contact_sheet(config, state.ema, frozen, *shown)
                path = workdir / "samples" / f"{done:07d}.png"
                path.parent.mkdir(exist_ok=True)
                iio.imwrite(path, picture)
                board.add_image("samples", picture, done, dataformats="HWC")
    checkpoints.wait_until_finished()
    checkpoints.close()
    batches.close()
    board.close()
    print(f"step {end}: {workdir}")


def new_frozen(config: Config) -> Frozen:
    """Frozen arrays of a run from scratch: an autoencoder fitted to the data or random, the sin-cos table, a zero prompt."""
    model = config.model
    if config.autoencoder.kind == "linear":
        records = clips.open_clips(config.data.path, split="train")
        chosen = np.random.default_rng(config.train.seed).choice(len(records), min(len(records), 64), replace=False)
        autoencoder = fit_linear(config.autoencoder, np.concatenate([loader.whole_clip(records[int(i)], config.data)[2][::4] for i in chosen]))
    else:
        empty = np.zeros((1, config.data.size, config.data.size, 3), np.float32)
        autoencoder = jax.jit(make_autoencoder(config.autoencoder).init)(jax.random.key(config.train.seed), empty)["params"]
    return Frozen(autoencoder, position_table(model), np.zeros((model.text_tokens, model.text_width), np.float32), np.zeros(model.pooled_width, np.float32))


def parse() -> tuple[Config, pathlib.Path]:
    """--config and --workdir, and every field of the config by name."""
    parser = cli.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=pathlib.Path)
    parser.add_argument("--workdir", type=pathlib.Path)
    paths, arguments = parser.parse_known_args()
    if not (paths.config and paths.workdir) and not {"--help", "-h"} & set(arguments):
        raise ConfigError("train.py needs --config FILE (as configs/demo.py) and --workdir DIR")
    default = load_config(paths.config or "configs/demo.py")
    return cli.parse(default, arguments, description=__doc__, prog="train.py --config FILE --workdir DIR"), paths.workdir


if __name__ == "__main__":
    with cli.messages(ConfigError, MediaError):
        main(*parse())
