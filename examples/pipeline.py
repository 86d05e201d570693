"""A model in four stages of two devices: GPipe and 1F1B, what they hold and how long they wait.

Prints that both give the loss of one device, the inputs that stages held at one time, and the
bubble. Eight virtual devices share one CPU, so time is measured an op at a time and the schedule is
then laid out with each stage's mean times, as if every stage had a processor of its own.
"""

import dataclasses

import jax
import numpy as np

import jax_mla
from jax_mla.training import Batch, Precision, Recipe, next_token_loss
from jax_mla.training import pipeline as pp

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # read when the first array is made

STAGES, MICRO_BATCHES = 4, 8


def main():
    config = dataclasses.replace(jax_mla.tiny(), num_hidden_layers=4)
    params = jax_mla.init(jax.random.key(0), config)
    tokens = np.random.default_rng(0).integers(0, 256, (2 * MICRO_BATCHES, 128), np.int32)
    print(f"one device: loss {next_token_loss(params, config, tokens).loss:.6f}")

    pipeline = pp.Pipeline(config, jax_mla.make_mesh(stage=STAGES, data=2))
    for stage, ((layer, _), mesh) in enumerate(zip(pipeline.layers, pipeline.meshes, strict=True)):
        devices = ", ".join(str(device.id) for device in mesh.devices.flat)
        print(f"stage {stage}: layer {layer} on devices {devices}")

    recipe = Recipe(
        num_steps=1, num_micro_batches=MICRO_BATCHES, precision=Precision(compute="float32")
    )
    parts = pp.split_params(params, pipeline)
    ideal = pp.ideal_bubble(STAGES, MICRO_BATCHES)
    for schedule in (pp.gpipe, pp.one_f_one_b):
        for _ in range(2):  # the first time includes compilation
            result = pp.loss_and_gradients(
                parts, pipeline, Batch(tokens), recipe=recipe, schedule=schedule, measure=True
            )
        ran = result.execution
        print(f"\n{schedule.__name__}, a backward op twice as long as a forward op:")
        print(pp.simulate(ran.schedule))
        held = ", ".join(
            f"{count} ({num_bytes / 1e3:.0f} kB)"
            for count, num_bytes in zip(ran.peak_held, ran.peak_held_bytes, strict=True)
        )
        print(f"loss {result.loss.loss:.6f}; micro-batches held by the stages: {held}")
        print(
            f"bubble {ran.timeline().bubble:.1%} with measured times, {ideal:.1%} = (P-1)/(M+P-1)"
        )


if __name__ == "__main__":
    main()
