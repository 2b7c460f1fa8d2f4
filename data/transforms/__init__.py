"""The transforms that a YAML may name, one file each.

`Settings` is the schema of the YAML section and the transform itself, as batched tensor code:

- `draw(count, height, width, generator)` returns a table of random numbers, (count, k) float64, k fixed; and
- `apply(images, draws)` maps uint8 (B, 3, H, W) and its rows of the table to uint8 (B, 3, H', W'); or
- `remap(rows, cols, draws)` for transforms that only move pixels: they are fused into one gather.

`PLACES` names the sections of the YAML that a transform may stand in. One of `transform.pre` or `transform.test.primary` draws
nothing; one of `transform.pre` also takes a PIL picture in `apply` and returns one. One of `transform.*.remaining` has neither
`draw` nor `apply`: its module has the `POSITION` in that list at which it may stand, and its settings may have a `mean` and a
`std`, which `data.augment.Pipeline` subtracts and divides by. A `remap` that gives -1 for pixels from outside the image has
`pads_black`. `TO_ONE_SIZE` is an example of a `transform.pre` that brings pictures of any size to one.

The draws are made outside, so that every device, an interrupted run and a reference see the same ones. `apply` and `remap`
run within a step that CUDA captures as a graph: their operators and shapes depend on shapes and settings alone, and nothing
is read from the device or sent to it. (`torch.where` with a number sends it to the device; `masked_fill` does not.)
"""
